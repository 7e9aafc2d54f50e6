"""Detectors from run folders, checkpoints and published models."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from proxydet import artifacts
from proxydet.config import dump_yaml, load_mapping
from proxydet.detector import Detector, open_named
from proxydet.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    InputError,
    ProxydetError,
    VocabularyError,
)
from proxydet.files import sha256, write_json
from proxydet.manifest import build_manifest
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.models import PUBLISHED_MODELS, find_detector
from proxydet.recipes import get_recipe
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import write_safetensors


def save(network: ProxyDetNetwork, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": network.state_dict()}, path)
    return path


@pytest.fixture
def run(tmp_path, network, encoder) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = get_recipe("tiny")
    inference = dataclasses.replace(recipe.inference, alpha=0.2, beta=0.6)
    (folder / "config.yaml").write_text(dump_yaml(dataclasses.replace(recipe, inference=inference)))
    network.vocabulary.save(folder / "vocabulary.npz")
    encoder.save(folder / "text_encoder.json")
    save(network, folder / "model_final.pth")
    return folder


def test_a_run_predicts_as_its_network_does(run, detector, pictures):
    opened = Detector.from_run(run, device="cpu")
    assert not opened.network.training
    assert opened.inference.alpha == 0.2
    wanted = Detector(
        detector.network,
        inference=opened.inference,
        shortest=64,
        longest=128,
        encoder=detector.encoder,
    )
    for vocabulary in (None, ["red star", "green circle"]):
        found = opened.predict(pictures[0], vocabulary, score_threshold=0.02)
        expected = wanted.predict(pictures[0], vocabulary, score_threshold=0.02)
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)
        assert found.labels == expected.labels


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_in_a_precision_that_this_machine_lacks_opens(
    run, pictures, cli, monkeypatch, tmp_path, precision
):
    monkeypatch.delenv("PROXYDET_ALLOW_SLOW_PRECISION", raising=False)
    monkeypatch.setattr("proxydet.modeling.network.half_speed", lambda *_: 0.01)
    exact = Detector.from_run(run, device="cpu").predict(pictures[0], score_threshold=0.02)
    config = load_mapping(run / "config.yaml")
    config["inference"]["precision"] = precision
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    opened = Detector.from_run(run, device="cpu")
    with pytest.raises(ConfigError) as caught:
        opened.predict(pictures[0])
    assert "--precision fp32" in caught.value.hint
    found = opened.with_settings(precision="fp32").predict(pictures[0], score_threshold=0.02)
    assert found.to_dict() == exact.to_dict()

    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    words = ("predict", tmp_path / "a.png", "--run", run, "--device", "cpu", "--json")
    code, _, err = cli(*words)
    assert (code, "--precision fp32" in err) == (3, True)
    code, out, _ = cli(*words, "--precision", "fp32", "--score-threshold", "0.02")
    assert code == 0
    assert len(json.loads(out)["images"][0]["detections"]) == len(exact)


def test_a_quickstarts_folder_stands_for_the_run_in_it(run):
    opened = Detector.from_run(run.parent, device="cpu")
    assert opened.vocabulary == Detector.from_run(run, device="cpu").vocabulary
    assert isinstance(opened.encoder, CompositionalEncoder)
    for folder in (run.parent, run):
        found = find_detector(run=folder, weights=None, config=None)
        assert (found.run, found.name) == (run, run.parent.name)


def test_an_unfinished_run_gives_its_newest_checkpoint(run, network):
    (run / "model_final.pth").unlink()
    with pytest.raises(CheckpointError, match="no weights yet"):
        Detector.from_run(run)
    save(network, run / "checkpoints" / "step_0000009.pth")
    newest = {name: value + 1 for name, value in network.state_dict().items() if "mask" in name}
    torch.save(
        {"model": {**network.state_dict(), **newest}}, run / "checkpoints" / "step_0000010.pth"
    )
    (run / "checkpoints" / "step_0000011.pth.tmp").write_bytes(b"")
    opened = Detector.from_run(run).network.state_dict()
    name = next(iter(newest))
    torch.testing.assert_close(opened[name], newest[name])
    older = Detector.from_run(run, checkpoint=run / "checkpoints" / "step_0000009.pth")
    torch.testing.assert_close(older.network.state_dict()[name], network.state_dict()[name])


def test_final_weights_are_safetensors_or_of_torch(run, network):
    state = network.state_dict()
    name = next(iter(state))
    newer = {**state, name: state[name] + 1}
    write_safetensors(run / "model_final.safetensors", newer, {"recipe": "tiny"})
    for opened in (
        Detector.from_run(run),
        open_named(
            find_detector(run=None, weights=str(run / "model_final.safetensors"), config=None),
            device="cpu",
        ),
    ):
        torch.testing.assert_close(opened.network.state_dict()[name], newer[name])
    content = bytearray((run / "model_final.safetensors").read_bytes())
    content[-5] ^= 4
    (run / "model_final.safetensors").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"model_final\.safetensors") as caught:
        Detector.from_run(run)
    assert "model_final.pth" in str(caught.value.hint)


def test_the_encoder_of_the_data_description_serves_where_the_run_has_none(run):
    (run / "text_encoder.json").rename(run.parent / "words.json")
    description = run.parent / "data.toml"
    description.write_text(
        'name = "d"\n[vocabulary]\nembeddings = "e.npy"\nencoder = "words.json"\n'
    )
    recipe = get_recipe("tiny")
    data = dataclasses.replace(recipe.data, description=description)
    (run / "config.yaml").write_text(dump_yaml(dataclasses.replace(recipe, data=data)))
    assert isinstance(Detector.from_run(run).encoder, CompositionalEncoder)


def test_without_an_encoder_names_ask_for_clip(run, pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path / "none"))
    (run / "text_encoder.json").unlink()
    opened = Detector.from_run(run)
    opened.predict(pictures[0])
    with pytest.raises(VocabularyError, match=r"^'red star': not among the 4 classes") as caught:
        opened.predict(pictures[0], ["red circle", "red star"])
    assert "clip-vit-b32" in str(caught.value.hint)


def test_without_an_encoder_the_runs_own_names_are_looked_for(run, pictures, monkeypatch, tmp_path):
    names = ["blue circle", "red circle"]
    file = tmp_path / "names.txt"
    file.write_text("\n".join(names))
    monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path / "none"))
    (run / "text_encoder.json").unlink()
    opened = Detector.from_run(run)
    for given in (names, file):
        resolved = opened.resolve(given)
        assert resolved.names == ("blue circle", "red circle")
        np.testing.assert_array_equal(
            resolved.embeddings, opened.vocabulary.subset(names).embeddings
        )
        assert set(opened.predict(pictures[0], given, score_threshold=0).labels) <= set(names)
    # The table holds them under the training's prompt, and a class's synonyms are in no table.
    with pytest.raises(VocabularyError, match="'red circle'"):
        opened.vocabulary_of(["red circle"], prompts="a photo of a {}.")
    file.write_text("red circle | red disc\n")
    with pytest.raises(VocabularyError, match="'red circle'"):
        opened.resolve(file)


def test_folders_that_are_no_runs_are_named(run, tmp_path):
    with pytest.raises(InputError, match="run folder"):
        Detector.from_run(tmp_path / "absent")
    with pytest.raises(InputError, match="run folder"):
        Detector.from_run(run.parent.parent)
    (run / "config.yaml").write_text("model: {backbon: {}}\n")
    with pytest.raises(ConfigError, match="backbon"):
        Detector.from_run(run)
    (run / "config.yaml").write_text(dump_yaml(get_recipe("tiny")))
    (run / "vocabulary.npz").write_bytes(b"damaged")
    with pytest.raises(VocabularyError, match=r"vocabulary\.npz"):
        Detector.from_run(run)


@pytest.mark.parametrize("damage", ["cut", "folder"])
def test_damaged_settings_of_a_run_are_read_from_its_manifest(run, caplog, damage):
    whole = load_mapping(run / "config.yaml")
    record(run, whole)
    (run / "config.yaml").unlink()
    if damage == "cut":
        (run / "config.yaml").write_text("model: {backbone")
    else:
        (run / "config.yaml").mkdir()
    assert Detector.from_run(run).inference.alpha == 0.2
    assert str(run / "manifest.json") in caplog.text
    (run / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"config\.yaml"):
        Detector.from_run(run)


def record(run: Path, configuration: dict, **digests: str) -> None:
    manifest = build_manifest(
        "training", configuration=configuration, digests=digests, mode="off", seeds={"seed": 0}
    )
    write_json(run / "manifest.json", manifest.to_dict())


def test_edited_settings_of_a_run_are_not_used_and_reported(run, caplog):
    content = load_mapping(run / "config.yaml")
    record(run, content)
    Detector.from_run(run)
    content["data"]["workers"] += 1
    content["training"]["log"] = {}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    Detector.from_run(run)
    assert caplog.text == "", "nothing that a detector uses"
    content["inference"]["alpha"] = 0.4
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert Detector.from_run(run).inference.alpha == 0.4, "training may resume with it, too"
    assert "inference.alpha: 0.2 there, 0.4 now" in caplog.text
    temperature = content["model"]["classifier"]["temperature"]
    content["model"]["classifier"]["temperature"] = temperature + 8
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    opened = (
        Detector.from_run(run),
        Detector.from_checkpoint(run / "model_final.pth", config=run / "config.yaml"),
    )
    assert "model.classifier.temperature" in caplog.text
    for detector in opened:
        assert detector.network.config.classifier.temperature == temperature
        assert detector.inference.alpha == 0.2


def test_an_edited_vocabulary_or_encoder_of_a_run_is_refused(run, network):
    digests = {"vocabulary": network.vocabulary.digest}
    digests["text encoder"] = sha256(run / "text_encoder.json")
    record(run, load_mapping(run / "config.yaml"), **digests)
    Detector.from_run(run)
    remedy = f"proxydet train --config {run / 'config.yaml'} --output {run}"
    names = network.vocabulary.names
    other = Vocabulary.from_arrays(names, network.vocabulary.embeddings[::-1].copy())
    other.save(run / "vocabulary.npz")
    for damage in (None, b"damaged"):
        if damage:
            (run / "vocabulary.npz").write_bytes(damage)
        with pytest.raises(VocabularyError, match=r"vocabulary\.npz") as caught:
            Detector.from_run(run)
        assert remedy in str(caught.value.hint)
    network.vocabulary.save(run / "vocabulary.npz")
    path = run / "text_encoder.json"
    path.write_text(path.read_text().replace('"noise": 0.', '"noise": 1.'))
    with pytest.raises(VocabularyError, match=r"text_encoder\.json") as caught:
        Detector.from_run(run)
    assert remedy in str(caught.value.hint)
    path.unlink()  # words would be embedded by CLIP, which the run was not trained with
    with pytest.raises(VocabularyError, match=r"text_encoder\.json") as caught:
        _ = Detector.from_run(run).encoder
    assert remedy in str(caught.value.hint)
    (run / "manifest.json").unlink()  # as of a run of version 0.1: only what is damaged is seen
    path.write_text("{")
    with pytest.raises(VocabularyError, match=r"text_encoder\.json") as caught:
        _ = Detector.from_run(run).encoder
    assert remedy in str(caught.value.hint)


@pytest.mark.parametrize("name", ["model_final.pth", "vocabulary.npz", "text_encoder.json"])
def test_a_folder_in_the_place_of_a_runs_file_is_named(run, name):
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(ProxydetError, match=re.escape(name)):
        _ = Detector.from_run(run).encoder


def test_a_checkpoint_opens_with_a_configuration_and_its_vocabulary(run, network, pictures):
    weights = run / "model_final.pth"
    by_file = Detector.from_checkpoint(
        weights, config=run / "config.yaml", vocabulary=network.vocabulary
    )
    by_value = Detector.from_checkpoint(
        weights, config=get_recipe("tiny").model, vocabulary=network.vocabulary
    )
    assert by_file.inference.alpha == 0.2
    assert by_value.inference.alpha == 0.15
    for opened in (by_file, by_value):
        opened.predict(pictures[0])
    with pytest.raises(InputError, match="'r51'"):
        Detector.from_checkpoint(weights, config="r51", vocabulary=network.vocabulary)


def test_published_models_are_downloaded_by_name_and_fused_as_published(run, network, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(
        artifacts, "download", lambda name: (asked.append(name), run / "model_final.pth")[1]
    )
    monkeypatch.setattr("proxydet.models.published_vocabulary", lambda _: network.vocabulary)
    settings = PUBLISHED_MODELS["proxydet-r50"]
    small = dataclasses.replace(settings, model=get_recipe("tiny").model)
    monkeypatch.setitem(PUBLISHED_MODELS, "proxydet-r50", small)
    opened = Detector.from_pretrained("proxydet-r50", device="cpu")
    assert asked == ["proxydet-r50", "lvis-metadata"]
    assert (opened.inference.alpha, opened.inference.beta) == (0.35, 0.55)
    with pytest.raises(InputError, match="proxydet-r51"):
        Detector.from_pretrained("proxydet-r51")


def test_published_names_are_in_the_catalogue():
    from proxydet.artifacts import Catalogue

    assert Catalogue.load().resolve(list(PUBLISHED_MODELS))


def test_models_without_a_mixup_branch_are_opened_as_such():
    for name, settings in PUBLISHED_MODELS.items():
        assert settings.model.mixup_branch == name.startswith("proxydet")


def test_the_command_line_never_downloads(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PROXYDET_MODELS", str(tmp_path / "none"))
    nothing: dict = {"run": None, "weights": None, "config": None}
    with pytest.raises(ArtifactError) as caught:
        open_named(find_detector(**nothing))
    assert "proxydet download proxydet-r50-inl" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="--config swinb"):  # which would change nothing
        find_detector(**{**nothing, "config": "swinb"})
    opened = open_named(find_detector(**{**nothing, "run": run}))
    assert opened.inference.beta == 0.6
    with pytest.raises(ConfigError, match="own configuration"):
        find_detector(**{**nothing, "run": run, "config": "r50"})


def test_a_runs_checkpoint_is_opened_as_that_runs(run, network):
    step = save(network, run / "checkpoints" / "step_0000009.pth")
    for weights in (run / "model_final.pth", step):
        for config in (None, str(run / "config.yaml")):
            opened = open_named(
                find_detector(run=None, weights=str(weights), config=config), device="cpu"
            )
            assert opened.vocabulary == network.vocabulary
            assert opened.inference.alpha == 0.2
            assert isinstance(opened.encoder, CompositionalEncoder)


def test_weights_that_are_neither_file_nor_model(tmp_path):
    for name, said in (("proxydet-r50-in", "Did you mean 'proxydet-r50"), ("a.pth", "Models: ")):
        with pytest.raises(InputError, match="neither a weight file nor a published") as caught:
            find_detector(run=None, weights=name, config=None)
        assert said in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "opener"), [("x.onnx", "OnnxDetector"), ("x.PT2", "torch.export.load")]
)
def test_an_export_is_not_a_checkpoint(run, tmp_path, name, opener):
    (path := tmp_path / name).write_bytes(b"exported")
    for of in (None, run):
        with pytest.raises(InputError, match=re.escape(name)) as caught:
            find_detector(run=of, weights=str(path), config=None)
        assert opener in str(caught.value.hint)


def test_weights_that_are_a_folder_or_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path, tmp_path / "pipe.pth"):
        with pytest.raises(InputError, match="is not a file"):
            open_named(find_detector(run=None, weights=str(path), config=None), device="cpu")
