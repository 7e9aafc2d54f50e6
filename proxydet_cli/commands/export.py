"""``proxydet export``: a detector as a file that runs without detectron2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from proxydet_cli.opening import check_choice, chosen_vocabulary, open_detector
from proxydet_cli.options import (
    Background,
    Classes,
    Json,
    ModelConfig,
    NamesFile,
    OneLabel,
    Run,
    VocabularySource,
    Weights,
    Yes,
    command_app,
    examples,
)

app = command_app()

OutputFile = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="FILE", help="The file: .onnx or .pt2.", rich_help_panel="File"
    ),
]
FileFormat = Annotated[
    Literal["onnx", "torch"] | None,
    typer.Option(
        "--format",
        help="onnx, for onnxruntime; torch, a program of torch.export. [default: by the file's suffix]",
        rich_help_panel="File",
    ),
]
Check = Annotated[
    list[Path] | None,
    typer.Option(
        "--check",
        metavar="IMAGE",
        help="Compare with the detector on this image too; may be repeated.",
        rich_help_panel="File",
    ),
]
Opset = Annotated[
    int,
    typer.Option(
        "--opset", metavar="N", help="ONNX operator set, 18 to 21.", rich_help_panel="File"
    ),
]


@app.command(
    epilog=examples(
        "proxydet export --output detector.onnx",
        "proxydet export --run runs/quickstart -o shapes.onnx -v 'red circle, blue star'",
        "proxydet export --weights model_final.pth --config swinb -o detector.pt2 --check photo.jpg",
    )
)
def export(
    output: OutputFile,
    run: Run = None,
    weights: Weights = None,
    config: ModelConfig = None,
    format: FileFormat = None,
    classes: Classes = None,
    vocabulary: VocabularySource = None,
    names: NamesFile = None,
    background: Background = None,
    check: Check = None,
    one_label: OneLabel = True,
    opset: Opset = 18,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Write a detector into a file that runs without detectron2.

    The file takes any vocabulary and images of any size. It is compared with the detector before it is kept. With -v
    or --vocabulary, these classes are saved next to it as .npz, for use where there is no text encoder.
    """
    from proxydet.models import find_detector
    from proxydet_cli.output import Output

    out = Output(json=json)
    check_choice(classes, vocabulary, names, background)
    named = find_detector(run=run, weights=weights, config=config)
    from proxydet.export.exporter import export_detector

    detector = open_detector(named, classes, vocabulary, device="cpu", yes=yes)
    detector = detector.with_settings(agnostic_nms=one_label)
    given = (classes, vocabulary, background) != (None, None, None)
    report = export_detector(
        detector,
        output,
        format=format,
        opset=opset,
        check=check or (),
        vocabulary=chosen_vocabulary(
            detector, classes, vocabulary, names, background=background, yes=yes
        )
        if given
        else None,
        progress=out.message,
    )
    lines = [f"{report.path}: {report.bytes / 1e6:.1f} MB, exported in {report.seconds:.0f} s"]
    if report.vocabulary is not None:
        lines.append(f"{report.vocabulary}: the vocabulary")
    lines += [
        f"{result.image}, {result.classes} classes: {result.matched} of {result.detections} detections the same, "
        f"scores within {result.largest_score_difference:.1e}"
        + (
            ", boxes only"
            if result.largest_mask_difference is None
            else f", masks within {result.largest_mask_difference:.1e}"
        )
        for result in report.agreement
    ]
    out.data(report, "\n".join(lines))
