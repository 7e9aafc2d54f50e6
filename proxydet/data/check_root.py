"""Looking at a whole data root: every data set described in it, and those that are not prepared yet."""

from __future__ import annotations

from pathlib import Path

from proxydet.data.advice import inner_root
from proxydet.data.check import CheckReport, Finding, Level, check_dataset
from proxydet.data.description import DatasetDescription
from proxydet.errors import DataError, InputError
from proxydet.reporting import SILENT, Progress
from proxydet.wording import counted

_SOURCES = {
    "lvis": ("lvis.toml", "lvis/lvis_v1_train.json"),
    "coco": ("coco.toml", "coco/annotations/instances_train2017.json"),
    "objects365": ("objects365.toml", "objects365/annotations/zhiyuan_objv2_val.json"),
    "openimages": (
        "openimages.toml",
        "oid/annotations/challenge-2019-validation-detection-bbox.csv",
    ),
}
"""Description and first source file of each data set that ``data prepare`` knows."""


def check_root(
    root: Path, *, decode: bool = False, cache: Path | None = None, progress: Progress = SILENT
) -> list[CheckReport]:
    """Check every data set that a data root describes.

    Args:
        root: The folder.
        decode: As `check_dataset`.
        cache: As `check_dataset`.
        progress: As `check_dataset`.

    Returns:
        One report on the root itself, then one for each description (``*.toml``) in it.

    Raises:
        DataError: there is no such folder.
    """
    if root.is_file():
        raise DataError(
            f"{root} is neither a data root (a folder) nor a data description (.toml)",
            hint="name one of these; docs/how-to/own-data.md shows how to describe annotations of your own",
            path=root,
        )
    if not root.is_dir():
        raise DataError(
            f"there is no data root {root}",
            hint="name one, or set PROXYDET_DATASETS; proxydet download fills it",
            path=root,
        )
    paths = sorted(root.glob("*.toml"))
    reports = [CheckReport(name=str(root), findings=tuple(_unprepared(root, paths)))]
    for path in paths:
        try:
            description = DatasetDescription.from_toml(path)
        except InputError as error:
            broken = _finding("description", "error", error.message, error.hint or "")
            reports.append(CheckReport(name=path.stem, findings=(broken,)))
            continue
        reports.append(check_dataset(description, decode=decode, cache=cache, progress=progress))
    return reports


def _unprepared(root: Path, described: list[Path]) -> list[Finding]:
    findings = []
    for name, (description, source) in _SOURCES.items():
        if (root / source).exists() and not (root / description).exists():
            text = f"{source} is there, but {name} is not prepared"
            findings.append(_finding("root", "warning", text, f"run: proxydet data prepare {name}"))
    tars = root / "imagenet/ImageNet-21K"
    lvis = root / "lvis.toml"
    if tars.is_dir() and lvis.exists() and "[image_labels]" not in lvis.read_text("utf-8"):
        text = f"{tars.relative_to(root)} is there, but lvis.toml does not use it"
        findings.append(
            _finding("root", "warning", text, "run: proxydet data prepare imagenet-lvis")
        )
    if not described and not findings:
        advice = (
            inner_root(root)
            or "run: proxydet download lvis coco metadata; then: proxydet data prepare lvis"
        )
        findings.append(_finding("root", "error", "there is no data set in it", advice))
    count = len(described)
    if count:
        text = f"{counted(count, 'data set')} described"
        findings.append(_finding("root", "ok", text, ""))
    return findings


def _finding(part: str, level: Level, text: str, advice: str) -> Finding:
    return Finding(part=part, level=level, text=text, advice=advice)
