"""``proxydet env``: what is there, next to what the published results were made with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxydet_cli.options import Json, command_app, examples

app = command_app()


@app.command(
    epilog=examples(
        "proxydet env",
        "proxydet env --markdown",
        "proxydet env --check --quick",
        "proxydet env --diff runs/first runs/second",
    )
)
def env(
    json: Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write a block to paste into an issue.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Write only what will fail; exit code 5 if there is any."),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not import torch.")] = False,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--diff", help="Say instead what differed between two run folders."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder whose disk is measured.")
    ] = None,
) -> None:
    """Report the environment, and what its differences from the published training mean.

    Each field has a verdict: same, harmless, may change results, will fail. It works with torch, detectron2 or
    GPU drivers missing or broken, and says so.
    """
    if diff is not None:
        if markdown or check or quick or data_root is not None:
            raise typer.BadParameter(
                "of the other options only --json goes with it", param_hint="--diff"
            )
        _show_diff(*diff, json=json)
        return
    if check and markdown:
        raise typer.BadParameter("give it or --check, not both", param_hint="--markdown")
    from proxydet.runtime.environment import environment
    from proxydet_cli import environment_text
    from proxydet_cli.output import Output

    report = environment(quick=quick, data_root=data_root)
    if check:
        text = environment_text.failures_text(report) or "nothing will fail"
    else:
        text = report.to_markdown() if markdown else environment_text.report_text(report)
    Output(json=json).data(report.to_dict(), text)
    if check and report.failures:
        raise typer.Exit(5)


def _show_diff(first: Path, second: Path, *, json: bool) -> None:
    from proxydet.runtime.run_comparison import compare_runs
    from proxydet_cli.environment_text import comparison_text
    from proxydet_cli.output import Output

    found = compare_runs(first, second)
    Output(json=json).data(found, comparison_text(found))
