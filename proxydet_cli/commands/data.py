"""``proxydet data``: prepare data sets, check them, count and preview what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from proxydet_cli.options import Json, command_app, examples

if TYPE_CHECKING:
    from proxydet.data.check import CheckReport
    from proxydet.data.prepare import PrepareReport
    from proxydet.data.stats import ClassCount, PartStats

app = command_app("Prepare data sets, check them, count and preview what is in them.")

Source = Annotated[
    Path,
    typer.Argument(
        help="Dataset config (TOML), annotation file, or the folder or list of Pascal VOC or YOLO.",
        metavar="PATH",
    ),
]
Images = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of the images, where PATH is not a dataset config; repeatable."),
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder of annotation stores and tar indexes; else the user's cache folder."),
]


@app.command(
    epilog=examples("proxydet data prepare lvis", "proxydet data prepare coco --root /data/sets")
)
def prepare(
    dataset: Annotated[
        Literal["lvis", "imagenet-lvis", "objects365", "openimages", "coco"],
        typer.Argument(help="Which data set."),
    ],
    root: Annotated[
        Path | None, typer.Option(help="Data root; else $PROXYDET_DATASETS, else ./datasets.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Make files again that are up to date.")] = False,
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Make everything that a downloaded data set still needs.

    lvis: annotations without rare classes, class counts, stores. imagenet-lvis: an index of the tars, which are read in
    place. objects365: class names set right. openimages: one file in COCO format, hierarchy expanded. coco: the
    zero-shot split. Each also writes a dataset config (TOML) into the root. What is up to date is left alone.
    """
    from proxydet.data.prepare import prepare as run
    from proxydet.paths import datasets_folder
    from proxydet_cli.output import Output
    from proxydet_cli.progress import show_progress

    report = run(
        dataset,
        root or datasets_folder(),
        force=force,
        cache=cache,
        progress=show_progress(),
    )
    Output(json=json).data(report, _prepared(report))


@app.command(
    epilog=examples(
        "proxydet data check instances.json",
        "proxydet data check VOCdevkit/VOC2012",
        "proxydet data check my.toml --decode",
    )
)
def check(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="PATH",
            help="Annotation file (COCO, LVIS, OpenImages JSON), Pascal VOC folder or list, dataset config (TOML), or "
            "data root; else $PROXYDET_DATASETS, else ./datasets.",
        ),
    ] = None,
    decode: Annotated[
        bool, typer.Option(help="Decode every image, beyond comparing its size (slow).")
    ] = False,
    protocol: Annotated[
        Literal["lvis", "coco", "openimages"] | None,
        typer.Option(
            case_sensitive=False,
            help="How they will be scored, as eval --protocol; else found out by rule.",
        ),
    ] = None,
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Check annotations and images: what will be used, mended and dropped, which field and why.

    Exit code 0: nothing in these files stops training, evaluation or prediction. Exit code 3: something does.
    """
    from proxydet.data.check import check_path
    from proxydet.paths import datasets_folder
    from proxydet_cli.output import Output
    from proxydet_cli.progress import show_progress

    reports = check_path(
        path or datasets_folder(),
        decode=decode,
        protocol=protocol,
        cache=cache,
        progress=show_progress(),
    )
    rows = [{"name": r.name, "sound": r.sound, "findings": r.findings} for r in reports]
    Output(json=json).data(rows, "\n\n".join(_checked(report) for report in reports))
    if not all(report.sound for report in reports):
        raise typer.Exit(3)


@app.command(
    epilog=examples(
        "proxydet data stats datasets/lvis.toml", "proxydet data stats instances.json --classes"
    )
)
def stats(
    path: Source,
    classes: Annotated[bool, typer.Option(help="List every class.")] = False,
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Count images, objects and classes of a data set, base and novel, with the ends of its long tail."""
    from proxydet.data.dataset import Dataset, DatasetConfig
    from proxydet.data.stats import dataset_stats
    from proxydet_cli.output import Output
    from proxydet_cli.progress import show_progress

    data = Dataset(config=DatasetConfig.open(path), cache=cache, progress=show_progress())
    counted = dataset_stats(data)
    output = Output(json=json)
    if json:
        output.data(counted)
        return
    output.table([_part_row(part) for part in counted.parts])
    for part in counted.parts:
        shown = part.classes if classes else _ends(part)
        output.data(
            None, f"\n{part.part}: " + ("classes" if classes else "most and least frequent")
        )
        grouped = any(entry.frequency for entry in shown)
        output.table([_class_row(entry, grouped=grouped) for entry in shown])


