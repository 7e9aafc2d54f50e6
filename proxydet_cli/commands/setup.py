"""``proxydet setup``: a working detectron2, and proof that it works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxydet_cli.options import DryRun, Json, command_app, examples

if TYPE_CHECKING:
    from proxydet.compat.install import SetupReport

app = command_app()


@app.command(epilog=examples("proxydet setup", "proxydet setup --dry-run", "proxydet setup --json"))
def setup(json: Json = False, dry_run: DryRun = False) -> None:
    """Make a working detectron2 where none is, then check the environment.

    Installs detectron2 0.6 as pure Python from the package index: no compiler, checked by hash, nothing else in
    the environment changes. A detectron2 that is installed already is used as it is and never replaced. Running
    it again does no harm.
    """
    from proxydet.compat.install import set_up
    from proxydet_cli.output import Output
    from proxydet_cli.progress import show_progress

    report = set_up(dry_run=dry_run, progress=show_progress())
    Output(json=json).data(report, _describe(report))


def _describe(report: SetupReport) -> str:
    libraries = f"torch {report.torch} and torchvision {report.torchvision} work together"
    if report.action == "would install":
        return f"{libraries}\nwould install detectron2 {report.detectron2}, pure Python, for {report.python}"
    done = {"found": "found and left as it is", "installed": "installed"}[report.action]
    operators = {
        "compiled": "its compiled operators load",
        "absent": "without compiled operators, which ProxyDet does not need",
        "broken": "its compiled operators do not load; ProxyDet does not need them",
    }[report.operators or "absent"]
    return (
        f"{libraries}\ndetectron2 {report.detectron2} {done}: {report.folder}\n"
        f"checked: RoIAlign, boxes and a feature pyramid with its gradient; {operators}"
    )
