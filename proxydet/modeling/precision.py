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
        outside = _tf32()
        values = _each(values, lambda tensor: _Tf32Border.apply(tensor, outside, None))
        with tf32_kept():
            allow_tf32(allowed=True)
            found = part(values)
        return cast("T", _each(found, lambda tensor: _Tf32Border.apply(tensor, _ALL, outside)))
    device = (values if isinstance(values, Tensor) else values[0]).device
    with torch.autocast(device.type, dtype=HALF_TYPES[precision]):
        found = part(values)
    return cast("T", _each(found, Tensor.float))


def allow_tf32(*, allowed: bool) -> None:
    """Let NVIDIA GPUs compute float32 products in TF32, or not; for the whole process, as torch has it."""
    _set_tf32((allowed, allowed))


@contextmanager
def tf32_kept() -> Iterator[None]:
    """Within this context TF32 may be switched; after it, it is as before, also where a backward pass has failed."""
    before = _tf32()
    try:
        yield
    finally:
        _set_tf32(before)


_ALL = True, True


def _tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def _set_tf32(allowed: tuple[bool, bool]) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


class _Tf32Border(torch.autograd.Function):
    """Passes values into or out of a part in TF32, and in the backward pass switches it as their gradient comes back.

    Going backward, ``allowed`` holds from here on, and ``outside`` after the whole pass.

    Autograd runs the nodes of a device in the opposite order of their making: nothing of the part runs before the gradient of
    what it returned, nor after that of what it was given.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, allowed: tuple[bool, bool], outside: tuple[bool, bool] | None
    ) -> Tensor:
        """Hand the values on."""
        ctx.allowed, ctx.outside = allowed, outside
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Switch, and hand the gradient on."""
        _set_tf32(ctx.allowed)
        if (outside := ctx.outside) is not None:  # a part's input may need no gradient, as images
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _set_tf32(outside))
        return gradients[0], None, None


def _each(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict):
        return {name: _each(value, change) for name, value in values.items()}
    return type(values)(_each(value, change) for value in values)
