"""``proxydet train``: training, on one CPU or on many nodes, resumed as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from proxydet.errors import ConfigError, InputError, JobInterruptedError
from proxydet.paths import runs_folder
from proxydet_cli.options import DryRun, Json, Yes, command_app, examples, general, panel
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.finetune import Reason
    from proxydet.recipes import RunConfig
    from proxydet.training.launch import LaunchPlan
    from proxydet.training.runfolder import Resume
    from proxydet.training.train import TrainResult


app = command_app()

_what, _folder, _processes = panel("What to train"), panel("Run folder"), panel("Processes")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to train; every process of a run gets the same."""

    backbone: Annotated[
        str | None,
        _what(
            "--backbone",
            metavar="r50|swinb",
            help="The published recipe with this backbone (in place of --recipe).",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        _what(
            "--recipe",
            metavar="NAME",
            help="Any recipe: small, lite0, quickstart, tiny; r50, swinb (each also with _without_image_labels and _fast), "
            "boxsup_r50, boxsup_swinb.",
        ),
    ] = None
    data: Annotated[Path | None, _what("--data", metavar="FILE", help="Dataset config (TOML).")] = (
        None
    )
    config: Annotated[
        Path | None,
        _what(
            "--config",
            "-c",
            metavar="FILE",
            help="YAML with all keys, or some; a run's repeats it.",
        ),
    ] = None
    overrides: Annotated[
        list[str] | None,
        _what("--set", metavar="KEY=VALUE", help="Set one key; can be given many times."),
    ] = None
    output: Annotated[
        Path | None,
        _folder(
            "--output",
            "-o",
            metavar="FOLDER",
            help="The run folder. [default: runs/RECIPE; where that holds a run with other settings, runs/RECIPE-2 and so on]",
        ),
    ] = None
    resume: Annotated[
        str,
        _folder(
            "--resume",
            metavar="auto|never|FILE",
            help="Resume from the newest checkpoint of the run folder, if any; start a new run; or resume from this checkpoint.",
        ),
    ] = "auto"
    overwrite: Annotated[
        bool,
        _folder(
            "--overwrite",
            help="Start a new run (--resume never) and remove the one that the folder holds.",
        ),
    ] = False
    weights: Annotated[
        Path | None,
        _what(
            "--weights",
            metavar="FILE",
            help="Checkpoint whose weights a new run starts from (to continue a run: --resume).",
        ),
    ] = None
    finetune: Annotated[
        str | None,
        _what(
            "--finetune",
            metavar="NAME|FOLDER|FILE",
            help="Start from this detector, with its configuration, and train it on --data: a published model, a run folder or a "
            "weight file (of --recipe).",
        ),
    ] = None
    epochs: Annotated[
        float | None,
        _what(
            "--epochs",
            metavar="N",
            help="Length by the number of training images. [default: as the recipe; with --finetune 12 to 100]",
        ),
    ] = None
    keep_check: Annotated[
        Path | None,
        _what(
            "--keep-check",
            metavar="FILE",
            help="With --finetune: dataset config whose val images show what happens to classes that are not trained. [default: "
            "that of the starting run]",
        ),
    ] = None
    device: Annotated[
        str | None, _processes("--device", metavar="auto|cuda|cpu", help="Where to compute.")
    ] = None
    reference: Annotated[
        Path | None,
        _folder(
            "--reference",
            metavar="LOG",
            help="A detectron2 log (log.txt or metrics.json): the run's losses are plotted next to its, of a finished run too.",
        ),
    ] = None

    def check_choice(self) -> None:
        """Refuse options that contradict each other."""
        if self.backbone is not None and self.recipe is not None:
            raise typer.BadParameter("give either --backbone or --recipe, not both")
        if self.finetune is not None and self.data is None:
            raise typer.BadParameter("--finetune needs the new data: --data FILE")
        if self.finetune is not None and self.weights is not None:
            raise typer.BadParameter("--finetune names the starting weights: leave --weights out")
        if self.finetune is None and self.keep_check is not None:
            raise typer.BadParameter("--keep-check requires --finetune")
        if self.epochs is not None and self.data is None and self.config is None:
            raise typer.BadParameter("--epochs counts the images of --data: give --data too")
        if self.overwrite and self.resume.lower() not in ("auto", "never"):
            raise typer.BadParameter(
                "--overwrite starts a new run: it cannot be combined with --resume FILE"
            )

    def words(self) -> list[str]:
        """Return the options as words of a command line."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            option = f"--{field.name.replace('_', '-')}"
            if field.name == "overrides":
                words += [word for item in value or () for word in ("--set", item)]
            elif field.name == "resume" and (value.lower() == "auto" or self.overwrite):
                continue
            elif value:
                words += [option] if value is True else [option, str(value)]
        return words

    def resolve(self) -> tuple[RunConfig, tuple[Reason, ...]]:
        """Put the configuration together; options win over ``--set``, that over the file, that over the recipe.

        Returns:
            The configuration, and why it is as it is where the data or the starting detector decide.
        """
        from proxydet.config import scalar_text
        from proxydet.finetune import finetune_config, with_epochs
        from proxydet.models import find_detector
        from proxydet.recipes import absolute_paths, resolve_config

        overrides = list(self.overrides or ())
        recipe = self.recipe or self.backbone
        for key, value in (
            ("data.description", None if self.finetune else self.data),
            ("training.weights", self.weights),
            ("training.device", self.device),
        ):
            if value is not None:
                overrides.append(f"{key}={scalar_text(str(value))}")
        if self.finetune is not None and self.data is not None:
            file = None if self.config is None else str(self.config)
            return finetune_config(
                find_detector(run=None, weights=self.finetune, config=file),
                self.data,
                recipe=recipe,
                overrides=overrides,
                epochs=self.epochs,
                keep_check=self.keep_check,
            )
        config = absolute_paths(resolve_config(recipe, self.config, overrides))
        return with_epochs(config, self.epochs) if self.epochs is not None else (config, ())

    def check(self, config: RunConfig) -> None:
        """Refuse what the options name and is not there, before torch is loaded.

        A run that names the same file goes without it where it is finished or resumed, so such files are left to training.

        Raises:
            DataError: There is no such dataset config, or it cannot be read.
            CheckpointError: The starting weights are not a weight file.
            ConfigError: There is no such extension.
        """
        from proxydet.data.dataset import DatasetConfig
        from proxydet.extensions import is_python_path, require_module
        from proxydet.weight_files import check_weight_file

        base = self._base(config)
        others = base.parent.glob(f"{glob.escape(base.name)}-*")
        runs = [folder / "config.yaml" for folder in (base, *others)]
        for given, check in (
            (config.data.description, DatasetConfig.from_toml),
            (config.training.weights, check_weight_file),
        ):
            if given is None:
                continue
            try:
                check(given)
            except InputError:
                name = os.fsencode(given)
                if not any(run.is_file() and name in run.read_bytes() for run in runs):
                    raise
        for key, path in (
            ("model.backbone.kind", config.model.backbone.kind),
            ("model.cascade.box_head", config.model.cascade.box_head),
            ("losses.criterion", config.losses.criterion),
            *(("training.log.loggers", logger) for logger in config.training.log.loggers),
        ):
            if path is not None and is_python_path(path):
                require_module(path, key)

    def _base(self, config: RunConfig) -> Path:
        name = config.recipe if self.finetune is None or self.data is None else self.data.stem
        return (self.output or runs_folder() / name).absolute()

    def folder(self, config: RunConfig) -> tuple[Path, str]:
        """Return the run folder, and why it is that one; empty where it is the one that was asked for."""
        from proxydet.training.runfolder import default_folder

        base = self._base(config)
        if self.output is not None or self.overwrite:
            return base, ""
        return default_folder(base, config, self.resumes())

    def resumes(self) -> Resume:
        """Return what to do with checkpoints that are there."""
        from proxydet.training.runfolder import after_restart

        resume = "never" if self.overwrite else self.resume.lower()
        if resume in ("auto", "never"):
            return after_restart(cast("Resume", resume))
        return Path(self.resume).absolute()


@app.command(
    epilog=examples(
        "proxydet train --backbone r50",
        "proxydet train --backbone swinb --gpus 4 --dry-run",
        "proxydet train --recipe small --data pets.toml --output runs/pets",
        "proxydet train --finetune proxydet-r50-inl --data pets.toml",
        "proxydet train --config runs/pets/config.yaml --set seed=8 --output runs/pets-8",
        "proxydet train --backbone r50 --reference models/proxydet_r50_w_inl_log.txt",
        "srun --ntasks-per-node=1 proxydet train --backbone r50 --requeue",
    )
)
def train(
    options: TrainOptions,
    *,
    gpus: Annotated[
        int | None, _processes("--gpus", min=1, help="Processes on each node. [default: one a GPU]")
    ] = None,
    nodes: Annotated[
        int | None,
        _processes(
            "--nodes",
            min=1,
            help="Nodes. [default: those that SLURM, Kubeflow or SkyPilot state, or 1]",
        ),
    ] = None,
    rendezvous: Annotated[
        str | None,
        _processes(
            "--rendezvous",
            metavar="HOST:PORT",
            help="Where several nodes meet. [default: as the cluster states]",
        ),
    ] = None,
    max_restarts: Annotated[
        int | None,
        _processes(
            "--max-restarts",
            min=0,
            help="How often processes are started again after a failure. [default: 3 on several nodes]",
        ),
    ] = None,
    requeue: Annotated[
        bool,
        _processes(
            "--requeue",
            help="Put the SLURM job back into the queue when SIGUSR1 or SIGTERM stops it.",
        ),
    ] = False,
    dry_run: DryRun = False,
    show_config: Annotated[
        bool, general("--show-config", help="Write the resolved configuration and do nothing.")
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Train a detector.

    The same command starts a run and resumes it, on any number of processes. Ctrl-C writes a checkpoint first. Published
    starting weights that are missing are downloaded after one question. With --dry-run, the exit code is 3 where training
    could not start.
    """
    from proxydet_cli.commands.download import with_downloads

    options.check_choice()
    if options.reference is not None:
        from proxydet.visualization.reference import read_reference

        read_reference(options.reference)  # refused before anything is loaded or trained
    # What is misspelt is refused, and what is missing downloaded, before torch is loaded.
    planned = dry_run or show_config
    resolved, reasons = options.resolve() if planned else with_downloads(options.resolve, yes=yes)
    if show_config:
        from proxydet.config import dump_yaml, to_mapping

        Output(json=json).data(to_mapping(resolved), dump_yaml(resolved).rstrip())
        return
    if not dry_run:  # which lists what is missing
        with_downloads(lambda: options.check(resolved), yes=yes)
    # Read when torch is loaded: its C++ code reports lost connections with stack traces; our errors report them.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    from proxydet.training.distributed import launched_rank
    from proxydet.training.launch import LAUNCHER, plan_launch

    on_cpu = resolved.training.device == "cpu" or not torch.cuda.is_available()
    plan = plan_launch(
        gpus=gpus,
        nodes=nodes,
        rendezvous=rendezvous,
        max_restarts=max_restarts,
        available=1 if on_cpu else torch.cuda.device_count(),
    )
    if reasons and LAUNCHER not in os.environ and not (plan.started and launched_rank() > 0):
        chosen = {f"{reason.key}={reason.value}": reason.why for reason in reasons}
        width = min(max(map(len, chosen)), 60)
        lines = [f"  {setting:{width}}  {why}" for setting, why in chosen.items()]
        Output(json=json).message("\n".join(lines))
    if dry_run:
        _show_plan(options, resolved, plan, json=json)
    else:
        _run(options, resolved, plan, requeue=requeue, json=json)


def _show_plan(options: TrainOptions, config: RunConfig, plan: LaunchPlan, *, json: bool) -> None:
    """Write what would be done, with what, for how long, and what is missing."""
    from proxydet.training.distributed import launched_rank
    from proxydet.training.plan import plan_training

    folder, why = options.folder(config)
    words = ["train", *options.words()]
    resume, overwrite = options.resumes(), options.overwrite
    planned = plan_training(config, plan, folder, words, resume=resume, overwrite=overwrite)
    output = Output(json=json)
    if launched_rank() == 0:
        if why:
            output.message(f"run folder: {folder} ({why})")
        output.data(planned.to_dict(), planned.to_text())
    if planned.missing:
        raise typer.Exit(InputError.exit_code)


def _run(
    options: TrainOptions, config: RunConfig, plan: LaunchPlan, *, requeue: bool, json: bool
) -> None:
    """Train here, or start the processes that do and wait for them."""
    import torch

    from proxydet.training.checkpoint import read_header
    from proxydet.training.distributed import DistInfo, connect, decided_by_main, launched_rank
    from proxydet.training.launch import LAUNCHER, launch, requeue_job, worker
    from proxydet.training.runfolder import RunFolder
    from proxydet.training.train import check_own_code
    from proxydet.training_run import finished_run, plot_reference, run_training
    from proxydet_cli.progress import show_progress

    output = Output(json=json, quiet=plan.started and launched_rank() > 0)
    resume = options.resumes()
    if isinstance(resume, Path) and not resume.is_file():
        raise ConfigError(
            f"--resume takes auto, never or a checkpoint; there is no file {options.resume}.",
            hint="Checkpoints are in RUN/checkpoints/.",
            path=resume,
        )
    with contextlib.ExitStack() as stack:
        device = config.training.device
        ranks = DistInfo(device=torch.device("cpu"))
        if plan.started and LAUNCHER not in os.environ:
            # One process chooses for all: what it writes there must not make another one choose otherwise.
            ranks = stack.enter_context(connect(device, config.data.worker_timeout_s))
        root, why = decided_by_main(ranks, lambda: options.folder(config))
        folder = RunFolder(root)

        def plotted() -> None:
            if options.reference is not None:
                output.message(f"plotted: {plot_reference(folder, options.reference)}")

        if LAUNCHER not in os.environ:
            output.message(f"run folder: {root}" + (f" ({why})" if why else ""))
            finished = None
            if resume == "auto":
                finished = decided_by_main(ranks, lambda: finished_run(folder, config))
            if finished is not None:
                if not output.quiet:
                    plotted()
                    summary = _summary(finished, config)
                    output.data(finished, f"This run is finished: nothing to do.\n{summary}")
                return

        def train_here() -> None:
            result = run_training(
                config,
                output=root,
                resume=resume,
                overwrite=options.overwrite,
                progress=show_progress(quiet=output.quiet),
            )
            if not output.quiet:
                plotted()
                done = "trained" if result.losses else "no step was left to do after"
                output.data(result, _summary(result, config, done))

        @contextlib.contextmanager
        def held() -> Iterator[None]:
            """Join the others; the main process holds the run folder, before one of them writes in it."""
            with contextlib.ExitStack() as own:
                ranks = own.enter_context(connect(device, config.data.worker_timeout_s))
                decided_by_main(ranks, lambda: bool(own.enter_context(folder.held())))
                yield

        try:
            if plan.started:
                with worker(folder.logs, held()):
                    train_here()
            elif plan.torchrun:
                # In each of the processes it would take seconds to come out, and be reported as one process's failure.
                if isinstance(resume, Path):
                    read_header(resume)
                check_own_code(config)
                chosen = dataclasses.replace(options, output=root)
                words = ["train", *chosen.words(), *(["--json"] if json else [])]
                # On several nodes the main process holds the folder: no launcher knows which one it will be. One in a folder
                # that is in use would wait for other nodes.
                if plan.nodes > 1:
                    folder.new_lock().require_free()
                with folder.held() if plan.nodes == 1 else contextlib.nullcontext():
                    launch(plan, ["-m", "proxydet_cli", *words], folder.logs)
            else:
                train_here()
        except JobInterruptedError as error:
            if requeue and error.signal_number != 2 and requeue_job():
                output.message("The SLURM job is back in the queue.")
            raise


def _summary(result: TrainResult, config: RunConfig, done: str = "trained") -> str:
    lines, best = [f"{done} {result.iterations} iterations in {result.folder}"], result.best
    if result.losses:
        lines.append(f"loss {result.losses['total']:.4g}")
    if result.stopped_early:
        why = "the metric did not improve"
        if best is not None:
            why = f"no better {best.metric} in {config.training.evaluation.patience} evaluations"
        lines.append(f"stopped early: {why}")
    if best is not None:
        lines.append(f"best {best.metric} {best.value:.4f} after {best.iteration} iterations")
    if result.skipped:
        lines.append(f"{result.skipped} steps were skipped because a loss was not finite")
    if (result.folder / "model_best.safetensors").exists():
        lines.append(
            "the run folder opens model_best.safetensors; --weights opens model_final.safetensors"
        )
    if result.finetune:
        from proxydet.training_run import report_text

        lines.append(report_text(result.finetune))
        lines.append(f"report: {result.folder / 'finetune.html'}")
    from proxydet.data.dataset import DatasetConfig

    run, data = f"--run {shlex.quote(str(result.folder))}", config.data.description
    steps = [f"proxydet predict {run} photo.jpg"]
    if data is None:
        steps.insert(0, f"proxydet eval {run} --data FILE.toml")
    else:
        with contextlib.suppress(InputError):  # changed while it trained
            if DatasetConfig.from_toml(data).val is not None:
                steps.insert(0, f"proxydet eval {run}")
    return "\n".join([*lines, "next: " + "\n      ".join(steps)])
