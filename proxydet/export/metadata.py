"""What an exported file says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from proxydet.errors import InputError

REMEDY = (
    "copy it again, or make it again with: proxydet export (an ONNX file changed on purpose? remove proxydet_sha256 from "
    'its metadata_props, and "sealed" from the JSON under proxydet)'
)
"""What to do about a file that is not what was exported."""


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """Stored as JSON: in an ONNX file under the property ``proxydet``, in a torch program as the file ``proxydet.json``."""

    proxydet_version: str
    """Version that exported it."""
    torch_version: str
    """Version of torch that exported it."""
    backbone: str
    """``resnet`` or ``swin``."""
    weights_sha256: str
    """Digest of the weights that were exported: of names, shapes and values in the order of the names."""
    vocabulary_sha256: str | None
    """Digest of the vocabulary that was saved beside the file; None where none was."""
    embedding_dimension: int
    """Dimensions that text embeddings must have."""
    masks: bool
    """Whether it predicts masks; a detector without a mask head finds boxes only."""
    mixup_branch: bool
    """Whether the scores of two branches are fused."""
    alpha: float
    """Weight of the mixup branch for base classes."""
    beta: float
    """Weight of the mixup branch for novel classes."""
    nms_iou: float
    """Overlap above which the lower-scored of two detections of one class is dropped."""
    max_detections: int
    """Detections at most."""
    one_class_per_proposal: bool
    """Whether only the best class of each box is kept."""
    shortest: int
    """Pictures are scaled so that their shortest side has this many pixels,"""
    longest: int
    """but the longest at most this many."""
    sealed: bool
    """Whether the file's SHA-256 is at its end: absence means damage. Version 0.1 wrote none."""

    def to_text(self) -> str:
        """Return JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str | None, path: Path, *, sealed: bool) -> ExportMetadata:
        """Read what `to_text` wrote.

        Args:
            text: JSON; None where the file has none.
            path: The file that it comes from.
            sealed: Whether `proxydet.weight_files.check_seal` found a digest in it.

        Raises:
            InputError: There is none, or it is not complete; or the digest is absent that it announces.
        """
        hint = "make a file with: proxydet export"
        if text is None:
            raise InputError(f"{path} was not made by proxydet", hint=hint, path=path)
        try:
            # Version 0.1 always exported masks, and no digest.
            content = {"masks": True, "sealed": False, **json.loads(text)}
            metadata = msgspec.convert(content, cls)
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:
            raise InputError(
                f"{path} was made by another version of proxydet, or is damaged",
                hint=hint,
                path=path,
            ) from error
        if metadata.sealed and not sealed:
            raise InputError(
                f"{path} is damaged: its SHA-256 is not where proxydet export wrote it",
                hint=REMEDY,
                path=path,
            )
        return metadata
