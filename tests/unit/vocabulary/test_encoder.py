"""CLIP's text tower through open_clip, with small random weights: equal to open_clip's own text encoding."""

from __future__ import annotations

import copy
import functools
import json
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from proxydet.errors import CheckpointError, VocabularyError
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.encoder import (
    ClipTextEncoder,
    EmbeddingCache,
    open_encoder,
    read_text_tower,
)
from proxydet.vocabulary.names import ClassWords
from proxydet.vocabulary.sources import any_names
from proxydet.vocabulary.vocabulary import Vocabulary, build_vocabulary

if TYPE_CHECKING:
    from open_clip.model import CLIP

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
NAMES = [
    "a cat",
    "a dog",
    "a very long-winded kitchen implement of the seventeenth century",
    "a 犬",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> CLIP:
    import open_clip

    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny-test.json").write_text(json.dumps(CONFIG))
    (folder / "foreign-test.json").write_text(
        json.dumps({**CONFIG, "text_cfg": {"hf_model_name": "some/model"}})
    )
    (folder / "whole-test.json").write_text(
        json.dumps({**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "no_causal_mask": True}})
    )
    open_clip.add_model_config(folder)
    torch.manual_seed(3)
    return tower(CONFIG["text_cfg"])


def tower(text: dict[str, Any]) -> CLIP:
    # Imported here: it takes seconds, in each process that collects tests.
    from open_clip.model import CLIP

    return CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], text, quick_gelu=True).eval()


@functools.cache
def tokenizer() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def weights(clip, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, path)
    return path


@pytest.fixture
def cache(tmp_path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache" / "texts.sqlite")


def expected(clip: CLIP, texts: list[str]) -> np.ndarray:
    with torch.inference_mode():
        return clip.encode_text(tokenizer()(texts)).numpy()


def test_equal_to_open_clip_at_full_context(clip, weights, cache):
    encoder = ClipTextEncoder(weights, model="tiny-test", cache=cache)
    rows = encoder.encode(NAMES)
    assert encoder.dim == 16
    np.testing.assert_allclose(rows, expected(clip, NAMES), rtol=1e-4, atol=1e-6)


def test_a_tower_that_reads_padding_gets_its_full_context(clip, weights, cache):
    encoder = ClipTextEncoder(weights, model="whole-test", cache=cache)
    both_ways = tower({**CONFIG["text_cfg"], "no_causal_mask": True})
    both_ways.load_state_dict(clip.state_dict())
    np.testing.assert_allclose(
        encoder.encode(NAMES), expected(both_ways, NAMES), rtol=1e-4, atol=1e-6
    )


def test_known_texts_are_not_encoded_again(weights, cache, monkeypatch):
    first = ClipTextEncoder(weights, model="tiny-test", cache=cache).encode(NAMES)
    monkeypatch.setattr(
        "proxydet.vocabulary.encoder.read_text_tower", lambda *_: pytest.fail("read weights")
    )
    again = ClipTextEncoder(weights, model="tiny-test", cache=cache).encode(NAMES[::-1])
    np.testing.assert_array_equal(first[::-1], again)


def test_other_weights_or_another_model_are_not_served_from_the_cache(
    clip, weights, cache, tmp_path
):
    first = ClipTextEncoder(weights, model="tiny-test", cache=cache).encode(["a cat"])
    changed = {k: v * 1.5 if k == "text_projection" else v for k, v in clip.state_dict().items()}
    torch.save(changed, tmp_path / "other.pt")
    other = ClipTextEncoder(tmp_path / "other.pt", model="tiny-test", cache=cache).encode(["a cat"])
    np.testing.assert_allclose(other, first * 1.5, rtol=1e-4)
    whole = ClipTextEncoder(weights, model="whole-test", cache=cache).encode(["a cat"])
    assert not np.allclose(whole, first)


def test_an_embedding_does_not_depend_on_its_company(weights, tmp_path):
    alone = ClipTextEncoder(
        weights, model="tiny-test", cache=EmbeddingCache(tmp_path / "a")
    ).encode(["a cat"])
    together = ClipTextEncoder(
        weights, model="tiny-test", cache=EmbeddingCache(tmp_path / "b")
    ).encode(NAMES)
    np.testing.assert_allclose(alone[0], together[0], atol=1e-6)


def test_threads_share_an_encoder(clip, weights, cache):
    encoder = ClipTextEncoder(weights, model="tiny-test", cache=cache)
    texts = [f"a thing {i}" for i in range(12)]
    rows: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        rows[i] = encoder.encode([texts[i], texts[(i + 1) % 12]])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = expected(clip, texts)
    for i, found in rows.items():
        np.testing.assert_allclose(found, wanted[[i, (i + 1) % 12]], rtol=1e-4, atol=1e-6)


def test_a_text_beyond_the_context_is_named(weights, cache):
    with pytest.raises(VocabularyError, match="longer than the 77 tokens"):
        ClipTextEncoder(weights, model="tiny-test", cache=cache).encode(["a cat", "word " * 76])


def test_synonyms_and_prompts_are_averaged(clip, weights, cache):
    encoder = ClipTextEncoder(weights, model="tiny-test", cache=cache)
    built = build_vocabulary(
        [ClassWords("couch", ("sofa",)), " lamp "], encoder, prompts=["a {}", "the {}"]
    )
    assert built.names == ("couch", "lamp")
    rows = expected(clip, ["a couch", "the couch", "a sofa", "the sofa"])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(built.embeddings[0], rows.mean(axis=0), rtol=1e-3, atol=1e-6)
    single = build_vocabulary(["lamp"], encoder)
    np.testing.assert_allclose(single.embeddings, expected(clip, ["a lamp"]), rtol=1e-4, atol=1e-6)


def test_the_compositional_encoder_gets_no_prompt():
    encoder = CompositionalEncoder.create(["red", "circle"], dim=16, noise=0.1, seed=0)
    built = build_vocabulary(["red circle"], encoder)
    np.testing.assert_array_equal(built.embeddings, encoder.encode(["red circle"]))


def test_vocabularies_are_made_from_names(tmp_path):
    encoder = CompositionalEncoder.create(["red", "circle"], dim=16, noise=0.1, seed=0)
    encoder.save(tmp_path / "words.json")
    made = Vocabulary.from_names([" red circle"], encoder=tmp_path / "words.json")
    assert made == build_vocabulary(["red circle"], encoder)


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path))
    with pytest.raises(VocabularyError) as caught:
        open_encoder()
    assert "proxydet download clip-vit-b32" in str(caught.value.hint)
    assert ".npy" in str(caught.value.hint)


