"""``proxydet vocab``: text embeddings of class names, and what the classes resemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.opening import (
    Background,
    Classes,
    ClassOptions,
    DetectorOptions,
    NamedOptions,
    confirm_names,
    fetch_published,
    open_detector,
)
from proxydet_cli.options import Json, Yes, command_app, examples, given_options, panel
from proxydet_cli.output import Output

if TYPE_CHECKING:
    from proxydet.vocabulary.comparison import VocabularyReport
    from proxydet.vocabulary.vocabulary import TextEncoder, Vocabulary

app = command_app("Make, mix and inspect vocabularies: class names with their text embeddings.")

OutputFile = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="The vocabulary (.vocab, .npz).")
]
EncoderFile = Annotated[
    Path | None,
    typer.Option(
        "--encoder",
        metavar="FILE",
        help="CLIP weights (.pt, .safetensors) or a synthetic dataset's text_encoder.json. [default: CLIP ViT-B/32 where "
        "proxydet download puts it]",
    ),
]
ModelName = Annotated[
    str, typer.Option("--model", metavar="NAME", help="open_clip's name of the encoder's model.")
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="SET|TEXT",
        help="published (a {}), photo, ensemble, or a sentence with {} for the name.",
    ),
]
NamesFile = Annotated[
    Path | None,
    typer.Option("--names", metavar="FILE", help="Class names of a .npy table, one a row."),
]
_exemplars = panel("Exemplars")


@app.command(
    epilog=examples(
        "proxydet vocab build names.txt -o kitchen.vocab",
        "proxydet vocab build names.txt -o kitchen.vocab --prompts ensemble",
        "proxydet vocab build instances_train.json -o pets.vocab",
        "proxydet vocab build names.txt -o kitchen.vocab --descriptions kitchen.yaml",
        "proxydet vocab build --exemplars shots/ --run runs/quickstart -o shots.vocab",
        "proxydet vocab build --exemplars few.json --fuse --weights proxydet-r50-inl --statistics photos/ -o few.vocab",
        "proxydet vocab build --exemplars few.json --fuse --image-tower -o few.vocab",
    )
)
def build(
    context: typer.Context,
    output: OutputFile,
    names: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="One class a line, synonyms behind |: couch | sofa. Or YAML or JSON: a list, names with synonyms, the data.yaml "
            "of a YOLO data set, a COCO annotation file. With --exemplars: further classes. [default: the classes of --descriptions]",
            show_default=False,
        ),
    ] = None,
    *,
    encoder: EncoderFile = None,
    model: ModelName = "ViT-B-32-quickgelu",
    prompts: Prompts = "published",
    descriptions: Annotated[
        Path | None,
        typer.Option(
            "--descriptions",
            metavar="FILE",
            help="YAML or JSON: for each class a list of sentences, or synonyms, sentences, descriptions and templates.",
        ),
    ] = None,
    description_weight: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of sentences and descriptions in the embedding of a class that has some; the rest is its names.",
        ),
    ] = 0.5,
    hierarchy: Annotated[
        Path | None,
        typer.Option(
            "--hierarchy",
            metavar="FILE",
            help="YAML or JSON tree of classes, or COCO's categories: adds sentences that say what a class is a kind of.",
        ),
    ] = None,
    exemplars: Annotated[
        Path | None,
        _exemplars(
            "--exemplars",
            metavar="FOLDER|FILE",
            help="What the classes look like: a folder with one subfolder of crops for each class, or annotated images (any format "
            "of proxydet data, or a dataset config). A few of each class will do.",
        ),
    ] = None,
    fuse: Annotated[
        bool, _exemplars("--fuse", help="Make each class of its exemplars and of its name.")
    ] = False,
    image_tower: Annotated[
        bool,
        _exemplars(
            "--image-tower",
            help="Let CLIP's image tower see the exemplars: classes for any detector that was trained with its text embeddings. With "
            "--run or --weights, the mean of these and of what that detector sees.",
        ),
    ] = False,
    split: Annotated[
        str | None,
        _exemplars(
            "--split",
            metavar="train|val|test",
            help="Part of annotated exemplars. [default: the first that there is]",
        ),
    ] = None,
    most: Annotated[
        int,
        _exemplars("--most", min=1, help="Exemplars of a class that are used, chosen at random."),
    ] = 100,
    statistics: Annotated[
        Path | None,
        _exemplars(
            "--statistics",
            metavar="IMAGES",
            help="Images, best annotated ones, that show how the detector sees its training classes; computed once and stored. "
            "[default: the stored ones, the run's training images, else the exemplars' own] With --image-tower: what else there is.",
        ),
    ] = None,
    detector_options: DetectorOptions,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Embed class names, or make classes of exemplars.

    Embeddings of names are kept in a cache by content: what was embedded once is not computed again. Exemplars are embedded by the
    detector that will look for them, or by CLIP.
    """
    from proxydet.errors import VocabularyError
    from proxydet.vocabulary.descriptions import (
        describe,
        describe_coverage,
        read_descriptions,
        read_hierarchy,
        with_hierarchy,
    )
    from proxydet.vocabulary.encoder import open_encoder
    from proxydet.vocabulary.names import ClassWords, quote_names, read_names
    from proxydet.vocabulary.sources import any_names, complete_vocabulary
    from proxydet.vocabulary.vocabulary import build_vocabulary, find_prompts
    from proxydet_cli.commands.download import with_downloads
    from proxydet_cli.progress import show_progress

    _check_output(output)
    find_prompts(prompts)
    if exemplars is None and (
        given := given_options(
            context, "fuse", "image_tower", "split", "most", "statistics", NamedOptions
        )
    ):
        raise typer.BadParameter(f"{given[0]} requires --exemplars")
    out = Output(json=json)
    notes: list[str] = []
    described = read_descriptions(descriptions) if descriptions is not None else ()
    if names is not None:
        confirm_names(names)
        classes = read_names(names)
        if descriptions is not None:
            found = describe(classes, described)
            classes, notes = found.classes, describe_coverage(found, descriptions)
    elif descriptions is None and exemplars is None:
        raise typer.BadParameter("give a FILE of class names, --descriptions or --exemplars")
    else:
        classes = described
    if hierarchy is not None:
        found = with_hierarchy(classes, read_hierarchy(hierarchy))
        classes, notes = found.classes, notes + describe_coverage(found, hierarchy)

    progress = show_progress()

    def opened() -> TextEncoder:
        return with_downloads(
            lambda: open_encoder(encoder, model=model, progress=progress), yes=yes
        )

    if exemplars is None:
        made = build_vocabulary(
            classes, opened(), prompts=prompts, description_weight=description_weight
        )
    else:
        # What can be refused is refused before torch is loaded, which takes seconds.
        from proxydet.inference.exemplars import (
            build_from_exemplars,
            build_in_clip,
            find_exemplars,
            find_statistics_images,
            region_statistics,
        )
        from proxydet.vocabulary.encoder import ClipTextEncoder

        named = None
        if not image_tower or given_options(context, NamedOptions):
            named = detector_options.find()
        shown = find_exemplars(exemplars, split=split, most=most, progress=progress)
        said = {entry.name: entry for entry in classes}
        lost = [name for name in shown.names if name in said and not said[name].plain]
        if lost and not fuse:
            raise VocabularyError(
                f"synonyms and descriptions of {quote_names(lost)} would be lost: these classes are made of their exemplars alone",
                hint="--fuse makes them of both; or leave them out of the files of names and descriptions",
            )
        others = (
            None if statistics is None else find_statistics_images(statistics, progress=progress)
        )
        clip = opened() if encoder is not None or image_tower else None
        if image_tower and not isinstance(clip, ClipTextEncoder):
            raise VocabularyError(
                f"{encoder} is the text encoder of a synthetic dataset, which has no image tower",
                hint="give CLIP's weights: --encoder FILE; or leave out --image-tower",
            )
        detector = None
        if named is not None:
            detector = open_detector(named, device=detector_options.device, yes=yes)
        known = (
            build_vocabulary(any_names(), clip or opened())
            if detector is None
            else detector.vocabulary
        )

        def text_of(wanted: Sequence[str]) -> Vocabulary:
            def embedded() -> Vocabulary:
                return complete_vocabulary(
                    [said.get(name, ClassWords(name)) for name in wanted],
                    known,
                    lambda: clip or (opened() if detector is None else detector.encoder),
                    prompts=prompts,
                    description_weight=description_weight,
                )

            made = with_downloads(embedded, yes=yes)
            return made if detector is None else detector.with_base(made)

        fused = text_of if fuse else None
        in_clip = None
        if image_tower and isinstance(clip, ClipTextEncoder):
            if clip.dim != known.dimension:
                raise VocabularyError(
                    f"CLIP's embeddings have {clip.dim} dimensions, those of the detector's training {known.dimension}",
                    hint="leave out --image-tower; or give the CLIP of its training: --encoder FILE --model NAME",
                )
            in_clip = build_in_clip(
                clip,
                shown,
                known,
                others=others,
                text_of=fused if detector is None else None,
                progress=progress,
            ).vocabulary
        if detector is not None:
            measured = region_statistics(detector, others, otherwise=shown, progress=progress)
            made = build_from_exemplars(
                detector, shown, measured, text_of=fused, images=in_clip, progress=progress
            ).vocabulary
        else:
            assert in_clip is not None
            made = in_clip
        if further := [name for name in said if name not in made.names]:
            made = made.joined(text_of(further))
    made.save(output)
    for note in notes:
        out.warning(note)
    _report(out, made, output, notes)


