"""A criterion at a Python path: called like the published one, and refused where it is not like it."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from torch import nn

from proxydet.errors import ConfigError
from proxydet.losses.config import LossConfig
from proxydet.losses.criterion import Criterion, build_criterion

MODULE = "own_losses"


class Halved(Criterion):
    def __init__(self, config, factor=0.5):
        super().__init__(config)
        self.factor = factor

    def __call__(self, output, *, generator=None):
        losses = super().__call__(output, generator=generator)
        return {name: self.factor * loss for name, loss in losses.items()}


class Returns:
    def __init__(self, config, what="list"):
        self.what = what

    def __call__(self, output, *, generator=None):
        if self.what == "raises":
            return {}["absent"]
        if self.what == "names":
            return {f"loss_{type(output).__name__}": torch.zeros(())}
        return {"list": [torch.zeros(())], "vector": {"a": torch.zeros(2)}, "none": {}}[self.what]


class Trained(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, output, *, generator=None):
        return {"a": self.weight}


class NoGenerator:
    def __init__(self, config):
        pass

    def __call__(self, output):
        return {}


@pytest.fixture(autouse=True)
def _module(monkeypatch):
    module = types.ModuleType(MODULE)
    vars(module).update({c.__name__: c for c in (Halved, Returns, Trained, NoGenerator)})
    monkeypatch.setitem(sys.modules, MODULE, module)


def with_own(config: LossConfig, name: str, **options: object) -> LossConfig:
    return dataclasses.replace(config, criterion=f"{MODULE}:{name}", options=options)


def test_it_is_made_with_its_options_and_gets_every_batch(tiny):
    network = tiny.lively(tiny.network()).train()
    criterion = build_criterion(with_own(tiny.LOSSES, "Halved", factor=0.25))
    for batch in (tiny.box_batch(), tiny.label_batch()):
        output = network(batch, generator=torch.Generator().manual_seed(0))
        whole, part = (
            make(output, generator=torch.Generator().manual_seed(1))
            for make in (build_criterion(tiny.LOSSES), criterion)
        )
        assert whole.keys() == part.keys()
        assert all(torch.equal(part[name], 0.25 * whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Absent", {}), ("Halved", {"faktor": 1.0}), ("NoGenerator", {}), ("Trained", {})],
)
def test_what_cannot_be_a_criterion_is_refused_when_it_is_made(name, options):
    with pytest.raises(ConfigError, match=rf"losses\.criterion is {MODULE}:{name}") as caught:
        build_criterion(with_own(LossConfig(), name, **options))
    assert caught.value.hint


@pytest.mark.parametrize("what", ["list", "vector", "none", "raises"])
def test_losses_that_are_none_are_refused(what):
    criterion = build_criterion(with_own(LossConfig(), "Returns", what=what))
    with pytest.raises(ConfigError, match=rf"losses\.criterion is {MODULE}:Returns") as caught:
        criterion(object())
    assert (what == "raises") == ("KeyError: 'absent' (" in caught.value.message)


def test_the_names_are_the_same_for_every_batch():
    criterion = build_criterion(with_own(LossConfig(), "Returns", what="names"))
    assert set(criterion(object())) == {"loss_object"}
    with pytest.raises(ConfigError, match="loss_int, loss_object"):
        criterion(3)


def test_a_path_of_another_form_is_refused_in_the_configuration():
    with pytest.raises(ConfigError, match="criterion"):
        LossConfig(criterion="losses.py")
