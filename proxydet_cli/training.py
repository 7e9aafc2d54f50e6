"""What ``proxydet train`` does with its options: resolve, plan, launch or train, and say what to do next."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from proxydet.errors import ConfigError, InputError, Interrupted
from proxydet.paths import runs_folder
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.recipes import RunConfig
    from proxydet.training.launch import LaunchPlan
    from proxydet.training.runfolder import Resume
    from proxydet.training.train import TrainResult


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to train; every process of a run gets the same."""

    recipe: str | None
    data: Path | None
    config: Path | None
    overrides: tuple[str, ...]
    output: Path | None
    resume: str
    overwrite: bool
    weights: Path | None
    device: str | None

    def words(self) -> list[str]:
        """Return the options as words of a command line."""
        given = {
            "--recipe": self.recipe,
            "--data": self.data,
            "--config": self.config,
            "--output": self.output,
            "--resume": None if self.resume.lower() == "auto" or self.overwrite else self.resume,
            "--weights": self.weights,
            "--device": self.device,
        }
        words = [word for key, value in given.items() if value for word in (key, str(value))]
        words += ["--overwrite"] if self.overwrite else []
        return words + [word for item in self.overrides for word in ("--set", item)]

    def resolve(self) -> RunConfig:
        """Put the configuration together; options win over ``--set``, that over the file, that over the recipe."""
        from proxydet.config import scalar_text
        from proxydet.recipes import absolute_paths, resolve_config

        overrides = list(self.overrides)
        for key, value in (
            ("data.description", self.data),
            ("training.weights", self.weights),
            ("training.device", self.device),
        ):
            if value is not None:
                overrides.append(f"{key}={scalar_text(str(value))}")
        return absolute_paths(resolve_config(self.recipe, self.config, overrides))

    def folder(self, config: RunConfig) -> tuple[Path, str]:
        """Return the run folder, and why it is that one; empty where it is the one that was asked for."""
        from proxydet.training.runfolder import default_folder

        base = (self.output or runs_folder() / config.recipe).absolute()
        if self.output is not None or self.overwrite:
            return base, ""
        return default_folder(base, config, self.resumes())

    def resumes(self) -> Resume:
        """Return what to do with checkpoints that are there."""
        from proxydet.training.runfolder import after_restart

        if self.resume.lower() in ("auto", "never"):
            return after_restart(cast("Resume", self.resume.lower()))
        return Path(self.resume).absolute()


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where to train, as asked for."""

    gpus: int | None
    nodes: int | None
    rendezvous: str | None
    max_restarts: int | None
    requeue: bool

    def plan(self, config: RunConfig) -> LaunchPlan:
        """Decide how many processes run where."""
        import torch

        from proxydet.training.launch import plan_launch

        on_cpu = config.training.device == "cpu" or not torch.cuda.is_available()
        return plan_launch(
            gpus=self.gpus,
            nodes=self.nodes,
            rendezvous=self.rendezvous,
            max_restarts=self.max_restarts,
            available=1 if on_cpu else torch.cuda.device_count(),
        )


def show_config(options: TrainOptions, *, json: bool) -> None:
    """Write the resolved configuration."""
    from proxydet.config import dump_yaml, to_mapping

    config = options.resolve()
    Output(json=json).data(to_mapping(config), dump_yaml(config).rstrip())


def show_plan(options: TrainOptions, machines: Machines, *, json: bool) -> None:
    """Write what would be done, with what, for how long, and what is missing."""
    from proxydet.training.distributed import launched_rank
    from proxydet.training.plan import plan_training

    config = options.resolve()
    folder, why = options.folder(config)
    plan = plan_training(
        config,
        machines.plan(config),
        folder,
        ["train", *options.words()],
        resume=options.resumes(),
        overwrite=options.overwrite,
    )
    if launched_rank() == 0 and why:
        Output(json=json).message(f"run folder: {folder} ({why})")
    if launched_rank() == 0:
        Output(json=json).data(plan.to_dict(), plan.to_text())
    if plan.missing:
        raise typer.Exit(InputError.exit_code)


def run(options: TrainOptions, machines: Machines, *, json: bool) -> None:
    """Train here, or start the processes that do and wait for them."""
    import os

    # Read when torch is loaded: its C++ code reports lost connections with stack traces, which we report in words.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from proxydet.training.checkpoint import read_iteration
    from proxydet.training.distributed import broadcast_value, connect, launched_rank
    from proxydet.training.launch import LAUNCHER, launch, requeue, worker
    from proxydet.training.runfolder import RunFolder
    from proxydet.training_run import finished_run, run_training
    from proxydet_cli.training_display import training_progress

    config = options.resolve()
    plan = machines.plan(config)
    output = Output(json=json, quiet=plan.started and launched_rank() > 0)
    resume = options.resumes()
    if isinstance(resume, Path) and not resume.is_file():
        raise ConfigError(
            f"--resume takes auto, never or a checkpoint; there is no file {options.resume}.",
            hint="Checkpoints are in RUN/checkpoints/.",
            path=resume,
        )
    with contextlib.ExitStack() as stack:
        if plan.started and options.output is None:
            # One process chooses for all: what it writes there must not make another one choose otherwise.
            ranks = stack.enter_context(connect(config.training.device))
            choice = broadcast_value(options.folder(config) if ranks.is_main else None, ranks)
            root, why = cast("tuple[Path, str]", choice)
        else:
            root, why = options.folder(config)
        folder = RunFolder(root)
        if LAUNCHER not in os.environ:
            output.message(f"run folder: {root}" + (f" ({why})" if why else ""))
            # Once for all processes, before one of them writes to it.
            finished = finished_run(folder, config) if resume == "auto" else None
            if finished is not None:
                if not output.quiet:
                    output.data(
                        finished, f"This run is finished: nothing to do.\n{_summary(finished)}"
                    )
                return

        def train_here() -> None:
            result = run_training(
                config,
                output=root,
                resume=resume,
                overwrite=options.overwrite,
                progress=training_progress(quiet=output.quiet),
            )
            if not output.quiet:
                output.data(result, _summary(result))

        try:
            if plan.started:
                with worker(folder.logs):
                    train_here()
            elif plan.torchrun:
                # In each of the processes it would take seconds to come out, and be reported as one process's failure.
                if isinstance(resume, Path):
                    read_iteration(resume)
                chosen = dataclasses.replace(options, output=root)
                words = ["train", *chosen.words(), *(["--json"] if json else [])]
                # On several nodes the main process holds the folder: no launcher knows which one it will be.
                with folder.held() if plan.nodes == 1 else contextlib.nullcontext():
                    launch(plan, ["-m", "proxydet_cli", *words], folder.logs)
            else:
                train_here()
        except Interrupted as error:
            if machines.requeue and error.signal_number != 2 and requeue():
                output.message("The SLURM job is back in the queue.")
            raise


def _summary(result: TrainResult) -> str:
    lines = [f"trained {result.iterations} iterations in {result.folder}"]
    if result.losses:
        lines.append(f"loss {result.losses['total']:.4g}")
    if result.best is not None:
        best = result.best
        lines.append(f"best {best.metric} {best.value:.4f} after {best.iteration} iterations")
    if result.skipped:
        lines.append(f"{result.skipped} steps were skipped because a loss was not finite")
    return "\n".join([*lines, _next_steps(result.folder)])


def _next_steps(folder: Path) -> str:
    run_name = shlex.quote(str(folder))
    return (
        f"next: proxydet eval --run {run_name}\n      proxydet predict --run {run_name} photo.jpg"
    )