def test_models_that_cannot_serve_are_refused(clip, weights, cache):
    with pytest.raises(VocabularyError, match="no model"):
        ClipTextEncoder(weights, model="absent-test", cache=cache).encode(["a"])
    with pytest.raises(VocabularyError, match="hf_model_name"):
        ClipTextEncoder(weights, model="foreign-test", cache=cache).encode(["a"])


def test_weights_of_another_size_are_refused(weights, cache):
    with pytest.raises(CheckpointError, match="does not fit"):
        ClipTextEncoder(weights, model="ViT-B-32", cache=cache).encode(["a"])


@pytest.mark.filterwarnings("ignore")  # tracing warns of its own deprecation and of much else
def test_torchscript_archives_are_read_without_running_them(clip, tmp_path):
    path = tmp_path / "jit.pt"
    image, text = torch.zeros(1, 3, 32, 32), tokenizer()(["a"])
    torch.jit.trace(copy.deepcopy(clip), (image, text), check_trace=False).save(str(path))
    read = read_text_tower(path)
    wanted = {k: v for k, v in clip.state_dict().items() if not k.startswith(("visual.", "logit"))}
    assert set(read) == set(wanted)
    for name, tensor in read.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)


def test_safetensors_and_nested_towers_are_read(clip, tmp_path):
    from safetensors.torch import save_file

    tower = {k: v for k, v in clip.state_dict().items() if not k.startswith(("visual.", "logit"))}
    save_file({f"text.{k}": v.half() for k, v in tower.items()}, tmp_path / "a.safetensors")
    found = read_text_tower(tmp_path / "a.safetensors")
    assert set(found) == set(tower)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


NOISE = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)


def test_images_are_embedded_as_open_clip_does(clip, weights, cache):
    import open_clip

    prepare = open_clip.image_transform(32, is_train=False)
    given = torch.stack([prepare(Image.fromarray(pixels)) for pixels in NOISE])
    with torch.inference_mode():
        wanted = clip.encode_image(given).numpy()
    encoder = ClipTextEncoder(weights, model="tiny-test", cache=cache)
    np.testing.assert_allclose(encoder.encode_images(list(NOISE)), wanted, rtol=1e-3, atol=1e-5)
    assert encoder.encode_images([]).shape == (0, 16)


def test_weights_without_their_image_tower_are_refused(clip, weights, cache, tmp_path):
    texts = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    torch.save(texts, tmp_path / "texts.pt")
    encoder = ClipTextEncoder(tmp_path / "texts.pt", model="tiny-test", cache=cache)
    assert encoder.encode(["a cat"]).shape == (1, 16)
    with pytest.raises(CheckpointError, match=r"texts\.pt does not contain a CLIP image tower"):
        encoder.encode_images([NOISE[0]])
    with pytest.raises(CheckpointError, match="does not fit the image tower of ViT-B-32"):
        ClipTextEncoder(weights, model="ViT-B-32", cache=cache).encode_images([NOISE[0]])


