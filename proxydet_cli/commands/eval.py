"""``proxydet eval``: average precision of a detector or of a results file, with error bars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxydet_cli.options import Json, command_app, examples

app = command_app()

Run = Annotated[
    Path | None,
    typer.Option("--run", metavar="FOLDER", help="Run folder of proxydet train or quickstart."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="NAME|FILE",
        help="A published model (proxydet-r50, proxydet-r50-inl, proxydet-swinb-inl) or a checkpoint; with --run, "
        "one of the run's. [default: the run's last, else proxydet-r50-inl]",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="r50|swinb|FILE", help="Model of a --weights file. [default: r50]"
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(
        "--results",
        metavar="FILE",
        help="Score this LVIS or COCO results file (JSON, plain or gzipped), or what predict --save coco wrote, instead of detecting.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "--dataset",
        metavar="NAME|FILE",
        help="Dataset config (TOML), or a prepared data set (lvis, coco, objects365, openimages); for --results an "
        "annotation file (JSON) will do. [default: the run's, else lvis]",
    ),
]
Split = Annotated[str, typer.Option("--split", metavar="val|train", help="Which split.")]
Vocabulary = Annotated[
    Path | None,
    typer.Option(
        "--vocabulary",
        metavar="FILE",
        help="Text embeddings (.npz, .npy) to use instead of the dataset config's.",
    ),
]
Protocol = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        metavar="lvis|coco|openimages",
        help="Whose protocol to score by: lvis (federated annotations), coco (exhaustive) or openimages. "
        "[default: by what the annotations say]",
    ),
]
IouTypes = Annotated[
    str | None,
    typer.Option(
        "--iou-type",
        metavar="bbox,segm",
        help="What is scored. [default: boxes, and masks where objects and detections have them]",
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="hotcoco|lvis",
        help="hotcoco: fast; lvis: the official evaluators (lvis, pycocotools), the yardstick.",
    ),
]
Fixed = Annotated[
    bool,
    typer.Option(
        "--fixed",
        help="Fixed AP: no limit of detections an image, 10,000 a category. Not comparable with AP.",
    ),
]
Bootstrap = Annotated[
    int, typer.Option("--bootstrap", min=0, help="Resamples for confidence intervals; 0: none.")
]
Hierarchy = Annotated[
    Path | None,
    typer.Option("--hierarchy", metavar="FILE", help="OpenImages' hierarchy, for expanded AP50."),
]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Accept boxes that reach out of their image.")
]
AllowDuplicates = Annotated[
    bool,
    typer.Option("--allow-duplicates", help="Accept results that hold every detection twice."),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Where files are written. [default: in the run folder, else below evaluation]",
    ),
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        "--compare",
        metavar="A B",
        help="Say whether B is better than A: two results files, or two folders of evaluations.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one.")
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Processes. [default: one a GPU]")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images in the network at once.")
]

Augment = Annotated[
    bool,
    typer.Option(
        "--tta", help="Run on each image mirrored too, and in three sizes: 6 times slower."
    ),
]


@app.command(
    epilog=examples(
        "proxydet eval --run runs/quickstart",
        "proxydet eval --weights proxydet-r50-inl --data lvis",
        "proxydet eval --results detections.json.gz --data lvis_v1_val.json",
        "proxydet eval --run runs/pets --data pets.toml --split train --json",
        "proxydet eval --compare runs/a/evaluation/lvis-val runs/b/evaluation/lvis-val --data lvis",
    )
)
def evaluate(
    run: Run = None,
    weights: Weights = None,
    config: Model = None,
    results: Results = None,
    data: Data = None,
    split: Split = "val",
    vocabulary: Vocabulary = None,
    protocol: Protocol = None,
    iou_type: IouTypes = None,
    engine: Engine = "hotcoco",
    fixed: Fixed = False,
    bootstrap: Bootstrap = 200,
    hierarchy: Hierarchy = None,
    allow_outside: AllowOutside = False,
    allow_duplicates: AllowDuplicates = False,
    output: OutputFolder = None,
    compare: Compare = None,
    device: Device = "auto",
    gpus: Gpus = None,
    batch_size: BatchSize = 1,
    tta: Augment = False,
    json: Json = False,
) -> None:
    """Measure average precision, and say how sure it is.

    Predictions are kept in the output folder: a stopped evaluation goes on where it stopped.
    """
    from proxydet.evaluation.config import EvaluationConfig
    from proxydet_cli import evaluation
    from proxydet_cli.evaluation_options import EvalOptions
    from proxydet_cli.output import Output

    options = EvalOptions(
        run=run,
        weights=weights,
        model=config,
        results=results,
        data=data,
        split=split,
        vocabulary=vocabulary,
        output=output,
        device=device,
        gpus=gpus,
        config=EvaluationConfig(
            engine=engine,  # type: ignore[arg-type]
            protocol=protocol,  # type: ignore[arg-type]
            iou_types=tuple(iou_type.split(",")) if iou_type else (),
            fixed=fixed,
            bootstrap=bootstrap,
            hierarchy=hierarchy,
            allow_outside=allow_outside,
            allow_duplicates=allow_duplicates,
            batch_size=batch_size,
        ),
        tta=tta,
    )
    if compare is not None:
        evaluation.compare(*compare, options, Output(json=json))
    else:
        evaluation.run(options, Output(json=json))
