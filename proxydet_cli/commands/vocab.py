"""``proxydet vocab``: text embeddings of class names, and what the classes resemble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.opening import confirm_names
from proxydet_cli.options import Json, command_app, examples

if TYPE_CHECKING:
    from proxydet.vocabulary.comparison import VocabularyReport
    from proxydet.vocabulary.vocabulary import TextEncoder, Vocabulary
    from proxydet_cli.output import Output

app = command_app("Make and inspect vocabularies: class names with their text embeddings.")

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


@app.command(
    epilog=examples(
        "proxydet vocab build names.txt -o kitchen.vocab",
        "proxydet vocab build names.txt -o kitchen.vocab --prompts ensemble",
        "proxydet vocab build instances_train.json -o pets.vocab",
    )
)
def build(
    names: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="One class a line, synonyms behind |: couch | sofa. Or YAML or JSON: a list, names with synonyms, the data.yaml "
            "of a YOLO data set, a COCO annotation file.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The vocabulary (.vocab, .npz).")
    ],
    encoder: EncoderFile = None,
    model: ModelName = "ViT-B-32-quickgelu",
    prompts: Prompts = "published",
    json: Json = False,
) -> None:
    """Embed class names.

    Embeddings are kept in a cache by content: what was embedded once is not computed again.
    """
    from proxydet.errors import VocabularyError
    from proxydet.vocabulary.encoder import open_encoder
    from proxydet.vocabulary.names import read_names
    from proxydet.vocabulary.sources import SAVED_SUFFIXES
    from proxydet.vocabulary.vocabulary import build_vocabulary
    from proxydet_cli.output import Output
    from proxydet_cli.progress import show_progress

    if output.suffix not in SAVED_SUFFIXES:
        raise VocabularyError(
            f"the vocabulary's file {output} must end in {' or '.join(SAVED_SUFFIXES)}",
            hint=f"write to {output.with_suffix('.npz')}",
        )
    confirm_names(names)
    classes = read_names(names)
    opened = open_encoder(encoder, model=model, progress=show_progress())
    made = build_vocabulary(classes, opened, prompts=prompts)
    made.save(output)
    value = {
        "file": output,
        "classes": len(made),
        "dimensions": made.dimension,
        "digest": made.digest,
    }
    Output(json=json).data(value, f"{output}: {len(made)} classes, {made.dimension} dimensions")


@app.command(
    epilog=examples(
        "proxydet vocab show kitchen.vocab",
        "proxydet vocab show names.txt --against coco",
        "proxydet vocab show kitchen.vocab --run runs/quickstart --json",
    )
)
def show(
    vocabulary: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help="lvis, coco, objects365, openimages, or a file: of names (see build), of build, or of embeddings (.npy, with --names).",
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
        float,
        typer.Option(min=-1.0, max=1.0, help="Cosine above which a class counts as base."),
    ] = 0.9,
    neighbours: Annotated[int, typer.Option(min=1, help="Training classes to name for each.")] = 3,
    alike_above: Annotated[
        float, typer.Option(min=-1.0, max=1.0, help="Report pairs of classes more alike than this.")
    ] = 0.95,
    names: Annotated[
        Path | None,
        typer.Option("--names", metavar="FILE", help="Class names of a .npy table, one a row."),
    ] = None,
    encoder: EncoderFile = None,
    json: Json = False,
) -> None:
    """Show what each class resembles, whether it counts as base or novel and why, what is too alike, and what CLIP would cut."""
    from proxydet.paths import require_run
    from proxydet.vocabulary.comparison import compare
    from proxydet.vocabulary.sources import check_source
    from proxydet.vocabulary.vocabulary import Vocabulary, names_too_long
    from proxydet_cli.output import Output

    if run is not None and against is not None:
        raise typer.BadParameter("give either --against or --run")
    check_source(vocabulary)
    if run is not None:
        reference = Vocabulary.load(require_run(run) / "vocabulary.npz")
    else:
        reference = _training_vocabulary(against, encoder)
    shown = _open(vocabulary, encoder, names=names, known=reference)
    report = compare(
        shown, reference, threshold=threshold, neighbours=neighbours, alike_above=alike_above
    )
    _render(Output(json=json), report, names_too_long(shown.names))


def _training_vocabulary(against: str | None, encoder: Path | None) -> Vocabulary:
    from proxydet.errors import VocabularyError

    try:
        return _open(against or "lvis", encoder)
    except VocabularyError as error:
        if against is not None:
            raise
        raise VocabularyError(
            error.message,
            hint=f"{error.hint}; or compare with the training of yours: --run FOLDER",
            path=error.path,
        ) from error


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


def _render(out: Output, report: VocabularyReport, cut: Mapping[str, int]) -> None:
    from proxydet.vocabulary.vocabulary import CLIP_TOKENS

    if out.json:
        rows = [{"name": n, "tokens": count, "read": CLIP_TOKENS} for n, count in cut.items()]
        out.data({**asdict(report), "cut": rows})
        return
    out.table(
        [
            {
                "class": entry.name,
                "counts as": "base" if entry.base else "novel",
                "nearest": ", ".join(
                    f"{near.name} {near.cosine:.3f}{'' if near.base else ' (novel)'}"
                    for near in entry.nearest
                ),
                "why": entry.reason,
            }
            for entry in report.classes
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
