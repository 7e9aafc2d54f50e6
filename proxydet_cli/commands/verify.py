"""``proxydet verify``: prove that training repeats itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from proxydet_cli.options import Json, command_app, examples
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.runtime.determinism import DeterminismReport, ModeResult

app = command_app(help="Prove claims by running them.")


@app.callback()
def _subcommands() -> None:
    """Prove claims by running them."""


@app.command(
    epilog=examples(
        "proxydet verify determinism",
        "proxydet verify determinism --device cuda --recipe r50 --repetitions 50",
        "proxydet verify determinism --mode strict --json",
    )
)
def determinism(
    recipe: Annotated[str, typer.Option("--recipe", help="What is trained.")] = "tiny",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of it: key=value.")
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option("--mode", help="off, published or strict; may be repeated; default all."),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option("--device", help="Where the steps run.")
    ] = "cpu",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of a repetition.")] = 2,
    repetitions: Annotated[
        int, typer.Option("--repetitions", min=1, help="Repetitions in each of two processes.")
    ] = 2,
    json: Json = False,
) -> None:
    """Repeat training steps and compare losses, gradients and weights bit by bit, in each mode.

    Runs the steps of a recipe on batches of noise of its sizes, in two fresh processes a mode. Reports whether all
    repetitions are identical, where the first difference is, and what each mode costs. Exit code 5 where mode
    `strict` does not repeat itself.
    """
    from proxydet.recipes import resolve_config
    from proxydet.runtime.determinism import verify_determinism
    from proxydet.runtime.modes import MODES
    from proxydet_cli.progress import show_progress

    if unknown := sorted(set(mode or ()) - set(MODES)):
        known = ", ".join(MODES)
        raise typer.BadParameter(f"{unknown[0]} is not one of {known}", param_hint="--mode")
    report = verify_determinism(
        resolve_config(recipe, overrides=set_ or ()),
        modes=[known for known in MODES if not mode or known in mode],
        device=device,
        steps=steps,
        repetitions=repetitions,
        progress=show_progress(),
    )
    Output(json=json).data(report, _text(report))
    if any(result.mode == "strict" and not result.identical for result in report.modes):
        raise typer.Exit(5)


def _text(report: DeterminismReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"recipe {report.recipe} on {report.device}; {versions}",
        f"{report.steps} steps, {report.modes[0].repetitions} times in {report.processes} processes",
        "",
        f"{'mode':<10} {'identical':<10} {'differing elements':<24} {'s/step':>8} {'CPU s':>8} {'MiB':>8}",
    ]
    on_cpu = report.device == "cpu"
    lines += [_row(result, report.modes[0], on_cpu=on_cpu) for result in report.modes]
    for result in report.modes:
        part = result.first_difference
        if part is not None:
            lines.append(
                f"{result.mode}: {result.differing_repetitions} repetitions differ; the first (process "
                f"{part.process}, repetition {part.repetition}) in step {part.step}, {part.where}"
            )
    return "\n".join(lines)


def _row(result: ModeResult, base: ModeResult, *, on_cpu: bool) -> str:
    differing = f"{result.differing_elements} of {result.gradient_elements}"
    cells = f"{result.mode:<10} {'yes' if result.identical else 'NO':<10} {differing:<24}"
    cells += f" {result.step_seconds:8.3f} {result.step_cpu_seconds:8.3f} {result.memory_mib:8.0f}"
    if result is base:
        return cells
    # Other work on the machine lengthens steps on a CPU, but hardly the processor time that they take.
    name = "step_cpu_seconds" if on_cpu else "step_seconds"
    time = getattr(result, name) / getattr(base, name)
    memory = result.memory_mib / max(base.memory_mib, 1e-9)
    what = "processor time" if on_cpu else "time"
    return f"{cells}   {time:.2f} x the {what} and {memory:.2f} x the memory of {base.mode}"