@pytest.fixture
def exemplars(tmp_path, monkeypatch) -> Path:
    """Boxes of two classes, dark and bright, in images of noise."""
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    content = {"images": [], "annotations": [], "categories": []}
    for row, name in enumerate(["a cat", "zebra"]):
        content["categories"].append({"id": row + 1, "name": name})
    for number in range(6):
        pixels = np.random.default_rng(number).integers(90, 160, (60, 90, 3), np.uint8)
        for row, change in enumerate((-80, 80)):
            left = 5 + 45 * row
            seen = pixels[10:40, left : left + 36].astype(int) + change
            pixels[10:40, left : left + 36] = seen.clip(0, 255)
            box = {"bbox": [left, 10, 36, 30], "area": 1080, "iscrowd": 0, "image_id": number + 1}
            content["annotations"].append(
                {"id": 2 * number + row + 1, "category_id": row + 1, **box}
            )
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        file = {"id": number + 1, "height": 60, "width": 90, "file_name": f"{number}.png"}
        content["images"].append(file)
    path = tmp_path / "few.json"
    path.write_text(json.dumps(content))
    return path


def test_exemplars_become_classes_in_the_space_of_texts(
    clip, weights, exemplars, tmp_path, cli, monkeypatch
):
    started = []

    def counted(*args, **options):
        started.append(args)
        return open_encoder(*args, **options)

    monkeypatch.setattr("proxydet.vocabulary.encoder.open_encoder", counted)
    words = ["--image-tower", "--encoder", weights, "--model", "tiny-test"]
    build = ["vocab", "build", "--exemplars", exemplars, *words]
    code, _, err = cli(*build, "-o", tmp_path / "seen.vocab")
    assert code == 0, err
    assert len(started) == 1  # CLIP takes seconds and memory
    seen = Vocabulary.load(tmp_path / "seen.vocab")
    assert (seen.names, seen.dimension, seen.plain) == (("a cat", "zebra"), 16, True)
    # They lie apart as the images do, around what names have in common, and not around the images.
    encoder = ClipTextEncoder(weights, model="tiny-test")
    texts = build_vocabulary(any_names(), encoder).normalised()
    middle_D = texts.mean(axis=0)
    assert (seen.normalised() @ middle_D).min() > 0.5 * np.linalg.norm(middle_D)
    pixels = np.asarray(Image.open(tmp_path / "0.png"))
    crops = encoder.encode_images([pixels[8:42, 3:43], pixels[8:42, 48:88]])
    crops /= np.linalg.norm(crops, axis=1, keepdims=True)
    cosines = (crops - crops.mean(axis=0)) @ (seen.embeddings - seen.embeddings.mean(axis=0)).T
    assert cosines[0, 0] > 0 > cosines[0, 1]
    further = tmp_path / "more.txt"
    further.write_text("zebra\nlamp\n")
    cli(*build, further, "--fuse", "-o", tmp_path / "both.vocab")
    both = Vocabulary.load(tmp_path / "both.vocab")
    assert both.names == ("a cat", "zebra", "lamp")
    named = build_vocabulary(both.names, encoder).normalised()
    toward = [(table.normalised()[:2] * named[:2]).sum(axis=1) for table in (seen, both)]
    assert (toward[1] > toward[0]).all()
    np.testing.assert_allclose(both.normalised()[2], named[2], atol=1e-5)


def test_a_single_class_of_crops_has_nothing_to_be_told_from(
    clip, weights, exemplars, tmp_path, cli
):
    (tmp_path / "shots" / "cup").mkdir(parents=True)
    for number, pixels in enumerate(NOISE):
        Image.fromarray(pixels).save(tmp_path / "shots" / "cup" / f"{number}.png")
    words = [
        "--image-tower",
        "--encoder",
        weights,
        "--model",
        "tiny-test",
        "-o",
        tmp_path / "a.vocab",
    ]
    build = ["vocab", "build", "--exemplars", tmp_path / "shots", *words]
    code, _, err = cli(*build)
    assert (code, "--statistics IMAGES" in err) == (3, True)
    assert not (tmp_path / "a.vocab").exists()
    assert cli(*build, "--statistics", exemplars).code == 0
    assert cli("vocab", "build", "--image-tower", "-o", tmp_path / "a.vocab").code == 2


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("this must not run",))


def test_hostile_files_are_refused(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "pickle.pt")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        import pickle

        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(), protocol=2))
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name in ("pickle.pt", "archive.pt", "text.pt", "cut.safetensors", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            read_text_tower(tmp_path / name)
    assert "must not run" not in capsys.readouterr().out


def test_a_damaged_cache_is_put_aside(weights, cache, clip):
    cache.path.parent.mkdir(parents=True)
    cache.path.write_bytes(b"not a database" * 100)
    rows = ClipTextEncoder(weights, model="tiny-test", cache=cache).encode(["a cat"])
    np.testing.assert_allclose(rows, expected(clip, ["a cat"]), rtol=1e-4, atol=1e-6)
    assert cache.path.with_name("texts.sqlite.damaged").read_bytes().startswith(b"not a database")


def test_the_cache_finds_thousands_of_texts(cache):
    rows = {f"text {i}": np.full(4, i, np.float32) for i in range(1300)}
    cache.put("digest", rows)
    found = cache.get("digest", [*rows, "absent"])
    assert set(found) == set(rows)
    assert found["text 1234"].tolist() == [1234.0] * 4
    assert cache.get("other digest", rows) == {}
