"""What a file without a published digest must hold, so that at least its kind is known to be right.

A checkpoint is inspected without torch and without running it; see `proxydet.weight_files`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from proxydet.artifacts.archives import Tar
from proxydet.artifacts.catalogue import Artifact, Content
from proxydet.errors import ArchiveError, CheckpointError

_MAY_BE_MISSING = (
    ".freq_weight",
    ".zs_weight",
    ".num_batches_tracked",
    ".relative_position_index",
    ".base.fc.weight",
    ".base.fc.bias",
)  # made again from the vocabulary or the sizes, or not used
_IMAGES = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True)
class ContentCheck:
    """Inspects what a file holds."""

    run: Callable[[Path], str]
    """Raises `ProxydetError` if a file is not what it should be; returns what it holds, in a few words."""
    sees_all: bool
    """Whether any changed byte would be noticed, because the format carries check sums."""


def content_check(artifact: Artifact) -> ContentCheck | None:
    """Return the check for an artifact without a published digest; None where nothing is known to check."""
    content = artifact.content
    if content is not None and content.kind != "image-tar":
        return ContentCheck(lambda path: _check_checkpoint(path, content), sees_all=True)
    if content is not None:
        return ContentCheck(lambda path: _check_tar(path, images=True), sees_all=False)
    if artifact.unpack is None or artifact.file_name.endswith(".zip"):
        return None
    compressed = artifact.file_name.endswith(("gz", "tgz"))
    return ContentCheck(lambda path: _check_tar(path, images=False), sees_all=compressed)


def _check_tar(path: Path, *, images: bool) -> str:
    with Tar(path) as archive:
        names = [member.name for member in archive if not member.isdir()]
    if images and not all(name.lower().endswith(_IMAGES) for name in names):
        raise ArchiveError(f"{path.name} should hold images and nothing else.", path=path)
    if not names:
        raise ArchiveError(f"{path.name} holds no {'images' if images else 'files'}.", path=path)
    return f"{len(names)} {'images' if images else 'files'}"


def _check_checkpoint(path: Path, content: Content) -> str:
    from proxydet.weight_files import read_shapes  # numpy takes a fifth of a second

    found = read_shapes(path)
    if content.layout is None:
        return f"{len(found)} tensors" if len(found) > 1 else "1 tensor"
    model = _published_tensors(content.layout, mixup_branch=content.mixup_branch)
    hint = "It is a checkpoint of another model."
    missing = [name for name in model if name not in found and not name.endswith(_MAY_BE_MISSING)]
    if missing:
        message = f"{path.name} lacks {len(missing)} of the {len(model)} tensors of the model, such as {missing[0]}."
        raise CheckpointError(message, hint=hint, path=path)
    other = [
        name
        for name, shape in model.items()
        if found.get(name, shape) != shape and name.rpartition(".")[2] not in content.any_shape
    ]
    if other:
        raise CheckpointError(
            f"{path.name} has {len(other)} tensors of other shapes than the model: {other[0]} is "
            f"{found[other[0]]}, not {model[other[0]]}.",
            hint=hint,
            path=path,
        )
    extra = len(found) - sum(name in found for name in model)
    return f"{len(found)} tensors" + (f", {extra} of them beyond the model's" if extra else "")


def _published_tensors(layout: str, *, mixup_branch: bool) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors of a published model, with or without the mixup branch."""
    text = (
        resources.files("proxydet.artifacts.layouts").joinpath(f"{layout}.txt").read_text("ascii")
    )
    found = {}
    for line in text.splitlines():
        name, shape, *marks = line.split()
        if mixup_branch or not marks:
            found[name] = tuple(int(length) for length in shape.split("x")) if shape != "-" else ()
    return found
