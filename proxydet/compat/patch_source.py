"""Finds detectron2's RoIAlign call in a source text, says what it is, and writes the published change into it.

The call is found in the syntax tree: line numbers, comments and layout do not matter. The text is edited by bytes
at the positions that the tree gives, so nothing else of the file changes. The published change (detectron2 issue
4723) has three parts, each told apart here: features and boxes cast to half and then to double, and the result
cast back to the dtype of the features.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from typing import Literal

SourceState = Literal["original", "applied", "half", "altered"]
"""As detectron2 ships it; with the published change; with a part of it; anything else."""

_PARTS = ("features", "boxes", "result")
_CAST = ".half().double()"
_SETTINGS = ("output_size", "spatial_scale", "sampling_ratio", "aligned")


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The one call of ``roi_align`` and the three places that the change touches."""

    features: ast.expr
    boxes: ast.expr
    returned: ast.expr
    call: ast.Call
    feature_name: str
    box_name: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a source text holds."""

    state: SourceState
    """Which code it is."""

    reason: str
    """Why it counts as that, one sentence."""

    line: int | None = None
    """Line of the call, from 1; None where there is none."""


class _NotExpected(Exception):
    """The code is not detectron2's; the argument says how."""


def read_source(source: bytes) -> Reading:
    """Tell which RoIAlign a source text holds.

    Args:
        source: The content of ``detectron2/layers/roi_align.py``.

    Returns:
        Its state and the reason.
    """
    try:
        call = _find_call(source)
        parts = {
            "features": _state_of_features(call),
            "boxes": _state_of_boxes(call),
            "result": _state_of_result(call),
        }
    except _NotExpected as reason:
        return Reading(state="altered", reason=str(reason))
    line = call.call.lineno
    found = set(parts.values())
    if found == {False}:
        return Reading(state="original", reason="the call is detectron2's own", line=line)
    if found == {True}:
        return Reading(state="applied", reason="the call carries the published change", line=line)
    done = ", ".join(name for name in _PARTS if parts[name])
    missing = ", ".join(name for name in _PARTS if not parts[name])
    return Reading(
        state="half",
        reason=f"only a part of the published change is there: {done}, but not {missing}",
        line=line,
    )


def with_change(source: bytes) -> bytes:
    """Write the published change into an original source text.

    Args:
        source: A text whose state is ``original``.

    Returns:
        The changed text.

    Raises:
        ValueError: The text is not in that state.
    """
    reading = read_source(source)
    if reading.state != "original":
        raise ValueError(f"the source is not detectron2's original: {reading.reason}")
    call = _find_call(source)
    starts = _line_starts(source)
    boxes = (call.box_name + _CAST).encode()
    result = f".to(dtype={call.feature_name}.dtype)".encode()
    edits = [
        (*_span(call.features, starts), (call.feature_name + _CAST).encode()),
        (*_span(call.boxes, starts), boxes),
        (_span(call.call, starts)[1], _span(call.call, starts)[1], result),
    ]
    for start, end, text in sorted(edits, reverse=True):
        source = source[:start] + text + source[end:]
    return source


def expected_text(source: bytes) -> bytes | None:
    """Rewrite a text as detectron2 has it, to show what was expected.

    Args:
        source: A text in any state.

    Returns:
        The text with the original call in place of its own, or with the original method where no call can be told;
        None where there is no such method.
    """
    starts = _line_starts(source)
    try:
        call = _find_call(source)
    except _NotExpected:
        return _with_expected_method(source, starts)
    start, end = _span(call.returned, starts)
    indent = " " * (call.call.col_offset - len("return "))
    return source[:start] + _expected_call(indent).encode() + source[end:]


def _with_expected_method(source: bytes, starts: list[int]) -> bytes | None:
    try:
        method = _find_method(source)
    except _NotExpected:
        return None
    margin = " " * method.col_offset
    text = f"def forward(self, input, rois):\n{margin}    return {_expected_call(margin + '    ')}"
    start, end = _span(method, starts)
    return source[:start] + text.encode() + source[end:]


def _expected_call(indent: str) -> str:
    arguments = ["input", "rois.to(dtype=input.dtype)", *(f"self.{name}" for name in _SETTINGS)]
    return "\n".join(["roi_align(", *(f"{indent}    {a}," for a in arguments), f"{indent})"])


def diff(before: bytes, after: bytes, name: str, labels: tuple[str, str]) -> str:
    """Unified diff of two source texts.

    Args:
        before: The text of the left side.
        after: The text of the right side.
        name: The file's name.
        labels: What the two sides are, for the headers.

    Returns:
        The diff; empty where the texts are equal.
    """
    old, new = (text.decode("utf-8", errors="replace").splitlines() for text in (before, after))
    headers = (f"{name} ({labels[0]})", f"{name} ({labels[1]})")
    return "\n".join(difflib.unified_diff(old, new, *headers, lineterm=""))


def _find_call(source: bytes) -> _Call:
    return _call_of_method(_find_method(source))


