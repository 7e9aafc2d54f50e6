"""Going on in a run folder: only with the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxydet.config import dump_yaml
from proxydet.errors import ConfigError, TrainingError
from proxydet.recipes import get_recipe
from proxydet.training import distributed
from proxydet.training.continuation import check_folder
from proxydet.training.distributed import check_agreement
from proxydet.training.runfolder import RunFolder

SETTINGS: dict[str, Any] = {"seed": 7, "training": {"iterations": 10, "threads": 1}}
DIGESTS = {"vocabulary": "aa", "annotations": "bb"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "step_0000003.pth").touch()
    run.config.write_text(json.dumps(SETTINGS), encoding="utf-8")
    run.manifest.write_text(json.dumps({"digests": {**DIGESTS, "weights": "cc"}}), encoding="utf-8")
    return run


def test_the_same_run_goes_on(folder: RunFolder) -> None:
    assert check_folder(folder, SETTINGS, digests=DIGESTS, resume="auto") is False


def test_a_folder_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "absent")
    assert check_folder(run, SETTINGS, digests=DIGESTS, resume="auto") is True


@pytest.mark.parametrize("name", list(DIGESTS))
def test_changed_data_is_refused(folder: RunFolder, name: str) -> None:
    with pytest.raises(ConfigError, match=f"on other data: the {name} changed") as caught:
        check_folder(folder, SETTINGS, digests={**DIGESTS, name: "zz"}, resume="auto")
    assert "--output" in (caught.value.hint or "")


def test_changed_settings_are_refused_and_free_ones_are_not(folder: RunFolder) -> None:
    free = {**SETTINGS, "training": {"iterations": 10, "threads": 2}}
    assert check_folder(folder, free, digests=DIGESTS, resume="auto") is False
    weights = {**SETTINGS, "training": {**SETTINGS["training"], "weights": "elsewhere/w.pth"}}
    assert check_folder(folder, weights, digests=DIGESTS, resume="auto") is False
    longer = {**SETTINGS, "training": {"iterations": 20, "threads": 1}}
    with pytest.raises(ConfigError, match=r"training\.iterations: 10 there, 20 now"):
        check_folder(folder, longer, digests=DIGESTS, resume="auto")


def test_an_occupied_folder_and_a_named_checkpoint(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="already holds a run"):
        check_folder(folder, SETTINGS, digests=DIGESTS, resume="never")
    named = folder.checkpoints / "step_0000003.pth"
    assert check_folder(folder, {}, digests={}, resume=named) is False


def test_a_whole_configuration_is_read_back_as_it_was(folder: RunFolder) -> None:
    from proxydet.config import to_mapping

    config = get_recipe("tiny")
    folder.config.write_text(dump_yaml(config), encoding="utf-8")
    assert check_folder(folder, to_mapping(config), digests=DIGESTS, resume="auto") is False


def test_processes_that_differ_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    ranks = distributed.DistInfo(rank=0, local_rank=0, world_size=3, device=torch.device("cpu"))
    theirs = {"configuration": "same", "annotations": "bb"}
    others = [theirs, {**theirs, "annotations": "zz"}]

    def gather(into: list[Any], ours: Any) -> None:
        into[:] = [ours, *others]

    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    with pytest.raises(
        TrainingError, match=r"agree on the annotations: ranks \[0, 1\]: bb"
    ) as caught:
        check_agreement(ranks, theirs)
    assert "ranks [2]: zz" in caught.value.message
    others[1] = theirs
    check_agreement(ranks, theirs)
