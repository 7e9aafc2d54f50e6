"""Loads weights into a network, and says what of them did not fit.

A file may hold a whole detector (the published names), or a backbone trained for classification (torchvision's names for
ResNet, the Swin authors' names for Swin, timm's names for a timm model, or other names in the same order): its parameters are
then loaded as the detector's ``backbone.bottom_up``.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from proxydet.errors import CheckpointError
from proxydet.modeling.backbone import LevelBackbone
from proxydet.weight_files import CONTAINERS, WRAPPERS, read_state_dict

if TYPE_CHECKING:
    from proxydet.modeling.network import ProxyDetNetwork

logger = logging.getLogger(__name__)

MIXUP_BRANCH = ("roi_heads.box_head_cmm.", "roi_heads.box_predictor_cmm.")
"""For ``expect``: the mixup branch, which a BoxSup checkpoint does not hold."""
MASK_HEAD = "roi_heads.mask_head."
"""Start of the names of the mask head, which a detector of boxes does not have."""

# In published files, and without a use here.
_UNUSED = ("backbone.bottom_up.base.fc.*", "pixel_mean", "pixel_std")
_VOCABULARY = ("*.cls_score.zs_weight", "*.freq_weight")
# A class counts as the same when the cosine of both text embeddings is above this; float16 storage stays above it.
_SAME_TEXT = 0.999
_SHOWN = 5
_BACKBONE = ("backbone.bottom_up.base.", "backbone.bottom_up.")
_DEEPEST_PREFIX = 4
_COUNTER = ".num_batches_tracked"  # of BatchNorms; has no use here


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Which names of a weight file were loaded, and which were not.

    Attributes:
        loaded: How many parameters were loaded.
        missing: Expected to be absent from the file, and absent: they keep their fresh values.
        unexpected: Expected to be surplus in the file, and not loaded.
        mismatched: Expected to differ in shape, and not loaded.
        ignored: Not loaded: in published files and without a use here, the mask head where the network has none, or the
            file's own vocabulary where the network's is kept.
    """

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.loaded} parameters loaded"]
        labels = {"missing": "missing", "unexpected": "unexpected", "mismatched": "mismatched"}
        for field, label in {**labels, "ignored": "not used"}.items():
            names: tuple[str, ...] = getattr(self, field)
            if names:
                parts.append(f"{len(names)} {label} ({_shorten(names)})")
        return "; ".join(parts)


def load_weights(
    network: ProxyDetNetwork,
    path: Path,
    *,
    expect: Sequence[str] = (),
    vocabulary: Literal["check", "keep"] = "check",
) -> LoadReport:
    """Load a weight file; on any error, the network stays as it was.

    Args:
        network: Where to load it.
        path: Any file that `proxydet.weight_files.read_state_dict` reads.
        expect: Names that may be missing, surplus or of another shape: prefixes, or patterns with ``*``.
        vocabulary: ``"check"`` demands that the file was trained for the network's classes (for inference);
            ``"keep"`` keeps the network's own text embeddings and class frequencies whatever the file has (to start
            a training from weights of another vocabulary).

    Raises:
        CheckpointError: The file cannot be read safely, is damaged, or does not fit; the message names what.
    """
    path = Path(path)
    given = read_state_dict(path)
    own = network.state_dict()
    given, expect = _as_detector(network, given, own, tuple(expect))
    unused = _UNUSED if network.has_mask_head else (*_UNUSED, MASK_HEAD)
    ignored = {name for name in given if _matches(name, unused) and name not in own}
    if vocabulary == "keep":
        ignored |= {name for name in {*given, *own} if _matches(name, _VOCABULARY)}
    else:
        _check_vocabulary(network, given, path)
    names = {name for name in given if name not in ignored}
    wanted = {name for name in own if name not in ignored}
    report = LoadReport(
        loaded=sum(own[name].shape == given[name].shape for name in names & wanted),
        missing=tuple(sorted(wanted - names)),
        unexpected=tuple(sorted(names - wanted)),
        mismatched=tuple(
            sorted(name for name in names & wanted if own[name].shape != given[name].shape)
        ),
        ignored=tuple(sorted(ignored & set(given))),
    )
    _demand_explained(report, expect, own, given, path)
    fitting = {name: given[name] for name in names & wanted if name not in report.mismatched}
    _check_finite(fitting, path)
    network.load_state_dict(fitting, strict=False)
    return report