def _check_output(output: Path) -> None:
    from proxydet.errors import VocabularyError
    from proxydet.vocabulary.sources import SAVED_SUFFIXES

    if output.suffix not in SAVED_SUFFIXES:
        raise VocabularyError(
            f"the vocabulary's file {output} must end in {' or '.join(SAVED_SUFFIXES)}",
            hint=f"write to {output.with_suffix('.vocab')}",
        )


def _report(out: Output, made: Vocabulary, output: Path, notes: Sequence[str]) -> None:
    value = {
        "file": output,
        "classes": len(made),
        "dimensions": made.dimension,
        "digest": made.digest,
    }
    if notes:
        value["notes"] = list(notes)
    out.data(value, f"{output}: {len(made)} classes, {made.dimension} dimensions")


@app.command(
    epilog=examples(
        "proxydet vocab mix lvis lvis-descriptions -o described.vocab",
        "proxydet vocab mix lvis lvis-descriptions --weights 0.3,0.7 -o described.vocab",
        "proxydet vocab mix kitchen.vocab garden.vocab --union -o home.vocab",
        "proxydet vocab mix lvis coco objects365 --union --merge-above 0.95 -o many.vocab",
    )
)
def mix(
    tables: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|FILE...",
            help="Vocabularies: published ones, files of build (.vocab, .npz), or tables of embeddings (.npy, with --names).",
        ),
    ],
    output: OutputFile,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="A,B,...",
            help="Weight of each table, in their order. [default: all alike]",
        ),
    ] = None,
    union: Annotated[
        bool,
        typer.Option(
            "--union",
            help="Keep the classes of all tables, and mix those that are in several; otherwise all must have the same.",
        ),
    ] = False,
    merge_above: Annotated[
        float | None,
        typer.Option(
            min=-1.0,
            max=1.0,
            help="Leave classes out whose cosine with an earlier one is above this: near-duplicates.",
        ),
    ] = None,
    names: NamesFile = None,
    encoder: EncoderFile = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Mix tables of the same classes, or join those of different ones.

    Classes are matched by name, and embeddings are normalised before they are averaged. Tables of other text encoders are refused.
    """
    from proxydet.vocabulary.sources import check_source
    from proxydet.vocabulary.sources import mix as mix_tables
    from proxydet_cli.commands.download import with_downloads

    _check_output(output)
    for source in tables:
        check_source(source)
    if weights is not None:
        try:
            shares = [float(part) for part in weights.split(",")]
        except ValueError as error:
            raise typer.BadParameter(f"{weights!r} is not a list of numbers: 0.3,0.7") from error
    repeated = [source for i, source in enumerate(tables) if source in tables[:i]]
    if repeated or (len(tables) < 2 and merge_above is None):
        raise typer.BadParameter(
            f"{repeated[0]} is named twice" if repeated else "name two vocabularies or more"
        )
    if names is not None and not any(source.endswith(".npy") for source in tables):
        raise typer.BadParameter("--names requires a .npy table")

    def opened() -> dict[str, Vocabulary]:
        return {
            source: _open(source, encoder, names=names if source.endswith(".npy") else None)
            for source in tables
        }

    made = mix_tables(
        with_downloads(opened, yes=yes),
        None if weights is None else shares,
        union=union,
        merge_above=merge_above,
    )
    made.vocabulary.save(output)
    out = Output(json=json)
    for note in made.notes:
        out.message(note)
    _report(out, made.vocabulary, output, made.notes)


@app.command(
    epilog=examples(
        "proxydet vocab calibrate --run runs/quickstart --data pets.toml -o pets.vocab",
        "proxydet vocab calibrate -v 'cup, plate' --data kitchen.json -o kitchen.vocab --precision 0.9",
        "proxydet vocab calibrate kitchen.vocab --data kitchen.toml --split val -o kitchen-calibrated.vocab",
        "proxydet vocab calibrate --run runs/quickstart --data pets.toml --scores -o pets.vocab",
    )
)
def calibrate(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "--dataset",
            metavar="FILE",
            help="Annotated images: a dataset config, or annotations of any format.",
        ),
    ],
    output: OutputFile,
    *,
    vocabulary: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME|FILE]",
            help="lvis, coco, objects365, openimages, or a file of names or of build. [default: the classes of the training]",
        ),
    ] = None,
    classes: Classes = None,
    background: Background = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", metavar="val|test|train", help="Which images. [default: val, else the only]"
        ),
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            "--precision",
            min=0.0,
            max=1.0,
            help="Share of detections to be right. [default: the best balance of precision and recall, F1]",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            min=0.0,
            max=1.0,
            help="Share of found objects to keep, instead of --precision.",
        ),
    ] = None,
    score_threshold: Annotated[
        float,
        typer.Option(
            "--score-threshold", min=0.0, max=1.0, help="The general threshold to compare with."
        ),
    ] = 0.3,
    scores: Annotated[
        bool,
        typer.Option(
            "--scores",
            help="Calibrate the scores too, so that a detection that scores 0.7 is right in 70 of 100 cases: a scale and a bias of each "
            "class.",
        ),
    ] = False,
    even_if_worse: Annotated[
        bool,
        typer.Option(
            "--even-if-worse",
            help="Save what was learned also where it is worse on images that it was not learned from.",
        ),
    ] = False,
    model: DetectorOptions,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Learn a threshold for each class from a few annotated images.

    A detection of a class must then score above the class's own threshold, in predict, serve, export and Python; eval reports what
    that brings. Classes with few objects share what is learned from all; those without any have the shared threshold. What is worse
    on images that it was not learned from is not saved, with a warning.
    """
    from proxydet.data.sources import open_config
    from proxydet.evaluation.split import DescribedSplit
    from proxydet.models import settings_of, trained_classes
    from proxydet.vocabulary.names import quote_names
    from proxydet_cli.progress import show_progress

    _check_output(output)
    asked = ClassOptions(classes=classes, vocabulary=vocabulary, background=background)
    asked.check()
    if precision is not None and keep is not None:
        raise typer.BadParameter("give either --precision or --keep")
    described = open_config(data)
    parts = [part for part in ("val", "test", "train") if getattr(described, part) is not None]
    chosen = split or ("val" if "val" in parts or len(parts) != 1 else parts[0])
    described.split(chosen)
    named, progress = model.find(), show_progress()
    opened = DescribedSplit.open(described, chosen, progress=progress)
    fetch_published(named, asked, yes=yes)
    # Marked base as predict will. Torch is loaded when all that can be refused was refused.
    wanted = asked.open(trained_classes(named), yes=yes)
    opened.annotated(wanted.reported)
    settings = settings_of(named).inference
    opened.check_calibration(settings, precision=precision, keep=keep, scores=scores)
    detector = open_detector(named, asked, device=model.device, yes=yes)
    from proxydet.evaluation.analysis import operating_rows
    from proxydet.evaluation.scorers import calibrate_vocabulary

    report = calibrate_vocabulary(
        detector,
        opened,
        wanted,
        precision=precision,
        keep=keep,
        score_threshold=score_threshold,
        scores=scores,
        even_if_worse=even_if_worse,
        progress=progress,
    )
    report.vocabulary.save(output)
    out = Output(json=json)
    points = [asdict(point) for point in report.points]
    if out.json:
        rows = [asdict(entry) for entry in report.classes]
        value = {"file": output, "images": report.images, "classes": rows}
        if precision is not None:
            value["precision_reached"] = report.reached
        value |= {"worse_on_other_images": report.worse, "thresholds_saved": report.saved}
        if report.scores is not None:
            value["scores"] = asdict(report.scores)
        out.data({**value, "operating_points": points, "not_asked": report.not_asked})
    else:
        out.table(
            [
                {
                    "class": entry.name,
                    "objects": entry.objects,
                    "threshold": round(entry.threshold, 3),
                    "learned from": _BASES[entry.basis],
                    "right": f"{entry.right_before} -> {entry.right}",
                    "wrong": f"{entry.wrong_before} -> {entry.wrong}",
                }
                for entry in report.classes
            ]
        )
        out.data(None, "")
        out.table(operating_rows(points))
    saved = "they are saved all the same" if even_if_worse else "they are not saved"
    hint = "calibrate on more images" + ("" if even_if_worse else ", or add --even-if-worse")
    if (change := report.scores) is not None:
        out.message(
            f"calibration error of scores learned from other images: {change.error_before:.3f} -> {change.error:.3f}; "
            f"box AP of the same boxes: {100 * change.ap_before:.1f} -> {100 * change.ap:.1f}"
        )
        if not change.saved:
            out.warning(
                f"the calibrated scores are not better on images that they were not learned from: {saved}; {hint}"
            )
    if report.worse:
        out.warning(
            f"on images that they were not learned from the thresholds do worse than the general one, {score_threshold:g}: {saved}; {hint}"
        )
    if not report.reached:
        out.warning(
            f"no thresholds reach a precision of {precision:g} on these images: these are the ones with the highest"
        )
    if report.not_asked:
        out.message(f"annotated, but not asked for: {quote_names(report.not_asked)}")
    out.message(f"{output}: {len(report.classes)} classes, from {report.images} images")


