"""AdamW, clipping and gradients that are not there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from proxydet.errors import ConfigError
from proxydet.training.config import OptimizerConfig
from proxydet.training.step import build_optimizer, clip_gradients, zero_unused_gradients


def parameters(*gradients: list[float] | None) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        made.append(parameter)
    return made


def test_clipping_is_by_element_and_passes_over_missing_gradients():
    found = parameters([3.0, -0.5], None, [-7.0, 1.0])
    clip_gradients(found, 1.0)
    assert found[0].grad.tolist() == [1.0, -0.5]
    assert found[1].grad is None
    assert found[2].grad.tolist() == [-1.0, 1.0]
    clip_gradients(parameters(None), 1.0)


def test_clipping_does_not_hide_what_is_not_a_number():
    found = parameters([math.nan, 5.0])
    clip_gradients(found, 1.0)
    assert math.isnan(found[0].grad[0])
    assert found[0].grad[1] == 1.0


def test_what_was_reached_before_goes_on_and_what_never_was_rests():
    """As torch 1.11 did: gradients of zero stay once there was one; before, there is none."""
    found = parameters([1.0, 2.0], [0.5, 0.5], None, [0.0, 0.0])
    optimizer = build_optimizer(found, OptimizerConfig())
    zero_unused_gradients(optimizer)
    assert [p.grad is None for p in found] == [False, False, True, True]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found[0].grad = torch.ones(2)
    before = [p.detach().clone() for p in found]
    zero_unused_gradients(optimizer)
    assert found[1].grad.tolist() == [0.0, 0.0]
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(found, before, strict=True)]
    assert moved == [True, True, False, False]


def adamw_step(p: float, g: float, m: float, v: float, t: int) -> tuple[float, float, float]:
    """One step in plain numbers, after Loshchilov and Hutter, algorithm 2 (decay scaled by the rate)."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    p -= 0.1 * 1e-2 * p
    p -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p, m, v


def test_steps_are_those_of_the_paper():
    parameter = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = build_optimizer([parameter], OptimizerConfig(learning_rate=0.1, weight_decay=1e-2))
    p, m, v = 0.7, 0.0, 0.0
    for t, g in enumerate([0.3, 0.0, -2.0], start=1):
        parameter.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        p, m, v = adamw_step(p, g, m, v, t)
        assert parameter.item() == pytest.approx(p, rel=1e-12)


def test_frozen_parameters_are_left_out():
    free, frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = build_optimizer([frozen, free], OptimizerConfig())
    assert optimizer.param_groups[0]["params"] == [free]
    with pytest.raises(ConfigError, match="all are frozen"):
        build_optimizer([frozen], OptimizerConfig())