def _as_detector(
    network: ProxyDetNetwork,
    given: dict[str, Tensor],
    own: dict[str, Tensor],
    expect: tuple[str, ...],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename a classification backbone's parameters; a detector's stay as they are.

    Returns:
        The parameters, and ``expect`` with what classification has no use for, and what only classification needs.
    """
    if any(name.startswith(("backbone.", "roi_heads.")) for name in given):
        return given, expect
    fresh = ("backbone.fpn_*", "backbone.top_block.*", "backbone.bottom_up.norm?.*")
    elsewhere = ("proposal_generator.*", "roi_heads.*")
    if isinstance(network.backbone.bottom_up, LevelBackbone):
        prefix = _BACKBONE[0]
        targets = _names_in_base(network.backbone.bottom_up.base.state_dict(), given)
        if not targets:
            return given, expect
        surplus = tuple(prefix + name for name in given if name not in targets)
        renamed = {prefix + targets.get(name, name): value for name, value in given.items()}
        return renamed, (*expect, *surplus, f"{prefix}*{_COUNTER}", *fresh, *elsewhere)
    for prefix in _BACKBONE:
        renamed = {prefix + name: value for name, value in given.items()}
        if 2 * len(renamed.keys() & own.keys()) < len(renamed):
            continue
        patterns = ("fc.*", "head.*", "norm.*", "layers.*.attn_mask")
        outside = (f"{prefix}{pattern}" for pattern in patterns)
        return renamed, (*expect, *outside, *fresh, *elsewhere)
    return given, expect


def _names_in_base(own: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, str]:
    """Return a network's name of each of a file's parameters; empty where the file is of another network.

    The names are the same but for what timm puts where it cuts a network into stages (``stages_0`` for ``stages.0``). Or the
    file has other names, and each of the network's parameters has its shape and the end of its name (``weight``, ``bias``,
    ``running_mean``) at the same place in the file.
    """
    flat = {name.replace(".", "_"): name for name in own}
    found = {
        name: target
        for name in given
        if (target := flat.get(key := name.replace(".", "_"), flat.get(f"model_{key}")))
    }
    if 2 * len(found) >= len(own):
        return found

    def in_order(tensors: dict[str, Tensor]) -> list[tuple[str, tuple[str, torch.Size]]]:
        return [
            (name, (name.rpartition(".")[2], value.shape))
            for name, value in tensors.items()
            if not name.endswith(_COUNTER)
        ]

    theirs, ours = in_order(given), in_order(own)
    if not ours or [kind for _, kind in theirs[: len(ours)]] != [kind for _, kind in ours]:
        return {}
    logger.warning(
        "the names of the weights are not the backbone's: its %d parameters are taken in the order of the file, which has the "
        "same shapes (%s for %s)",
        len(ours),
        theirs[0][0],
        ours[0][0],
    )
    return {name: target for (name, _), (target, _) in zip(theirs, ours, strict=False)}


def _check_vocabulary(network: ProxyDetNetwork, given: dict[str, Tensor], path: Path) -> None:
    text = given.get("roi_heads.box_predictor.0.cls_score.zs_weight")
    if text is None:
        return
    own = network.class_table().text_DC1
    if text.shape != own.shape:
        raise CheckpointError(
            f"{path} was trained for {text.shape[1] - 1} classes with embeddings of {text.shape[0]} dimensions, "
            f"the vocabulary has {own.shape[1] - 1} with {own.shape[0]}",
            hint="open it with the vocabulary that it was trained for, and give yours when predicting",
            path=path,
        )
    cosines = functional.cosine_similarity(text.to(own), own, dim=0)[:-1]
    different = (cosines < _SAME_TEXT).nonzero()[:, 0].tolist()
    if different:
        names = tuple(network.vocabulary.names[row] for row in different)
        raise CheckpointError(
            f"{path} was trained for other classes: {len(names)} of {len(cosines)} text embeddings differ "
            f"({_shorten(names)})",
            hint="open it with the vocabulary that it was trained for, and give yours when predicting",
            path=path,
        )


def _demand_explained(
    report: LoadReport,
    expect: tuple[str, ...],
    own: dict[str, Tensor],
    given: dict[str, Tensor],
    path: Path,
) -> None:
    problems = []
    for label in ("missing", "unexpected"):
        names = tuple(name for name in getattr(report, label) if not _matches(name, expect))
        if names:
            problems.append(f"{len(names)} {label} ({_shorten(names)})")
    shapes = tuple(
        f"{name}: {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in report.mismatched
        if not _matches(name, expect)
    )
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_shorten(shapes)})")
    if not problems:
        return
    prefixes = _prefixes(given, own)
    if prefixes:
        raise CheckpointError(
            f"{path} does not fit the model: its names begin with {' or '.join(map(repr, prefixes))}, which is neither a "
            "part of the model nor a container or wrapper that is known",
            hint=f"known are {', '.join((*CONTAINERS, *WRAPPERS, '_orig_mod.'))}; {_without_prefix(path, prefixes[0])}",
            path=path,
        )
    raise CheckpointError(
        f"{path} does not fit the model: {'; '.join(problems)}",
        hint=_advice(report, expect),
        path=path,
    )


def _prefixes(given: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Return what stands in front of the model's names in a file, where that is so of at least half of its names."""
    known = {*own, *(name.removeprefix(start) for name in own for start in _BACKBONE)}
    found = Counter[str]()
    for name in given:
        parts = name.split(".")
        for count in range(1, min(len(parts), _DEEPEST_PREFIX + 1)):
            if ".".join(parts[count:]) in known and name not in known:
                found[".".join(parts[:count]) + "."] += 1
                break
    if 2 * found.total() < len(given):
        return []
    return [prefix for prefix, count in found.items() if 2 * count > max(found.values())]


