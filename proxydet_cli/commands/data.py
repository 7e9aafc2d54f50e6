"""``proxydet data``: prepare data sets, check them, count and preview what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from proxydet.wording import counted, first_of, printable
from proxydet_cli.options import Json, command_app, examples
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.data.check import CheckReport
    from proxydet.data.init import InitReport
    from proxydet.data.prepare import PrepareReport
    from proxydet.data.stats import ClassCount, PartStats

app = command_app("Prepare data sets, check them, count and preview what is in them.")

Source = Annotated[
    Path,
    typer.Argument(
        help="Dataset config (TOML), or annotations of any format: the folder of an export, or a file in it.",
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
    from proxydet_cli.progress import show_progress

    report = run(
        dataset, root or datasets_folder(), force=force, cache=cache, progress=show_progress()
    )
    Output(json=json).data(report, _prepared(report))


@app.command(
    epilog=examples(
        "proxydet data init export/ -o pets.toml",
        "proxydet data init instances.json --images photos",
        "proxydet data init project.json --images photos --val 0.1 --seed 3",
    )
)
def init(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Folder or file of an export: COCO, LVIS, YOLO, Pascal VOC, labelme, VGG VIA, CVAT, Label Studio.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The dataset config (.toml). [default: named after PATH, here]",
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the images; repeatable. [default: found below PATH]"),
    ] = None,
    val: Annotated[
        float, typer.Option(help="Share of the images kept for validation, where nothing is split.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Decides which images these are.")] = 0,
    encoder: Annotated[
        Path | None,
        typer.Option(
            "--encoder",
            metavar="FILE",
            help="CLIP weights (.pt, .safetensors), as of proxydet vocab build. [default: CLIP ViT-B/32 where proxydet "
            "download puts it, else published embeddings]",
        ),
    ] = None,
    closed: Annotated[
        bool,
        typer.Option(
            "--closed",
            help="Make embeddings without a text encoder: the detector then finds these classes and no others.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a config that is there.")] = False,
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Write a dataset config for annotations of any format, with class names, parts and text embeddings.

    Nothing is converted: the config names the files as they are, and all commands read them. Parts (train, val, test) are
    taken as found in folders, lists and file names; without any, a share of the images is kept for validation.
    """
    from proxydet.data.init import init_dataset
    from proxydet_cli.progress import show_progress

    report = init_dataset(
        path,
        output,
        images=images or (),
        val_share=val,
        seed=seed,
        encoder=encoder,
        closed=closed,
        overwrite=overwrite,
        cache=cache,
        progress=show_progress(),
    )
    Output(json=json).data(report, _initialized(report))


@app.command(
    epilog=examples(
        "proxydet data check instances.json",
        "proxydet data check export/",
        "proxydet data check my.toml --decode",
    )
)
def check(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="PATH",
            help="Dataset config (TOML), annotations of any format (the folder of an export, or a file in it), or data "
            "root; else $PROXYDET_DATASETS, else ./datasets.",
        ),
    ] = None,
    decode: Annotated[
        bool, typer.Option(help="Decode every image, beyond its size and end (slow).")
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

    Exit code 0: nothing in these files stops training, evaluation or prediction; the verdict names what was not checked.
    Exit code 3: something does.
    """
    from proxydet.data.check import check_path
    from proxydet.paths import datasets_folder
    from proxydet_cli.progress import show_progress

    reports = check_path(
        path or datasets_folder(),
        decode=decode,
        protocol=protocol,
        cache=cache,
        progress=show_progress(),
    )
    rows = [
        {"name": r.name, "sound": r.sound, "unchecked": r.unchecked, "findings": r.findings}
        for r in reports
    ]
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
    from proxydet.data.dataset import Dataset
    from proxydet.data.sources import open_config
    from proxydet.data.stats import dataset_stats
    from proxydet_cli.progress import show_progress

    data = Dataset(config=open_config(path), cache=cache, progress=show_progress())
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
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Which part.")] = "train",
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
    from proxydet.data.dataset import Dataset
    from proxydet.data.preview import PreviewRequest, write_preview
    from proxydet.data.sources import open_config
    from proxydet_cli.progress import show_progress

    request = PreviewRequest(
        split=split, count=count, seed=seed, class_name=class_name, augmented=augmented
    )
    config = open_config(path, images or ())
    data = Dataset(config=config, cache=cache, progress=show_progress())
    written = write_preview(data, output, request, named=path)
    Output(json=json).data({"path": written}, str(written))


def _initialized(report: InitReport) -> str:
    lines = [
        f"{report.format}: {counted(len(report.classes), 'class', 'classes')}: {first_of([printable(name) for name in report.classes], 8)}"
    ]
    for part, count in report.parts.items():
        masks = f", {count.masks} with a mask" if count.masks else ", boxes only"
        lines.append(
            f"  {part}: {counted(count.images, 'image')}, {counted(count.objects, 'object')}{masks} ({count.annotations})"
        )
    lines.append(f"  parts {report.split}")
    lines += [f"  note: {note}" for note in report.notes]
    made = f"embeddings: {report.embeddings}, made by {report.embedded}"
    if report.embedded == "without a text encoder":
        made = (
            f"embeddings: {report.embeddings}, without a text encoder (these classes and no others)"
        )
    elif not report.embedded:
        made = (
            "embeddings: still to be made, since the text encoder's weights are not there (or without them, for these "
            "classes and no others: --closed --overwrite)"
        )
    return "\n".join(
        [*lines, f"wrote {report.config}", made, "next:", *(f"  {c}" for c in report.commands)]
    )


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
        verdict = f"not usable as it is: {counted(errors, 'error')}"
    elif report.unchecked:
        verdict += f"; not checked: {', '.join(report.unchecked)}"
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
