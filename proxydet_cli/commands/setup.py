"""``proxydet setup``: installs detectron2 if it is missing, and checks that it works."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from proxydet_cli.options import DryRun, Json, command_app, examples
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.runtime.report import Field
    from proxydet.runtime.setup import SetupReport

app = command_app()

_DONE = {"found": "found and left unchanged", "installed": "installed"}
_OPERATORS = {
    "compiled": "its compiled operators load",
    "absent": "without compiled operators, which ProxyDet does not need",
    "broken": "its compiled operators do not load; ProxyDet does not need them",
}


@app.command(epilog=examples("proxydet setup", "proxydet setup --dry-run", "proxydet setup --json"))
def setup(json: Json = False, dry_run: DryRun = False) -> None:
    """Install detectron2 if missing and check the environment.

    Installs detectron2 0.6 as pure Python from the package index: no compiler, checked by hash, nothing else in
    the environment changes. A detectron2 that is installed already is used as it is and never replaced. Running
    it again does no harm. Exit code 5 where something in the environment will fail; proxydet env prints details.
    """
    from proxydet.runtime.report import environment
    from proxydet.runtime.setup import set_up
    from proxydet_cli.progress import show_progress

    progress = show_progress()
    report = set_up(dry_run=dry_run, progress=progress)
    failures: tuple[Field, ...] = ()
    if not dry_run:
        with progress.task("checking the environment"):
            failures = environment().failures
    reasons = {field.label: field.reason for field in failures}
    Output(json=json).data({**asdict(report), "failures": reasons}, _describe(report, reasons))
    if failures:
        raise typer.Exit(5)


def _describe(report: SetupReport, reasons: dict[str, str]) -> str:
    lines = [f"torch {report.torch} and torchvision {report.torchvision} work together"]
    if report.action == "would install":
        lines.append(
            f"would install detectron2 {report.detectron2}, pure Python, for {report.python}"
        )
    else:
        lines.append(f"detectron2 {report.detectron2} {_DONE[report.action]}: {report.folder}")
        operators = _OPERATORS[report.operators or "absent"]
        lines.append(f"checked: RoIAlign, boxes, a feature pyramid with its gradient; {operators}")
    lines += [f"will fail: {label}: {reason}" for label, reason in reasons.items()]
    return "\n".join(lines)
