"""``proxydet export``: a detector as a file that runs without detectron2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from proxydet.wording import size_text
from proxydet_cli.opening import ClassOptions, NamedOptions, open_detector
from proxydet_cli.options import Json, OneLabel, Yes, command_app, examples, panel
from proxydet_cli.output import Output

app = command_app()

_file = panel("File")


@app.command(
    epilog=examples(
        "proxydet export --output detector.onnx",
        "proxydet export --run runs/quickstart -o shapes.onnx -v 'red circle, blue star'",
        "proxydet export --weights model_final.pth --config swinb -o detector.pt2 --check photo.jpg",
    )
)
def export(
    output: Annotated[
        Path, _file("--output", "-o", metavar="FILE", help="The file: .onnx or .pt2.")
    ],
    model: NamedOptions,
    *,
    format: Annotated[
        Literal["onnx", "torch"] | None,
        _file(
            "--format",
            help="onnx, for onnxruntime; torch, a program of torch.export. [default: by the file's suffix]",
        ),
    ] = None,
    classes: ClassOptions,
    check: Annotated[
        list[Path] | None,
        _file(
            "--check",
            metavar="IMAGE",
            help="Compare with the detector on this image too; may be repeated.",
        ),
    ] = None,
    one_label: OneLabel = True,
    opset: Annotated[int, _file("--opset", metavar="N", help="ONNX operator set, 18 to 21.")] = 18,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Write a detector into a file that runs without detectron2.

    The file takes any vocabulary and images of any size. It is compared with the detector before it is kept. With -v
    or --vocabulary, these classes are saved next to it as .npz, for use where there is no text encoder.
    """
    out = Output(json=json)
    classes.check()
    named = model.find()
    from proxydet.export.exporter import export_detector

    detector = open_detector(named, classes, device="cpu", yes=yes)
    detector = detector.with_settings(agnostic_nms=one_label)
    report = export_detector(
        detector,
        output,
        format=format,
        opset=opset,
        check=check or (),
        vocabulary=classes.open(detector, yes=yes) if classes.given else None,
        progress=out.message,
    )
    lines = [f"{report.path}: {size_text(report.bytes)}, exported in {report.seconds:.0f} s"]
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
