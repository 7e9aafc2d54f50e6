"""A network of the published sizes on a CPU is told to be slow."""

import logging

import pytest
import torch

from proxydet.training.train import warn_of_slow_device


@pytest.mark.parametrize(
    ("millions", "device", "told"), [(21, "cpu", True), (19, "cpu", False), (21, "cuda", False)]
)
def test_large_networks_on_a_cpu_are_told_to_be_slow(millions, device, told, caplog):
    network = torch.nn.Linear(1000, 1000 * millions, bias=False, device="meta")
    with caplog.at_level(logging.WARNING):
        warn_of_slow_device(network, torch.device(device))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * told
    assert all(f"{millions} million" in record.getMessage() for record in caplog.records)