@app.command(
    epilog=examples(
        "proxydet data preview my.toml --output sheet.png",
        "proxydet data preview instances.json --images photos --output sheet.png",
        "proxydet data preview my.toml --output page.html --class dog",
        "proxydet data preview my.toml --output seen.png --augmented",
    )
)
def preview(
    path: Source,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="An image (.png, .jpg), or a page (.html).")
    ],
    images: Images = None,
    split: Annotated[Literal["train", "val"], typer.Option(help="Which part.")] = "train",
    count: Annotated[int, typer.Option(min=1, max=500, help="How many images.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Which images.")] = 0,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Only images on which this class is annotated.")
    ] = None,
    augmented: Annotated[bool, typer.Option(help="As training sees them.")] = False,
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Draw images of a data set with their boxes, masks and classes."""
    from proxydet.data.dataset import Dataset, DatasetConfig
    from proxydet.data.preview import PreviewRequest, write_preview
    from proxydet_cli.output import Output
    from proxydet_cli.progress import show_progress

    request = PreviewRequest(
        split=split, count=count, seed=seed, class_name=class_name, augmented=augmented
    )
    config = DatasetConfig.open(path, images or ())
    data = Dataset(config=config, cache=cache, progress=show_progress())
    written = write_preview(data, output, request, named=path)
    Output(json=json).data({"path": written}, str(written))


def _prepared(report: PrepareReport) -> str:
    lines = []
    for step in report.steps:
        lines.append(f"{step.action:>10}  {step.name}: {step.path}")
        if step.detail:
            lines.append(f"{'':>10}  {step.detail}")
    return "\n".join([*lines, *(f"{'note':>10}  {problem}" for problem in report.problems)])


def _checked(report: CheckReport) -> str:
    lines = []
    for finding in report.findings:
        lines.append(f"{finding.level:>7}  {finding.part}: {finding.text}")
        if finding.advice:
            lines.append(f"{'':>7}  -> {finding.advice}")
    errors = sum(finding.level == "error" for finding in report.findings)
    verdict = "sound: nothing found that stops training, evaluation or prediction"
    if errors:
        verdict = f"not usable as it is: {errors} error{'s' if errors > 1 else ''}"
    return "\n".join([*lines, f"{report.name}: {verdict}"])


def _part_row(part: PartStats) -> dict[str, object]:
    base, novel = part.group(base=True), part.group(base=False)
    return {
        "part": part.part,
        "images": part.images,
        "empty": part.images_without_annotations,
        "annotations": part.annotations,
        "crowds": part.crowds,
        "no mask": part.without_mask,
        "small": part.small,
        "medium": part.medium,
        "large": part.large,
        "base classes": f"{base['occurring']} of {base['classes']}",
        "novel classes": f"{novel['occurring']} of {novel['classes']}",
        "novel annotations": novel["annotations"],
    }


def _ends(part: PartStats, most: int = 5) -> list[ClassCount]:
    occurring = sorted((c for c in part.classes if c.images), key=lambda c: -c.images)
    return occurring if len(occurring) <= 2 * most else [*occurring[:most], *occurring[-most:]]


def _class_row(entry: ClassCount, *, grouped: bool) -> dict[str, object]:
    return {
        "class": entry.name,
        "split": "base" if entry.base else "novel",
        **({"frequency": entry.frequency} if grouped else {}),
        "images": entry.images,
        "annotations": entry.annotations,
    }
