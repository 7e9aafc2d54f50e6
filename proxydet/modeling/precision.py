"""Number formats of the network's parts: the products of the backbone, and of the heads. All else is float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from proxydet.modeling.config import Precision

T = TypeVar("T")

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_heads: ContextVar[Precision] = ContextVar("precision of the heads", default="fp32")


@contextmanager
def heads_in(precision: Precision) -> Iterator[None]:
    """Within this context, and this thread, `compute_heads` computes in a precision."""
    token = _heads.set(precision)
    try:
        yield
    finally:
        _heads.reset(token)


def compute_heads(part: Callable[[Any], T], values: Any) -> T:
    """Run a part of the heads (proposal tower, box head, mask head) in the precision of `heads_in`, as `compute_in`."""
    return compute_in(_heads.get(), part, values)


def compute_in(precision: Precision, part: Callable[[Any], T], values: Any) -> T:
    """Run a part of the network with its products in a precision, forward and backward.

    Args:
        precision: Format of the products.
        part: Takes ``values``; returns tensors, or dicts, lists or tuples of them.
        values: A float32 tensor, or a list of them.

    Returns:
        What the part returns, in float32.
    """
    if precision == "fp32":
        return part(values)
    if precision == "tf32":
        values = _each(values, lambda tensor: _Tf32Border.apply(tensor, False))
        allow_tf32(allowed=True)
        try:
            found = part(values)
        finally:
            allow_tf32(allowed=False)
        return cast("T", _each(found, lambda tensor: _Tf32Border.apply(tensor, True)))
    device = (values if isinstance(values, Tensor) else values[0]).device
    with torch.autocast(device.type, dtype=HALF_TYPES[precision]):
        found = part(values)
    return cast("T", _each(found, Tensor.float))


def allow_tf32(*, allowed: bool) -> None:
    """Let NVIDIA GPUs compute float32 products in TF32, or not; for the whole process, as torch has it."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class _Tf32Border(torch.autograd.Function):
    """Passes values into or out of a part in TF32, and in the backward pass switches it on, or off, as their gradient comes back.

    Autograd runs the nodes of a device in the opposite order of their making: nothing of the part runs before the gradient of
    what it returned, nor after that of what it was given.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, inside: bool) -> Tensor:
        ctx.inside = inside
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        allow_tf32(allowed=ctx.inside)
        if ctx.inside:  # nothing is given back where a part's input needs no gradient, as images
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: allow_tf32(allowed=False))
        return gradients[0], None


def _each(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict):
        return {name: _each(value, change) for name, value in values.items()}
    return type(values)(_each(value, change) for value in values)