def _find_method(source: bytes) -> ast.FunctionDef:
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise _NotExpected(f"it is not valid Python: {error}") from error
    _require_plain_names(module)
    classes = [n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "ROIAlign"]
    if len(classes) != 1:
        raise _NotExpected(f"it defines the class ROIAlign {len(classes)} times, not once")
    methods = [n for n in classes[0].body if getattr(n, "name", None) == "forward"]
    if len(methods) != 1 or not isinstance(methods[0], ast.FunctionDef):
        raise _NotExpected("the class ROIAlign does not have exactly one method named forward")
    return methods[0]


def _require_plain_names(module: ast.Module) -> None:
    imported = 0
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            names = [a for a in node.names if (a.asname or a.name) == "roi_align"]
            if names and (node.module != "torchvision.ops" or names[0].name != "roi_align"):
                raise _NotExpected("roi_align is not the one of torchvision.ops")
            imported += len(names)
        rebound = _bound_name(node) in {"roi_align", "ROIAlign"}
        replaced = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
        if rebound or (replaced and ast.unparse(node) == "ROIAlign.forward"):
            raise _NotExpected("it replaces roi_align, ROIAlign or its forward by something else")
    if imported != 1:
        raise _NotExpected(f"it imports roi_align from torchvision.ops {imported} times, not once")


def _bound_name(node: ast.AST) -> str | None:
    """The name that a node gives another meaning; None where it does not, or is the class or import looked for."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
        return node.id
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name
    if isinstance(node, ast.ClassDef) and node.name == "roi_align":
        return node.name
    if isinstance(node, ast.Import):
        return next((a.asname for a in node.names if a.asname == "roi_align"), None)
    return None


def _call_of_method(method: ast.FunctionDef) -> _Call:
    names = [argument.arg for argument in method.args.args]
    if len(names) != 3 or method.decorator_list or method.args.vararg or method.args.kwonlyargs:
        raise _NotExpected("ROIAlign.forward does not take exactly the features and the boxes")
    _, features, boxes = names
    body = method.body[1:] if ast.get_docstring(method) is not None else method.body
    for statement in body[:-1]:
        if not _is_preamble(statement, features):
            raise _NotExpected(
                f"line {statement.lineno} of ROIAlign.forward is not detectron2's: "
                f"{ast.unparse(statement).splitlines()[0]}"
            )
    last = body[-1] if body else None
    if not isinstance(last, ast.Return) or last.value is None:
        raise _NotExpected("ROIAlign.forward does not end with the return of the call")
    calls = [n for n in ast.walk(last.value) if isinstance(n, ast.Call) and _is_operator(n.func)]
    if len(calls) != 1:
        raise _NotExpected(f"ROIAlign.forward calls roi_align {len(calls)} times, not once")
    call = calls[0]
    expected = [f"{names[0]}.{setting}" for setting in _SETTINGS]
    if call.keywords or [ast.unparse(a) for a in call.args[2:]] != expected:
        raise _NotExpected("roi_align is called with other settings than the layer's own")
    return _Call(
        features=call.args[0],
        boxes=call.args[1],
        returned=last.value,
        call=call,
        feature_name=features,
        box_name=boxes,
    )


def _is_operator(function: ast.expr) -> bool:
    return isinstance(function, ast.Name) and function.id == "roi_align"


def _is_preamble(statement: ast.stmt, features: str) -> bool:
    if isinstance(statement, ast.Assert):
        return True
    dequantize = f"if {features}.is_quantized:\n    {features} = {features}.dequantize()"
    return ast.unparse(statement) == dequantize


def _state_of_features(call: _Call) -> bool:
    name = call.feature_name
    return _which(call.features, {name}, {name + _CAST}, "the features")


def _state_of_boxes(call: _Call) -> bool:
    box, feature = call.box_name, call.feature_name
    plain = {f"{box}.to(dtype={feature}.dtype)", f"{box}.to({feature}.dtype)"}
    return _which(call.boxes, plain, {box + _CAST}, "the boxes")


def _state_of_result(call: _Call) -> bool:
    inner, feature = ast.unparse(call.call), call.feature_name
    cast = {f"{inner}.to(dtype={feature}.dtype)", f"{inner}.to({feature}.dtype)"}
    return _which(call.returned, {inner}, cast, "the result")


def _which(node: ast.expr, original: set[str], applied: set[str], what: str) -> bool:
    text = ast.unparse(node)
    if text in original:
        return False
    if text in applied:
        return True
    raise _NotExpected(f"{what} of roi_align are neither detectron2's nor the published: {text}")


def _line_starts(source: bytes) -> list[int]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _span(node: ast.expr | ast.stmt, starts: list[int]) -> tuple[int, int]:
    if node.end_lineno is None or node.end_col_offset is None:
        raise ValueError("the syntax tree carries no positions")
    return (
        starts[node.lineno - 1] + node.col_offset,
        starts[node.end_lineno - 1] + node.end_col_offset,
    )
