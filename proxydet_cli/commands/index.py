"""``proxydet index``: regions of many images, embedded once, for ``proxydet search``."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from proxydet.wording import counted, size_text
from proxydet_cli.jobs import ShardOptions, list_on_stdin, report_plan, request_of
from proxydet_cli.opening import (
    BatchSize,
    DetectorOptions,
    InferenceOptions,
    PrecisionOption,
    open_detector,
)
from proxydet_cli.options import IndexFolder, Json, Yes, command_app, examples, panel
from proxydet_cli.output import Output

app = command_app(
    "Embed the regions of images once; search them by any class names with proxydet search.",
    default="add",
)

_output = panel("Output")
# Images that cannot be read and are named.
_NAMED = 20


@app.command(
    epilog=examples(
        "proxydet index add photos/ -o photos.index",
        "proxydet index add photos/ -o photos.index --run runs/quickstart --compact",
        "proxydet index photos/ more/ -o photos.index --workers 4",
    )
)
def add(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE",
            help="Files, folders of images, patterns in quotes ('photos/*.jpg'), tars, URLs of object stores, @FILE or - for a list.",
        ),
    ],
    output: Annotated[
        Path,
        _output(
            "--output",
            "-o",
            metavar="INDEX",
            help="The index (a folder): made, or added to where it is there.",
        ),
    ],
    model: DetectorOptions,
    *,
    compact: Annotated[
        bool,
        _output(
            "--compact",
            help="Keep the best regions of an image only, in few bytes: scores differ a little from those of predict.",
        ),
    ] = False,
    regions: Annotated[
        int | None,
        _output(
            "--regions",
            min=1,
            help="Regions that a compact index keeps of an image. [default: 30]",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 4,
    precision: PrecisionOption = None,
    shards: ShardOptions,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Add images to an index: proxydet index photos/ -o photos.index does the same.

    An image that is in the index and has not changed is left alone, so the same command continues what was stopped. A changed
    image is embedded again, and one that was moved keeps its regions. An image that cannot be read is reported and left out;
    the exit code is then 3.
    """
    import msgspec

    from proxydet.errors import DataError
    from proxydet.index.build import OpenIndexing, open_addition, open_index, run_addition
    from proxydet.index.store import ADDING, COMPACT_REGIONS, StoredIndex, check_place
    from proxydet.inference.sources import stream_images
    from proxydet_cli.progress import show_progress

    if regions is not None and not compact:
        raise typer.BadParameter("--regions requires --compact")
    named = model.find()
    most_regions = (regions or COMPACT_REGIONS) if compact else None
    stored = StoredIndex(output) if check_place(output) else None
    if stored is not None:
        mode = msgspec.structs.replace(stored.detector, most_regions=most_regions)
        stored.detector.require_equal(mode, output)
        stored.require_whole()
    shard = shards.check(output / ADDING, sources)
    request = request_of(named, model, precision, most_regions)
    out, progress = Output(json=json), show_progress()
    work = None
    if stored is None or not request or stored.request != request:
        # Mistakes in the first source before the model is opened.
        if "-" not in sources and next(stream_images(sources, Counter()), None) is None:
            raise DataError(
                "no images found in the given sources",
                hint="name files, folders, patterns or lists that are not empty",
            )
        shards.load()
        opened = open_detector(named, device=model.device, yes=yes)
        detector = InferenceOptions(precision=precision).apply(opened)
        work = open_index(detector, output, most_regions=most_regions, request=request)
    with list_on_stdin(sources) as stdin:
        job = open_addition(output, sources, shard=shard, stdin=stdin, progress=progress)
    report_plan(out, job)
    if job.images:
        shards.load()
    opening = OpenIndexing(
        named=named,
        **shards.spread(model.device),
        precision=None if precision is None else precision.value,
        path=output.absolute(),
    )
    done = run_addition(
        output,
        job,
        (lambda _: work) if shards.here and work is not None else opening,
        options=shards.options(batch_size),
        shard=shard,
        engine=shards.engine.value,
        progress=progress,
    )
    out.data(
        {"index": output, **vars(done), "left_out": dict(job.left_out)},
        f"{output}: {done.images} images; {done.added} embedded, {done.unchanged} unchanged"
        + (f", {done.copied} known under another path" if done.copied else ""),
    )
    if done.unfinished:
        out.message(
            f"{counted(done.unfinished, 'part')} of other shards not finished yet; the index gets all of them when the last one is"
        )
    for entry in done.unreadable[:_NAMED]:
        out.warning(f"{entry.file}: {entry.reason}")
    if done.unreadable:
        total = done.added + done.copied + done.unchanged + len(done.unreadable)
        raise DataError(
            f"{len(done.unreadable)} of {total} images could not be read; the rest is indexed",
            hint="see the warnings above; --json lists all"
            if len(done.unreadable) > _NAMED
            else "see the warnings above",
        )


@app.command(
    epilog=examples(
        "proxydet index info photos.index",
        "proxydet index info photos.index --json",
    )
)
def info(index: IndexFolder, json: Json = False) -> None:
    """Show what is in an index: images, regions, bytes, and the detector that made it."""
    from proxydet.errors import DataError
    from proxydet.index.build import IndexParts
    from proxydet.index.store import ADDING, StoredIndex
    from proxydet.inference.sharded import MANIFEST, load_job

    stored = StoredIndex(index)
    detector = stored.detector
    images = stored.images
    compact = detector.most_regions
    described = {
        "index": stored.path,
        "mode": "exact" if compact is None else f"compact, {compact} regions an image",
        "images": images,
        "regions": stored.regions,
        "bytes": stored.bytes,
        "bytes an image": round(stored.bytes / max(images, 1)),
        "parts": len(stored.parts),
        "weights": detector.weights,
        "dimensions": detector.dimension,
        "image sides": f"{detector.sides[0]}, at most {detector.sides[1]}",
        "precision": detector.inference.precision,
    }
    if (index / ADDING / MANIFEST).exists():
        with contextlib.suppress(DataError):
            job = load_job(index / ADDING, IndexParts(detector))
            finished = sum(record.images for record in job.finished().values())
            described["being added"] = f"{finished} of {job.images} images are finished"
    Output(json=json).data(described)
    stored.require_whole()


