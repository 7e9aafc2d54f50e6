"""What the parts of the network compute in, and what is always float32: losses, box arithmetic, gradients of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from proxydet.losses.criterion import build_criterion
from proxydet.modeling.centernet import CenterNetHead
from proxydet.modeling.config import ProposalConfig
from proxydet.modeling.precision import compute_in

HALF = (torch.bfloat16, torch.float16)
# Convolutions and matrix products, and what lies between two of them inside a part; no sum over a batch, no coordinate.
IN_A_PART = {
    "convolution", "convolution_backward", "addmm", "mm", "t", "transpose", "view", "_unsafe_view", "detach", "alias",
    "relu", "relu_", "threshold_backward", "native_batch_norm", "native_batch_norm_backward", "native_group_norm",
    "native_group_norm_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "upsample_nearest2d",
    "upsample_nearest2d_backward", "add", "add_", "mul", "_to_copy", "sum", "empty_like",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Notes the operations that run in it, those of the backward pass too."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        values = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self._names = {value.data_ptr(): name for name, value in values.items()}
        self.half: set[str] = set()
        self.half_weights: set[str] = set()
        self.rounded: dict[str, set[bool]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        found = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)]
        name = operation._schema.name.removeprefix("aten::")
        if any(tensor.dtype in HALF for tensor in tensors):
            self.half.add(name)
            # The float32 weights that a product needs are rounded to its type.
            if name == "_to_copy":
                self.half_weights |= {self._names.get(t.data_ptr()) for t in tensors} - {None}
        if name in ("convolution", "convolution_backward", "mm", "addmm"):
            used = {self._names.get(tensor.data_ptr()) for tensor in tensors} - {None}
            for value in used:
                on = torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
                self.rounded.setdefault(value, set()).add(on)
        return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def step(tiny, kind: str, **precision: str) -> tuple[Any, Operations, Operations, Operations]:
    """Take the forward and backward pass of a step; return the output and the operations of network, losses, backward pass."""
    network = tiny.lively(tiny.network()).train()
    for part, chosen in precision.items():
        setattr(network, f"{part}_precision", chosen)
    batch = tiny.box_batch() if kind == "boxes" else tiny.label_batch()
    random = torch.Generator().manual_seed(0)
    forward, losses, backward = (Operations(network) for _ in range(3))
    with forward:
        output = network(batch, generator=random)
    with losses:
        total = torch.stack(
            list(build_criterion(tiny.LOSSES)(output, generator=random).values())
        ).sum()
    with backward:
        total.backward()
    assert total.dtype == torch.float32
    assert {p.grad.dtype for p in network.parameters() if p.grad is not None} == {torch.float32}
    return output, forward, losses, backward


@pytest.mark.parametrize("kind", ["boxes", "labels"])
@pytest.mark.parametrize("parts", [("backbone",), ("heads",), ("backbone", "heads")])
def test_losses_and_box_arithmetic_are_float32(tiny, kind, parts):
    output, forward, losses, backward = step(tiny, kind, **dict.fromkeys(parts, "bf16"))
    assert {t.dtype for t in tensors_in(output) if t.is_floating_point()} == {torch.float32}
    assert losses.half == set()
    assert forward.half - IN_A_PART == set()
    assert backward.half - IN_A_PART == set()
    assert "convolution" in forward.half
    assert ("addmm" in forward.half) == ("heads" in parts)
    rounded = {"backbone" if n.startswith("backbone.") else "heads" for n in forward.half_weights}
    assert rounded == set(parts)
    assert ("max_pool2d_with_indices" in forward.half) == ("backbone" in parts)


@pytest.mark.parametrize("parts", [("backbone",), ("heads",), ("backbone", "heads")])
def test_tf32_is_on_in_its_parts_alone(tiny, parts, users_tf32):
    _, forward, losses, backward = step(tiny, "boxes", **dict.fromkeys(parts, "tf32"))
    for operations in (forward, backward):
        assert operations.rounded
        for name, on in operations.rounded.items():
            part = "backbone" if name.startswith("backbone.") else "heads"
            assert on == {part in parts and not name.endswith("zs_weight")}, name
    assert all(on == {False} for on in losses.rounded.values())
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == users_tf32


def test_the_proposal_towers_16_bit_maps_are_kept_once_in_float32():
    config = ProposalConfig(convs=1, norm_groups=4)
    head = CenterNetHead(config, 8, levels=1)
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == (2, 8, 6, 7) and tensor.dtype == torch.float32:
            kept[tensor.data_ptr()] = tensor
        return tensor

    maps = torch.rand(2, 8, 6, 7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_in("bf16", head, [maps])
    assert len(kept) == 1
