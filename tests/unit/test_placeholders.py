"""Git LFS pointers and web pages in place of files: each reader names them, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from proxydet.artifacts import (
    Artifact,
    Catalogue,
    CatalogueFile,
    Downloader,
    DownloadOptions,
    Provided,
    Unpack,
)
from proxydet.config import load_mapping
from proxydet.data.dataset import DatasetConfig
from proxydet.data.formats.coco import read_outline
from proxydet.data.images import read_image
from proxydet.errors import ProxydetError
from proxydet.files import read_json
from proxydet.vocabulary.names import read_names
from proxydet.vocabulary.vocabulary import Vocabulary, load_embeddings
from proxydet.weight_files import check_seal, read_content, read_shapes, read_state_dict

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 12345\n" % (b"4d" * 32)
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE HTML><html><title>Sign in</title></html>"


def unpack(path: Path) -> None:
    """Unpack an archive that somebody placed where the catalogue expects it."""
    thing = Artifact(
        name="thing",
        title="a thing",
        addresses=("https://example.org/thing",),
        target=f"models/{path.name}",
        licence="none",
        unpack=Unpack(folder="datasets", provides=(Provided(path="inside"),)),
    )
    catalogue = Catalogue([("test", CatalogueFile(artifacts=(thing,)))])
    path.rename((path.parent / "models").mkdir() or path.parent / "models" / path.name)
    with Downloader(catalogue, DownloadOptions(root=path.parent)) as downloader:
        downloader.fetch(downloader.plan(["thing"])).raise_for_failures()


READERS: dict[str, Callable[[Path], object]] = {
    "weights.pth": read_state_dict,
    "weights.pkl": read_shapes,
    "weights.safetensors": read_state_dict,
    "step_0000001.pth": read_content,
    "vocabulary.npz": Vocabulary.load,
    "table.npy": load_embeddings,
    "detector.onnx": lambda path: check_seal(path, b"mark", hint=""),
    "photo.jpg": read_image,
    "instances.json": read_outline,
    "names.txt": read_names,
    "dataset.toml": DatasetConfig.from_toml,
    "config.yaml": load_mapping,
    "manifest.json": read_json,
    "archive.zip": unpack,
    "archive.tar.gz": unpack,
    "archive.tar": unpack,
}


@pytest.mark.parametrize(
    ("content", "words"), [(POINTER, "Git LFS"), (PAGE, "web page")], ids=["LFS", "HTML"]
)
@pytest.mark.parametrize("name", READERS)
def test_named_with_what_to_do(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ProxydetError, match=words) as caught:
        READERS[name](path)
    assert name in caught.value.message
    advice = f"{caught.value.message} {caught.value.hint}"
    remedy = "git lfs pull" if content == POINTER else "download it again"
    # An archive that was placed by hand is fetched again by the same command.
    assert ("--force" if READERS[name] is unpack else remedy) in advice
