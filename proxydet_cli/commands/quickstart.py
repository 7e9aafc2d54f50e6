"""``proxydet quickstart``: the whole job on a small data set drawn here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.options import Json, command_app, examples
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.quickstart import Comparison, QuickstartResult

app = command_app()

_EXAMPLES = examples(
    "proxydet quickstart",
    "proxydet quickstart --output runs/first --seed 3",
    "proxydet quickstart --compare",
)
_OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for data, run, predictions and report.")
]
_Seed = Annotated[int, typer.Option(help="Seed of the training, or the first of --compare.", min=0)]
_Compare = Annotated[
    bool, typer.Option("--compare", help="Train with and without mixup on the same seeds instead.")
]
_Seeds = Annotated[
    int | None, typer.Option(help="How many seeds --compare uses, at least 3. [default: 3]", min=3)
]


@app.command(epilog=_EXAMPLES)
def quickstart(
    output: _OutputFolder = Path("runs/quickstart"),
    seed: _Seed = 7,
    compare: _Compare = False,
    seeds: _Seeds = None,
    json: Json = False,
) -> None:
    """Do the whole job in minutes on a CPU, offline.

    Draws a small data set in LVIS format (colours, shapes and textures; some combinations are novel), trains
    ProxyDet on it with every part of the method on, evaluates base and novel classes, predicts with other words,
    and writes report.html. Run it again after a stop: it resumes.
    """
    from proxydet_cli.progress import show_progress

    if seeds is not None and not compare:
        raise typer.BadParameter("--seeds requires --compare")
    out, progress = Output(json=json), show_progress()
    if compare:
        from proxydet.quickstart import compare_mixup

        chosen = range(seed, seed + (seeds or 3))
        comparison = compare_mixup(output, seeds=list(chosen), progress=progress)
        out.data(comparison, _describe_comparison(comparison))
        return
    from proxydet.quickstart import run_quickstart

    result = run_quickstart(output, seed=seed, progress=progress)
    out.data(_as_data(result), _describe(result))


def _as_data(result: QuickstartResult) -> dict[str, object]:
    return {
        "report": result.folder.report,
        "run": result.folder.run.root,
        "evaluation": result.evaluation.to_dict(),
        "right_labels": {
            group: asdict(result.labels(novel=group == "novel")) for group in ("base", "novel")
        },
        "seconds": result.seconds,
    }


def _describe(result: QuickstartResult) -> str:
    lines = [f"{'masks, percent':16} {'AP':>6} {'AP50':>6} {'AP75':>6}"]
    for group in result.evaluation.main.groups:
        values = (group.ap, group.ap50, group.ap75)
        shown = " ".join("     -" if value is None else f"{100 * value:6.1f}" for value in values)
        lines.append(f"{group.name:16} {shown}")
    right = ", ".join(
        f"{result.labels(novel=group == 'novel').percent} of {group}" for group in ("base", "novel")
    )
    spent = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in result.seconds.items())
    return "\n".join(
        [
            *lines,
            f"correct labels   {right} objects",
            "",
            f"time    {sum(result.seconds.values()) / 60:.1f} min ({spent})",
            f"run     {result.folder.run.root}",
            f"report  {result.folder.report}",
        ]
    )


def _describe_comparison(comparison: Comparison) -> str:
    lines = [f"{'masks, percent':14} {'with':>6} {'without':>8} {'difference':>16}"]
    for measure in comparison.measures:
        means = [
            sum(values) / len(values) for values in (measure.with_mixup, measure.without_mixup)
        ]
        difference = f"{measure.difference:+.1f} ± {measure.spread:.1f}"
        lines.append(f"{measure.name:14} {means[0]:6.1f} {means[1]:8.1f} {difference:>16}")
    seeds = ", ".join(map(str, comparison.seeds))
    return "\n".join(
        [*lines, "", f"seeds   {seeds} (± standard deviation)", f"report  {comparison.report}"]
    )
