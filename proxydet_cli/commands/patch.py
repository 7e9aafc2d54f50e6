"""``proxydet patch``: the published RoIAlign change in the installed detectron2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from proxydet_cli.options import DryRun, Json, command_app, examples
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.runtime.patch import PatchChange, PatchStatus
    from proxydet.runtime.roi_verify import RoiAlignReport

app = command_app(
    help="Apply, revert and verify the published RoIAlign change in the installed detectron2. Training needs no edit: "
    "its reproducibility mode `published` makes the change at run time."
)

Detectron2 = Annotated[
    Path | None,
    typer.Option(
        "--detectron2", help="The folder of a detectron2 package; by default, the one in use."
    ),
]


@app.command(epilog=examples("proxydet patch status", "proxydet patch status --json"))
def status(json: Json = False, detectron2: Detectron2 = None) -> None:
    """Report whether the change is present, by reading the file; changes nothing."""
    from proxydet.runtime.patch import patch_status

    found = patch_status(_file(detectron2))
    Output(json=json).data(found, _status_text(found))


@app.command(epilog=examples("proxydet patch apply --dry-run", "proxydet patch apply"))
def apply(json: Json = False, dry_run: DryRun = False, detectron2: Detectron2 = None) -> None:
    """Write the change into detectron2's layers/roi_align.py, keeping the original next to it."""
    from proxydet.runtime.patch import apply_patch

    change = apply_patch(_file(detectron2), dry_run=dry_run)
    Output(json=json).data(change, _change_text(change))


@app.command(epilog=examples("proxydet patch revert --dry-run", "proxydet patch revert"))
def revert(json: Json = False, dry_run: DryRun = False, detectron2: Detectron2 = None) -> None:
    """Restore the original file, byte for byte."""
    from proxydet.runtime.patch import revert_patch

    change = revert_patch(_file(detectron2), dry_run=dry_run)
    Output(json=json).data(change, _change_text(change))


@app.command(epilog=examples("proxydet patch verify", "proxydet patch verify --device cpu"))
def verify(
    json: Json = False,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option("--device", help="Where it runs; by default a GPU if there is one."),
    ] = None,
    detectron2: Detectron2 = None,
) -> None:
    """Find out which RoIAlign detectron2 runs: in a fresh interpreter, against an independent computation.

    Exit code 0 where the published change is active, 5 where it is not or where the operator is altered.
    """
    import sys

    from proxydet.runtime.roi_verify import verify_roi_align

    search = None if detectron2 is None else [str(detectron2.resolve().parent), *sys.path]
    report = verify_roi_align(device=device, search_path=search)
    Output(json=json).data(report, _report_text(report))
    if report.verdict != "active":
        raise typer.Exit(5)


def _file(detectron2: Path | None) -> Path:
    from proxydet.runtime.patch import file_in_use

    return file_in_use() if detectron2 is None else detectron2 / "layers" / "roi_align.py"


def _status_text(found: PatchStatus) -> str:
    lines = [f"{found.state}: {found.reason}", f"file: {found.file}"]
    if found.digest:
        lines.append(f"sha256: {found.digest}")
    if found.record:
        lines.append(
            f"applied by proxydet {found.record.proxydet} at {found.record.applied_at}; "
            f"original sha256: {found.record.before}"
        )
    if not found.writable and found.state != "missing":
        lines.append(f"cannot be changed by this user: {found.obstacle}")
    lines += [f"stale compiled file: {path}" for path in found.stale_bytecode]
    lines += [f"note: {text}" for text in found.notes]
    return "\n".join([*lines, *(["", found.diff] if found.diff else [])])


def _change_text(change: PatchChange) -> str:
    verb = {"apply": "applied", "revert": "reverted"}[change.action]
    if not change.changed:
        lines = [f"nothing to do: already {verb} in {change.file}"]
    elif change.dry_run:
        lines = [f"would {change.action} the published change in {change.file}:", "", change.diff]
    else:
        lines = [f"{verb} the published change in {change.file}", "", change.diff]
        lines += ["", f"sha256 before: {change.before}", f"sha256 after:  {change.after}"]
    lines += [f"deleted compiled file: {path}" for path in change.removed_bytecode]
    return "\n".join(lines)


def _report_text(report: RoiAlignReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"{report.verdict}: {report.file} ({report.file_state})",
        f"{report.device}; {versions}",
    ]
    lines.append("largest differences       values     gradient")
    for name in ("published", "plain"):
        values, gradient = (report.figures[f"{w}_from_{name}"] for w in ("values", "gradient"))
        lines.append(f"  from the {name:<12} {values:9.2e}    {gradient:9.2e}")
    lines.append(f"  between the two       {report.between_the_two:9.2e}")
    if report.repeats:
        lines.append(
            "{differing} of {elements} gradient elements differ over {times} backward passes".format(
                **report.repeats
            )
        )
    return "\n".join([*lines, *(f"note: {text}" for text in report.notes)])