_BASES = {"own": "its own", "few": "few of its own, and all", "shared": "all: it has none"}


@app.command(
    epilog=examples(
        "proxydet vocab show kitchen.vocab",
        "proxydet vocab show names.txt --against coco",
        "proxydet vocab show kitchen.vocab --run runs/quickstart --json",
        "proxydet vocab show lvis-exemplars --against lvis-descriptions",
    )
)
def show(
    vocabulary: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help="A published vocabulary (lvis, coco, lvis-descriptions, ...), or a file: of names (see build), of build, of mix, or of "
            "embeddings (.npy, with --names).",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="NAME|FILE", help="Vocabulary of the training. [default: lvis]"
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FOLDER", help="Take the training vocabulary of a run."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=-1.0, max=1.0, help="Cosine above which a class counts as base.")
    ] = 0.9,
    neighbours: Annotated[int, typer.Option(min=1, help="Training classes to name for each.")] = 3,
    alike_above: Annotated[
        float, typer.Option(min=-1.0, max=1.0, help="Report pairs of classes more alike than this.")
    ] = 0.95,
    names: NamesFile = None,
    encoder: EncoderFile = None,
    json: Json = False,
) -> None:
    """Show what each class resembles, whether it counts as base or novel and why, what is too alike, and what CLIP would cut."""
    from proxydet.errors import VocabularyError
    from proxydet.models import run_vocabulary
    from proxydet.paths import require_run
    from proxydet.vocabulary.comparison import compare
    from proxydet.vocabulary.sources import check_source
    from proxydet.vocabulary.vocabulary import names_too_long

    if run is not None and against is not None:
        raise typer.BadParameter("give either --against or --run")
    check_source(vocabulary)
    if run is not None:
        reference = run_vocabulary(require_run(run))
    else:
        try:
            reference = _open(against or "lvis", encoder)
        except VocabularyError as error:
            if against is None:
                error.hint = f"{error.hint}; or compare with the training of yours: --run FOLDER"
            raise
    shown = _open(vocabulary, encoder, names=names, known=reference)
    report = compare(
        shown, reference, threshold=threshold, neighbours=neighbours, alike_above=alike_above
    )
    _render(Output(json=json), report, names_too_long(shown.names), shown)


