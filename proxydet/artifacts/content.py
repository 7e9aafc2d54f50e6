"""What a file without a published digest must hold, so that at least its kind is known to be right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from proxydet.artifacts.artifact import Artifact, Content
from proxydet.artifacts.checkpoint_index import read_tensor_index
from proxydet.artifacts.tar_reader import TarReader
from proxydet.artifacts.untar import open_tar
from proxydet.errors import ArchiveError, CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor of a model, by name."""

_MAY_BE_MISSING = (
    ".freq_weight",
    ".zs_weight",
    ".num_batches_tracked",
    ".relative_position_index",
    ".base.fc.weight",
    ".base.fc.bias",
)  # made anew from the vocabulary or the sizes, or not used
_IMAGES = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True)
class ContentCheck:
    """A look at what a file holds."""

    run: Callable[[Path], str]
    """Raises `ProxydetError` if a file is not what it should be; says what it holds."""
    sees_all: bool
    """Whether any changed byte would be noticed, because the format carries check sums."""


def content_check(artifact: Artifact) -> ContentCheck | None:
    """Return the check for an artifact without a published digest; None where nothing is known to check."""
    content = artifact.content
    if content is None:
        if artifact.unpack is None or artifact.file_name.endswith(".zip"):
            return None
        return ContentCheck(_check_tar, sees_all=artifact.file_name.endswith(("gz", "tgz")))
    if content.kind == "image-tar":
        return ContentCheck(_check_image_tar, sees_all=False)
    return ContentCheck(lambda path: _check_tensors(path, content), sees_all=True)


def expected_tensors(layout: str, *, mixup_branch: bool) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a published model.

    Args:
        layout: ``"r50"`` or ``"swinb"``.
        mixup_branch: Whether to include the mixup branch, which BoxSup and Detic do not have.
    """
    text = (
        resources.files("proxydet.artifacts.layouts").joinpath(f"{layout}.txt").read_text("ascii")
    )
    found = {}
    for line in text.splitlines():
        name, shape, *marks = line.split()
        if mixup_branch or not marks:
            found[name] = tuple(int(length) for length in shape.split("x")) if shape != "-" else ()
    return found


def verify_checkpoint(
    path: Path, expected: Shapes | Callable[[], Shapes], *, any_shape: tuple[str, ...] = ()
) -> str:
    """Check that a checkpoint has the tensors of a model.

    Args:
        path: The checkpoint.
        expected: The model's tensors, or a function that gives them.
        any_shape: Last name parts of tensors that may have another shape.

    Returns:
        What it holds, in a few words.

    Raises:
        CheckpointError: It cannot be read, lacks tensors of the model, or has them in other shapes. Tensors beyond
            those expected are no error.
    """
    wanted = expected() if callable(expected) else expected
    found = read_tensor_index(path)
    missing = [name for name in wanted if name not in found and not name.endswith(_MAY_BE_MISSING)]
    if missing:
        raise CheckpointError(
            f"{path.name} lacks {len(missing)} of the {len(wanted)} tensors of the model, such as {missing[0]}.",
            hint="It is a checkpoint of another model.",
            path=path,
        )
    other = [
        name
        for name, shape in wanted.items()
        if name in found and found[name] != shape and name.rpartition(".")[2] not in any_shape
    ]
    if other:
        raise CheckpointError(
            f"{path.name} has {len(other)} tensors of other shapes than the model: {other[0]} is "
            f"{found[other[0]]}, not {wanted[other[0]]}.",
            hint="It is a checkpoint of another model.",
            path=path,
        )
    extra = len(found) - sum(name in found for name in wanted)
    return f"{len(found)} tensors" + (f", {extra} of them beyond the model's" if extra else "")


def _check_tensors(path: Path, content: Content) -> str:
    if content.layout is None:
        return f"{len(read_tensor_index(path))} tensors"
    expected = expected_tensors(content.layout, mixup_branch=content.mixup_branch)
    return verify_checkpoint(path, expected, any_shape=content.any_shape)


def _check_tar(path: Path) -> str:
    with open_tar(path) as file:
        reader = TarReader(file, path.name)
        count = sum(not member.folder for member in reader)
        reader.drain()
    if count == 0:
        raise ArchiveError(f"{path.name} holds no files.", path=path)
    return f"{count} files"


def _check_image_tar(path: Path) -> str:
    with open_tar(path) as file:
        names = [member.name for member in TarReader(file, path.name) if not member.folder]
    if not names or not all(name.lower().endswith(_IMAGES) for name in names):
        raise ArchiveError(f"{path.name} should hold images and nothing else.", path=path)
    return f"{len(names)} images"
