"""``proxydet train``: training, on one CPU or on many nodes, resumed as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.options import DryRun, Json, command_app, examples

if TYPE_CHECKING:
    from proxydet_cli.training import TrainOptions

app = command_app()

Backbone = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="r50|swinb",
        help="The published recipe with this backbone (in place of --recipe).",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Any recipe: r50, swinb (each also with _without_image_labels), boxsup_r50, boxsup_swinb, quickstart, "
        "small, tiny.",
    ),
]
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE", help="Dataset config (TOML).")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="YAML with all keys, or some; a run's repeats it."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key; can be given many times."),
]
RunFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="The run folder. [default: runs/RECIPE; where that holds a run with other settings, runs/RECIPE-2 and so on]",
    ),
]
ResumeOption = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="auto|never|FILE",
        help="Resume from the newest checkpoint of the run folder, if any; start a new run; or resume from this checkpoint.",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Start a new run (--resume never) and remove the one that the folder holds.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Checkpoint whose weights a new run starts from (to continue a run: --resume).",
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="Processes on each node. [default: one a GPU]"),
]
Nodes = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        min=1,
        help="Nodes. [default: those that SLURM, Kubeflow or SkyPilot state, or 1]",
    ),
]
Rendezvous = Annotated[
    str | None,
    typer.Option(
        "--rendezvous",
        metavar="HOST:PORT",
        help="Where several nodes meet. [default: as the cluster states]",
    ),
]
Restarts = Annotated[
    int | None,
    typer.Option(
        "--max-restarts",
        min=0,
        help="How often processes are started again after a failure. [default: 3 on several nodes]",
    ),
]
Requeue = Annotated[
    bool,
    typer.Option(
        "--requeue", help="Put the SLURM job back into the queue when SIGUSR1 or SIGTERM stops it."
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="auto|cuda|cpu", help="Where to compute.")
]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Write the resolved configuration and do nothing.")
]


@app.command(
    epilog=examples(
        "proxydet train --backbone r50",
        "proxydet train --backbone swinb --gpus 4 --dry-run",
        "proxydet train --recipe small --data pets.toml --output runs/pets",
        "proxydet train --config runs/pets/config.yaml --set seed=8 --output runs/pets-8",
        "srun --ntasks-per-node=1 proxydet train --backbone r50 --requeue",
    )
)
def train(
    backbone: Backbone = None,
    recipe: Recipe = None,
    data: Data = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    output: RunFolderOption = None,
    resume: ResumeOption = "auto",
    overwrite: OverwriteOption = False,
    weights: Weights = None,
    device: Device = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    rendezvous: Rendezvous = None,
    max_restarts: Restarts = None,
    requeue: Requeue = False,
    dry_run: DryRun = False,
    show_config: ShowConfig = False,
    json: Json = False,
) -> None:
    """Train a detector.

    The same command starts a run and resumes it, on any number of processes. Ctrl-C writes a checkpoint first. With --dry-run,
    the exit code is 3 where training could not start.
    """
    from proxydet_cli import training

    if backbone is not None and recipe is not None:
        raise typer.BadParameter("give either --backbone or --recipe, not both")
    if overwrite and resume.lower() not in ("auto", "never"):
        raise typer.BadParameter(
            "--overwrite starts a new run: it cannot be combined with --resume FILE"
        )
    options: TrainOptions = training.TrainOptions(
        recipe=recipe or backbone,
        data=data,
        config=config,
        overrides=tuple(overrides or ()),
        output=output,
        resume="never" if overwrite else resume,
        overwrite=overwrite,
        weights=weights,
        device=device,
    )
    where = training.Machines(
        gpus=gpus, nodes=nodes, rendezvous=rendezvous, max_restarts=max_restarts, requeue=requeue
    )
    if show_config:
        training.show_config(options, json=json)
    elif dry_run:
        training.show_plan(options, where, json=json)
    else:
        training.run(options, where, json=json)