@app.command(
    epilog=examples(
        "proxydet index verify photos.index",
        "proxydet index verify photos.index --images",
    )
)
def verify(
    index: IndexFolder,
    images: Annotated[
        bool,
        typer.Option("--images", help="Compare the image files too: are they there, unchanged?"),
    ] = False,
    json: Json = False,
) -> None:
    """Compare every part of an index with its SHA-256; the exit code is 3 where something is wrong."""
    from proxydet.errors import DataError
    from proxydet.index.store import StoredIndex
    from proxydet_cli.progress import show_progress

    stored = StoredIndex(index)
    with show_progress().task("verifying", total=stored.bytes, unit="B") as task:
        wrong = stored.verify(images=images, progress=task.advance)
    out = Output(json=json)
    out.data({"index": index, "images": stored.images, "wrong": wrong}, "\n".join(wrong) or "sound")
    if wrong:
        raise DataError(
            f"{counted(len(wrong), 'problem')} in {index}",
            hint=f"restore the files; or proxydet index remove {index} --damaged, and index their images again",
            path=index,
        )


@app.command(
    epilog=examples(
        "proxydet index remove photos.index photos/2019/",
        "proxydet index remove photos.index --missing",
    )
)
def remove(
    index: IndexFolder,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE", help="Files, folders with all that is below them, or URLs of either."
        ),
    ] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Remove images whose files are not there any more.")
    ] = False,
    damaged: Annotated[
        bool,
        typer.Option(
            "--damaged",
            help="Remove the images of damaged parts (proxydet index verify), so that they can be indexed again.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Remove images from an index; image files are left alone."""
    from proxydet.errors import DataError
    from proxydet.index.store import IndexWriter, is_gone

    if not images and not missing and not damaged:
        raise typer.BadParameter("name images or folders, or give --missing or --damaged")
    places = [
        image.rstrip("/") if "://" in image else os.path.abspath(image)  # noqa: PTH100 links stay
        for image in images or ()
    ]
    with IndexWriter(index) as writer:
        removed = writer.remove_damaged() if damaged else 0
        chosen = [
            (part, row)
            for part, row in (writer.index.rows() if places or missing else ())
            for path in [part.path_of(row)]
            if any(
                path == place or path.startswith((place + os.sep, place + "/")) for place in places
            )
            or (missing and is_gone(path))
        ]
        if places and not chosen and not missing:
            raise DataError(
                f"none of these images is in {index}",
                hint="images are named by the paths that proxydet search shows",
                path=index,
            )
        removed += sum(writer.drop(part, row) for part, row in chosen)
        left = writer.images
    value = {"index": index, "removed": removed, "images": left}
    Output(json=json).data(value, f"{index}: {removed} images removed, {left} left")


@app.command(
    epilog=examples(
        "proxydet index merge monday.index tuesday.index -o week.index",
    )
)
def merge(
    indexes: Annotated[
        list[Path], typer.Argument(metavar="INDEX", help="Indexes of one detector, in one mode.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="INDEX", help="The index that gets the images of all of them."
        ),
    ],
    json: Json = False,
) -> None:
    """Put the images of several indexes into one; of an image in several the one that was changed last is kept.

    Where no time of change is known, as of objects in stores, the index that is named last counts.
    Started again after an interruption it continues: what is there is not added twice.
    """
    from proxydet.errors import DataError
    from proxydet.index.store import IndexWriter, StoredIndex, read_words
    from proxydet_cli.progress import show_progress

    opened = [StoredIndex(index) for index in indexes]
    if any(stored.path.resolve() == output.resolve() for stored in opened):
        raise DataError(
            f"{output} cannot be merged into itself",
            hint="leave it out of the list: what it holds stays",
            path=output,
        )
    for stored in opened[1:]:
        opened[0].detector.require_equal(stored.detector, stored.path)
    added = there = 0
    with (
        IndexWriter(output, opened[0].detector, read_words(opened[0].path)) as writer,
        show_progress().task("merging", total=len(opened), unit="indexes") as task,
    ):
        for stored in opened:
            new, old = writer.merge(stored)
            added, there = added + new, there + old
            task.advance()
        images = writer.images
    value = {"index": output, "added": added, "unchanged": there, "images": images}
    Output(json=json).data(
        value, f"{output}: {images} images; {added} added, {there} already in it"
    )


@app.command(
    epilog=examples(
        "proxydet index approximate photos.index",
    )
)
def approximate(index: IndexFolder, json: Json = False) -> None:
    """Build what proxydet search --approximate needs, for many millions of regions; it serves until images are added or removed."""
    from proxydet.index.store import StoredIndex, require_faiss
    from proxydet_cli.progress import show_progress

    require_faiss()
    StoredIndex(index).require_whole()
    from proxydet.index.search import RegionIndex

    file = RegionIndex(index).build_approximate(show_progress())
    size = file.stat().st_size
    Output(json=json).data({"file": file, "bytes": size}, f"{file}: {size_text(size)}")