def _without_prefix(path: Path, prefix: str) -> str:
    """Return the advice, with a command, to write a weight file without a prefix of its names."""
    code = (
        "import sys, pathlib, torch; from proxydet.weight_files import read_state_dict; old, new, prefix = sys.argv[1:]; "
        "weights = read_state_dict(pathlib.Path(old)); "
        "torch.save({n[len(prefix):]: w for n, w in weights.items() if n.startswith(prefix)}, new)"
    )
    plain = path.with_name(f"{path.stem}_plain.pth")
    return (
        f"to strip it: python -c {shlex.quote(code)} {shlex.join([str(path), str(plain), prefix])}"
    )


def _advice(report: LoadReport, expect: tuple[str, ...]) -> str:
    unexplained = [name for name in report.missing if not _matches(name, expect)]
    if unexplained and all(name.startswith(MIXUP_BRANCH) for name in unexplained):
        return (
            "it has no mixup branch: use it to start a training, or set model.mixup_branch to false"
        )
    if unexplained and all(name.startswith(MASK_HEAD) for name in unexplained):
        return (
            "it has no mask head: it is a detector of boxes. Open it with its run's config.yaml, or set model.masks to null; "
            f"to train a new mask head from it, set training.ignore_in_weights to [{MASK_HEAD}]"
        )
    return "check that model.backbone and the sizes are those that it was trained with"


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    damaged = tuple(
        name
        for name, values in tensors.items()
        if values.is_floating_point() and not bool(torch.isfinite(values).all())
    )
    if damaged:
        raise CheckpointError(
            f"{path} holds values that are not finite: {_shorten(damaged)}",
            hint="the training that wrote it had diverged; take an earlier checkpoint",
            path=path,
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(
        fnmatchcase(name, pattern) if "*" in pattern or "?" in pattern else name.startswith(pattern)
        for pattern in patterns
    )


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def weights_digest(network: torch.nn.Module) -> str:
    """Return a SHA-256 over the names, types, shapes and values of a network's state, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
