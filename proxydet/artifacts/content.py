"""What a file without a published digest must hold, so that at least its kind is known to be right.

A checkpoint is inspected without torch and without running it; see `proxydet.weight_files`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from proxydet.artifacts.archives import tar_files
from proxydet.artifacts.catalogue import Artifact, Content
from proxydet.errors import ArchiveError, CheckpointError
from proxydet.wording import counted

# Made again from the vocabulary or the sizes, or not used.
_MAY_BE_MISSING = (
    ".freq_weight",
    ".zs_weight",
    ".num_batches_tracked",
    ".relative_position_index",
    ".base.fc.weight",
    ".base.fc.bias",
)
_IMAGES = (".jpeg", ".jpg", ".png")


def sees_every_byte(artifact: Artifact) -> bool:
    """Return whether `check_content` would notice any changed byte, because the format carries check sums."""
    if artifact.content is not None:
        return artifact.content.kind not in ("image-tar", "training-log")
    return artifact.unpack is not None and artifact.file_name.endswith(("gz", "tgz"))


def check_content(artifact: Artifact, path: Path) -> str:
    """Return what a file holds, in a few words; empty where nothing is known to check.

    Raises:
        ProxydetError: It is not what the catalogue says.
    """
    content = artifact.content
    if content is not None and content.kind == "training-log":
        from proxydet.visualization.reference import read_reference

        return counted(len(read_reference(path)), "loss", "losses")
    if content is not None and content.kind != "image-tar":
        return _check_checkpoint(path, content)
    if content is None and (artifact.unpack is None or artifact.file_name.endswith(".zip")):
        return ""
    names = [member.name for member, *_ in tar_files(path)]
    what = "files" if content is None else "images"
    if content is not None and not all(name.lower().endswith(_IMAGES) for name in names):
        raise ArchiveError(f"{path.name} should hold images and nothing else.", path=path)
    if not names:
        raise ArchiveError(f"{path.name} contains no {what}.", path=path)
    return f"{len(names)} {what}"


def _check_checkpoint(path: Path, content: Content) -> str:
    from proxydet.weight_files import read_shapes  # numpy takes a fifth of a second

    found = read_shapes(path)
    if content.layout is None:
        return counted(len(found), "tensor")
    layouts = resources.files("proxydet.artifacts.layouts")
    model: dict[str, tuple[int, ...]] = {}
    for line in layouts.joinpath(f"{content.layout}.txt").read_text("ascii").splitlines():
        name, shape, *of_mixup_branch = line.split()
        if content.mixup_branch or not of_mixup_branch:
            model[name] = tuple(map(int, shape.split("x"))) if shape != "-" else ()
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