def _open(
    source: str,
    encoder: Path | None,
    *,
    names: Path | None = None,
    known: Vocabulary | None = None,
) -> Vocabulary:
    from proxydet.vocabulary.encoder import open_encoder
    from proxydet.vocabulary.sources import open_vocabulary

    def opened() -> TextEncoder:
        return open_encoder(encoder)

    return open_vocabulary(source, encoder=opened, names=names, known=known)


def _render(
    out: Output, report: VocabularyReport, cut: Mapping[str, int], vocabulary: Vocabulary
) -> None:
    from proxydet.vocabulary.vocabulary import CLIP_TOKENS

    scorers = [
        {
            name: None if value != value else value
            for name, value in zip(vocabulary.scorers, row, strict=True)
        }
        for row in zip(*(values.tolist() for values in vocabulary.scorers.values()), strict=True)
    ]
    if out.json:
        rows = [{"name": n, "tokens": count, "read": CLIP_TOKENS} for n, count in cut.items()]
        own = (
            {}
            if vocabulary.plain
            else {"scorers": dict(zip(vocabulary.names, scorers, strict=True))}
        )
        out.data({**asdict(report), "cut": rows, **own})
        return
    out.table(
        [
            {
                "class": entry.name,
                **({} if vocabulary.plain else scorer),
                "counts as": "base" if entry.base else "novel",
                "nearest": ", ".join(
                    f"{near.name} {near.cosine:.3f}{'' if near.base else ' (novel)'}"
                    for near in entry.nearest
                ),
                "why": entry.reason,
            }
            for entry, scorer in zip(report.classes, scorers, strict=True)
        ]
    )
    for pair in report.alike:
        out.warning(
            f"hard to tell apart: {pair.first!r} and {pair.second!r} (cosine {pair.cosine:.3f})"
        )
    for name, tokens in cut.items():
        out.warning(
            f"too long for CLIP, which reads {CLIP_TOKENS} tokens: {name[:60]!r}... has {tokens}"
        )
    if report.shared:
        out.message(
            f"{report.shared} classes are in both vocabularies; of {100 * (report.nearest_is_own or 0):.1f} % the nearest is the one "
            "of the same name"
        )
