"""``proxydet env``: the environment, next to that of the published results; two runs compared."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.options import Json, command_app, examples
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.runtime.report import EnvironmentReport
    from proxydet.runtime.run_comparison import RunComparison

app = command_app()

_WIDTH = 100
_INDENT = 26


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
        bool, typer.Option("--markdown", help="Print a block to paste into an issue.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Print only what will fail; exit code 5 if there is any."),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not import torch.")] = False,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--diff", help="Report instead what differs between two run folders."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder whose disk is measured.")
    ] = None,
) -> None:
    """Report the environment, and what its differences from the published training mean.

    Each field has a verdict: same, harmless, may change results, will fail. It works with torch, detectron2 or
    GPU drivers missing or broken, and reports them.
    """
    if diff is not None:
        if markdown or check or quick or data_root is not None:
            raise typer.BadParameter("it can be combined with --json only", param_hint="--diff")
        from proxydet.runtime.run_comparison import compare_runs

        found = compare_runs(*diff)
        Output(json=json).data(found, _comparison_text(found))
        return
    if check and markdown:
        raise typer.BadParameter("it cannot be combined with --check", param_hint="--markdown")
    from proxydet.runtime.report import environment

    report = environment(quick=quick, data_root=data_root)
    if check:
        failures = (f"{field.label}: {field.shown}: {field.reason}" for field in report.failures)
        text = "\n".join(failures) or "nothing will fail"
    else:
        text = report.to_markdown() if markdown else _report_text(report)
    Output(json=json).data(report.to_dict(), text)
    if check and report.failures:
        raise typer.Exit(5)


def _report_text(report: EnvironmentReport) -> str:
    """One line a field, and below it how it differs from the published training."""
    lines = []
    for section, fields in report.sections().items():
        lines += ["", section, "-" * len(section)]
        for field in fields:
            value = field.shown
            if "\n" in value:
                lines += [field.label, textwrap.indent(value, "    ")]
                continue
            lines += _wrapped(f"{field.label:<{_INDENT - 2}}  ", value)
            if field.verdict not in {"same", "not judged"}:
                there = f"published {field.published}: " if field.published else ""
                lines += _wrapped(" " * _INDENT, f"{there}{field.verdict}: {field.reason}")
    verdicts = [field.verdict for field in report.fields]
    counts = [
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in ("will fail", "may change results", "harmless", "same")
        if verdict in verdicts
    ]
    lines += ["", f"Compared with the published training: {', '.join(counts)}."]
    return "\n".join(lines[1:])


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * (_INDENT + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _comparison_text(found: RunComparison) -> str:
    """The likeliest causes first, with both values; at most twenty."""
    lines = []
    for difference in found.differences[:20]:
        lines.append(f"{difference.suspicion}: {difference.key} ({difference.reason})")
        for value in (difference.first, difference.second):
            lines.append(textwrap.shorten(f"    {value}", _WIDTH, initial_indent="    "))
    hidden = len(found.differences) - 20
    if hidden > 0:
        lines.append(f"and {hidden} more, none of them likelier (--json lists all)")
    if not found.differences:
        lines.append("No recorded difference.")
    return "\n".join([*lines, "", found.conclusion])
