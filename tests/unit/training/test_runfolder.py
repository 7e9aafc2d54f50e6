"""A run folder belongs to one training, and is resumed with the same run only."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from proxydet.config import dump_yaml, to_mapping
from proxydet.errors import CheckpointError, ConfigError, LockedError, TrainingError
from proxydet.files import sha256
from proxydet.manifest import build_manifest
from proxydet.paths import list_checkpoints
from proxydet.recipes import RunConfig, get_recipe, resolve_config
from proxydet.training import distributed
from proxydet.training.config import scale_training
from proxydet.training.distributed import DistInfo, check_agreement
from proxydet.training.runfolder import (
    EarlierRun,
    Resume,
    RunFolder,
    check_same,
    check_same_data,
    default_folder,
    prepare,
)
from proxydet.weight_files import write_safetensors, write_state
from proxydet_cli.main import main

DIGESTS = {"vocabulary": "aa", "annotations": "bb"}
CPU = torch.device("cpu")


def ranks(count: int) -> DistInfo:
    return DistInfo(world_size=count, device=CPU)


def new(config: RunConfig, processes: int = 2) -> RunConfig:
    """Return the configuration of a new run."""
    return prepare(config, RunFolder(Path("absent")), ranks(processes), "auto").config


def write_run(
    root: Path, config: RunConfig, *, processes: int = 2, finished: bool = False
) -> RunFolder:
    """Write what a run leaves, as far as it says what it is."""
    folder = RunFolder(root)
    scaled = new(config, processes)
    run = {"configuration": to_mapping(scaled), "digests": DIGESTS}
    content = {"iteration": 3, "optimizer": {}, "run": json.dumps(run)}
    write_state(content, folder.checkpoints / "step_0000003.pth")
    folder.config.write_text(dump_yaml(scaled))
    folder.manifest.write_text(json.dumps(run))
    if finished:
        folder.final_weights.touch()
    return folder


@pytest.fixture
def config() -> RunConfig:
    return get_recipe("tiny")


@pytest.fixture
def folder(tmp_path, config) -> RunFolder:
    return write_run(tmp_path / "run", config)


def check(folder: RunFolder, config: RunConfig, processes: int = 2) -> int:
    """Return the accumulation with which a configuration resumes the run of a folder, all being well."""
    start = prepare(config, folder, ranks(processes), "auto")
    for run in start.earlier:
        check_same(run, start.config)
    return start.accumulation


def found(
    folder: RunFolder, config: RunConfig, resume: Resume = "auto", **options: Any
) -> tuple[EarlierRun, ...]:
    """Return the runs that a training of two processes continues."""
    return prepare(config, folder, ranks(2), resume, **options).earlier


class TestSettings:
    def test_the_same_run_is_resumed_and_an_empty_folder_begun(self, folder, config, tmp_path):
        assert check(folder, config) == 1
        assert found(RunFolder(tmp_path / "absent"), config) == ()

    def test_the_run_of_a_checkpoint_is_named_not_the_folder(self, folder, tmp_path):
        """``--resume other/checkpoints/step_3.pth --output new``: it is the other one that differs."""
        ((_, checkpoint),) = list_checkpoints(folder.checkpoints)
        elsewhere = RunFolder(tmp_path / "new")
        with pytest.raises(ConfigError, match=str(folder.root)) as caught:
            found(elsewhere, resolve_config("tiny", None, ["seed=8"]), checkpoint)
        assert str(elsewhere.root) not in f"{caught.value.message} {caught.value.hint}"
        (earlier,) = found(elsewhere, get_recipe("tiny"), checkpoint)
        with pytest.raises(ConfigError, match=str(folder.root)):
            check_same_data(earlier, {"images": "cc", "vocabulary": "zz"}, mode="off")

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_final_weights_are_not_resumed(self, config, tmp_path, suffix):
        path = tmp_path / f"model_final{suffix}"
        weights = {"layer.weight": torch.ones(2)}
        if suffix == ".pth":
            write_state({"model": weights, "iteration": 3}, path)
        else:
            write_safetensors(path, weights, {"iteration": 3})
        with pytest.raises(CheckpointError, match="weights") as caught:
            found(RunFolder(tmp_path / "run"), config, path)
        assert "--weights" in str(caught.value.hint)

    def test_other_settings_are_refused_and_free_ones_are_not(self, folder, config):
        free = [
            "training.threads=2",
            "training.weights=w.pth",
            "data.workers=3",
            "evaluation.batch_size=9",
        ]
        assert check(folder, resolve_config("tiny", None, free)) == 1
        longer = resolve_config("tiny", None, ["training.iterations=30"])
        with pytest.raises(ConfigError, match=r"training\.iterations: ") as caught:
            check(folder, longer)
        assert "--overwrite" in str(caught.value.hint)
        for path in folder.checkpoints.iterdir():
            path.unlink()  # from the first second, long before there is a checkpoint
        with pytest.raises(ConfigError, match=r"training\.iterations: "):
            check(folder, longer)

    def test_what_the_data_decide_is_compared_when_they_are_read(self, folder, config):
        (earlier,) = found(folder, config)
        model = dataclasses.replace(
            config.model, classifier=dataclasses.replace(config.model.classifier, embedding_dim=7)
        )
        other = prepare(dataclasses.replace(config, model=model), folder, ranks(2), "auto").config
        with pytest.raises(ConfigError, match="embedding_dim"):
            check_same(earlier, other)

    @pytest.mark.parametrize("name", list(DIGESTS))
    def test_changed_data_is_refused(self, folder, config, name):
        (earlier,) = found(folder, config)
        check_same_data(earlier, {**DIGESTS, "images": "new in this version"}, mode="strict")
        folder.manifest.write_text(folder.manifest.read_text().replace('"bb"', '"bb-v3"'))
        (of_before,) = found(folder, config)
        check_same_data(of_before, DIGESTS, mode="off")
        with pytest.raises(ConfigError, match=name) as caught:
            check_same_data(earlier, {**DIGESTS, name: "zz"}, mode="off")
        assert "--output" in (caught.value.hint or "")

    def test_changed_code_is_reported_and_refused_where_a_run_is_to_repeat_itself(
        self, folder, config, caplog
    ):
        (found_there,) = found(folder, config)
        earlier = dataclasses.replace(found_there, digests={**DIGESTS, "code my:Loss": "aa"})
        now = {**DIGESTS, "code my:Loss": "bb", "code my:Head": "new in the configuration"}
        check_same_data(earlier, {**now, "code my:Loss": "aa"}, mode="strict")
        assert not caplog.messages
        check_same_data(earlier, now, mode="published")
        (message,) = caplog.messages
        assert "code my:Loss" in message
        assert "my:Head" not in message
        with pytest.raises(ConfigError, match="code my:Loss"):
            check_same_data(earlier, now, mode="strict")
        with pytest.raises(ConfigError, match="the vocabulary and the code my:Loss"):
            check_same_data(earlier, {**now, "vocabulary": "zz"}, mode="strict")

    def test_a_dataset_config_may_move_with_its_annotations(self, tmp_path):
        def described(name: str, category: str) -> RunConfig:
            place = tmp_path / name
            place.mkdir()
            (place / "a.json").write_text(json.dumps({"categories": [{"id": 1, "name": category}]}))
            text = '[vocabulary]\nembeddings = "e.npy"\n[train]\nannotations = "a.json"\nimages = "."\n'
            (place / "d.toml").write_text(f'name = "d"\n{text}')
            sets = [f"data.description={place / 'd.toml'}", f"data.cache={tmp_path}"]
            return resolve_config("tiny", None, sets)

        began = described("old", "cup")
        digest = sha256(tmp_path / "old/a.json")[:32]
        folder = write_run(tmp_path / "run", began)
        content = json.loads(folder.manifest.read_text())
        folder.manifest.write_text(json.dumps({**content, "digests": {"annotations": digest}}))
        assert check(folder, described("moved", "cup")) == 1
        with pytest.raises(ConfigError, match=r"data\.description") as caught:
            check(folder, described("other", "mug"))
        assert "PosixPath" not in caught.value.message

    def test_never_refuses_a_run_whatever_its_settings_unless_it_is_to_be_overwritten(
        self, folder, config
    ):
        for other in (config, resolve_config("tiny", None, ["seed=8"])):
            with pytest.raises(ConfigError, match="already holds a run") as caught:
                found(folder, other, "never")
            assert "--overwrite" in str(caught.value.hint)
            assert found(folder, other, "never", overwrite=True) == ()
        (folder.root / "notes.txt").touch()
        for name in ("forgetting/finetuned/identity.json", "finetune.json", "finetune.html"):
            (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.root / name).touch()
        folder.logs.mkdir()
        (folder.logs / "rank_1.log").touch()
        folder.clear()
        assert [path.name for path in folder.root.iterdir()] == ["notes.txt"]

    def test_a_checkpoint_is_checked_with_the_run_that_wrote_it(self, folder, config, tmp_path):
        path = folder.checkpoints / "step_0000003.pth"
        other = resolve_config("tiny", None, ["seed=8"])
        elsewhere = RunFolder(tmp_path / "new")
        moved = tmp_path / "moved.pth"
        moved.write_bytes(path.read_bytes())
        for target, checkpoint in ((folder, path), (elsewhere, path), (elsewhere, moved)):
            (earlier,) = found(target, config, checkpoint)
            assert earlier.digests == DIGESTS
            with pytest.raises(ConfigError, match="seed: 7 there, 8 now"):
                found(target, other, checkpoint)

    def test_one_that_says_nothing_of_itself_is_taken_with_a_warning(
        self, config, tmp_path, caplog
    ):
        torch.save({"format": 1, "iteration": 3}, tmp_path / "old.pth")
        assert found(RunFolder(tmp_path / "new"), config, tmp_path / "old.pth") == ()
        assert "old.pth" in caplog.text


class TestDamage:
    @pytest.mark.parametrize("content", [None, b"", b"seed: [", b"\xff", b"seed: x", b"a: 1"])
    def test_without_a_configuration_the_manifest_tells(self, folder, config, content, caplog):
        folder.config.unlink()
        if content is not None:
            folder.config.write_bytes(content)
        assert check(folder, config) == 1
        with pytest.raises(ConfigError, match="seed: 7 there, 8 now"):
            check(folder, resolve_config("tiny", None, ["seed=8"]))
        assert (content is not None) == (str(folder.config) in caplog.text)

    def test_an_edited_configuration_is_not_believed(self, folder, config):
        """The manifest has a SHA-256; keys that may differ may be edited."""
        scaled = new(config)
        content = {"configuration": to_mapping(scaled), "digests": DIGESTS}
        manifest = build_manifest("training", **content, mode="off", seeds={})
        folder.manifest.write_text(json.dumps(manifest.to_dict()))
        other = resolve_config("tiny", None, ["seed=8", "data.workers=3"])
        folder.config.write_text(dump_yaml(new(other)))
        with pytest.raises(ConfigError, match="seed: 7 there, 8 now") as caught:
            check(folder, other)
        assert caught.value.path == folder.config
        assert "data.workers" not in caught.value.message
        free = dataclasses.replace(scaled, data=dataclasses.replace(scaled.data, workers=3))
        folder.config.write_text(dump_yaml(free))
        assert check(folder, config) == 1

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
    def test_what_is_not_a_file_is_passed_over(self, folder, config, make, caplog):
        folder.config.unlink()
        make(folder.config)
        assert check(folder, config) == 1
        assert str(folder.config) in caplog.text

    @pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"configuration": 3}'])
    def test_without_both_the_newest_whole_checkpoint_tells(self, folder, config, content):
        folder.config.unlink()
        folder.manifest.unlink()
        if content is not None:
            folder.manifest.write_bytes(content)
        (folder.checkpoints / "step_0000004.pth").write_bytes(b"cut")
        (earlier,) = found(folder, config)
        assert earlier.digests == DIGESTS
        with pytest.raises(ConfigError, match="seed: 7 there, 8 now"):
            check(folder, resolve_config("tiny", None, ["seed=8"]))

    def test_where_nothing_tells_the_error_names_the_remedy(self, folder, config):
        folder.config.write_bytes(b"{")
        folder.manifest.write_bytes(b"{")
        (folder.checkpoints / "step_0000003.pth").write_bytes(b"")
        with pytest.raises(ConfigError, match=str(folder.root)) as caught:
            found(folder, config)
        assert caught.value.path == folder.config
        assert "--output" in str(caught.value.hint)

    def test_a_damaged_manifest_alone_is_reported(self, folder, config, caplog):
        folder.manifest.write_bytes(folder.manifest.read_bytes()[:50])
        (earlier,) = found(folder, config)
        assert earlier.digests == {}
        assert str(folder.manifest) in caplog.text

    @pytest.mark.parametrize("launched", [True, False])
    def test_a_damage_is_reported_once(self, folder, config, caplog, monkeypatch, launched):
        """However often a run is looked at on the way to its start; by its launcher where there is one."""
        if launched:
            monkeypatch.setenv("PROXYDET_LAUNCHER", "1")
        folder.manifest.write_bytes(folder.manifest.read_bytes()[:50])
        for _ in range(2):
            check(folder, config)
        warned = [r for r in caplog.records if str(folder.manifest) in r.getMessage() and r.levelname == "WARNING"]  # fmt: skip
        assert len(warned) == (not launched)

    def test_keys_that_an_earlier_version_did_not_have_get_their_defaults(self, folder, config):
        lines = folder.config.read_text().splitlines()
        kept = [line for line in lines if not line.strip().startswith("ranks_share_group:")]
        assert len(kept) < len(lines)
        folder.config.write_text("\n".join(kept) + "\n")
        assert check(folder, config) == 1


def without_image_labels(folder: Path) -> str:
    """Write a dataset config; return the setting that names it."""
    path = folder / "d.toml"
    path.write_text(
        'name = "d"\n[vocabulary]\nembeddings = "e.npy"\n[train]\nannotations = "a.json"\nimages = "."\n'
    )
    return f"data.description={path}"


class TestProcesses:
    @pytest.mark.parametrize(
        ("began", "now", "asked", "accumulation", "told"),
        [
            (2, 2, 1, 1, ""),
            (2, 1, 1, 2, "as many images a step as before"),
            (8, 4, 1, 2, "as many images a step as before"),
            (2, 4, 1, 1, "2 times the images a step; learning rates are multiplied by 2"),
            (2, 8, 1, 1, "4 times the images a step; learning rates are multiplied by 4"),
            (8, 3, 1, 3, "1.125 times the images a step; learning rates are multiplied by 1.125"),
            (2, 2, 2, 2, "2 times the images a step"),
            (2, 1, 3, 3, "1.5 times the images a step"),
        ],
    )
    def test_a_run_goes_on_with_another_number_of_processes(
        self, tmp_path, config, caplog, began, now, asked, accumulation, told
    ):
        folder = write_run(tmp_path / "run", config, processes=began)
        options = resolve_config("tiny", None, [f"training.accumulation={asked}"])
        assert check(folder, options, now) == accumulation
        start = prepare(options, folder, ranks(now), "auto")
        assert start.step == Fraction(accumulation * now, began)
        assert told in caplog.text
        assert bool(told) == bool(caplog.text)
        # What an iteration is stays, and so do learning rate, periods and length.
        assert start.config.training == scale_training(config.training, began)

    def test_a_run_that_accumulated_goes_on_with_more_processes(self, tmp_path):
        config = resolve_config("tiny", None, ["training.accumulation=4"])
        folder = write_run(tmp_path / "run", config, processes=1)
        assert check(folder, config, 2) == 2
        assert check(folder, config, 4) == 1
        assert check(folder, config, 8) == 1, "and not 4, which would be 8 times the images"
        again = resolve_config(None, folder.config)
        assert check(folder, again, 1) == 4, "as its own configuration repeats it"

    @pytest.mark.parametrize(
        ("sets", "labels", "step", "told"),
        [
            ((4, 8, 1), True, Fraction(2), "data.boxes.batch_size 4 instead of 2"),
            ((4, 8, 1), False, Fraction(2), "learning rates are multiplied by 2"),
            ((1, 2, 2), True, Fraction(1), "as many images a step as before"),
            ((1, 4, 1), False, Fraction(1, 2), "a step counts as 0.5 iterations"),
            # Images of both kinds are drawn as often as each other: batches of 2 and 4 have 8/3 of them, of 1 and 4 8/5.
            ((1, 4, 1), True, Fraction(3, 5), "0.6 times the images a step"),
            ((2, 1, 1), False, Fraction(1), ""),
        ],
    )
    def test_a_run_goes_on_with_another_batch_by_the_rule(
        self, tmp_path, caplog, sets, labels, step, told
    ):
        described = [] if labels else [without_image_labels(tmp_path)]
        config = resolve_config("tiny", None, described)
        folder = write_run(tmp_path / "run", config)
        keys = ("data.boxes.batch_size", "data.image_labels.batch_size", "training.accumulation")
        asked = [f"{key}={value}" for key, value in zip(keys, sets, strict=True)] + described
        options = resolve_config("tiny", None, asked)
        start = prepare(options, folder, ranks(2), "auto")
        assert start.step == step
        assert told in caplog.text
        assert bool(told) == bool(caplog.text)
        assert start.accumulation == sets[2]
        assert start.config == new(config), "an iteration, and the schedule, are those of the run"
        assert start.batches(start.config.data) == options.data
        assert default_folder(folder.root, options, "auto")[0] == folder.root
        folder.final_weights.touch()
        found, why = default_folder(folder.root, options, "auto")
        assert (found, "which is finished" in why) == (folder.root, True)
        back = prepare(options, folder, ranks(2), folder.checkpoints / "step_0000003.pth")
        assert back.step == step

    def test_a_batch_size_of_data_that_are_not_there_changes_nothing(self, tmp_path):
        described = without_image_labels(tmp_path)
        folder = write_run(tmp_path / "run", resolve_config("tiny", None, [described]))
        asked = [described, "data.image_labels.batch_size=9"]
        assert check(folder, resolve_config("tiny", None, asked), 1) == 2

    def test_half_the_processes_with_twice_the_batch_do_not_accumulate(self, folder, caplog):
        sizes = ["data.boxes.batch_size=4", "data.image_labels.batch_size=8"]
        start = prepare(resolve_config("tiny", None, sizes), folder, ranks(1), "auto")
        assert start.accumulation == 1
        assert start.step == 1
        assert "processes 1 instead of 2, data.boxes.batch_size 4 instead of 2" in caplog.text


class TestDefaultFolder:
    def test_the_same_run_has_its_folder_and_others_have_one_of_their_own(self, tmp_path, config):
        def choose(asked: RunConfig, resume: Any = "auto") -> tuple[str, str]:
            found, why = default_folder(tmp_path / "r50", asked, resume)
            return found.name, why

        other = resolve_config("tiny", None, ["seed=8"])
        assert choose(config) == ("r50", "")
        write_run(tmp_path / "r50", config)
        name, why = choose(config)
        assert name == "r50"
        assert "not finished" in why
        name, why = choose(other)
        assert name == "r50-2"
        assert "seed: 7 there, 8 now" in why
        write_run(tmp_path / "r50-2", other, finished=True)
        name, why = choose(other)
        assert name == "r50-2"
        assert "is finished" in why
        assert choose(config, "never")[0] == "r50-3"
        path = tmp_path / "r50-2/checkpoints/step_0000003.pth"
        assert choose(config, path)[0] == "r50-2"


@contextmanager
def another_process(work: Callable[[Callable[[bytes], int]], None]) -> Iterator[tuple[int, bytes]]:
    """Do something in a process that is killed at the end; its number, and what it wrote first."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
        number = os.fork()
    if not number:
        try:
            work(lambda text: os.write(write, text))
        finally:
            os._exit(1)
    os.close(write)
    try:
        yield number, os.read(read, 99)
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        os.close(read)


@contextmanager
def held_elsewhere(folder: RunFolder) -> Iterator[int]:
    """Hold a folder in another process; its number."""

    ours = os.getpid()

    def hold(write: Callable[[bytes], int]) -> None:
        with folder.held():
            write(b"held")
            while os.getppid() == ours:  # also where the tests are killed
                time.sleep(0.1)

    with another_process(hold) as (number, written):
        assert written == b"held"
        yield number


class TestLock:
    def test_a_second_training_learns_who_holds_the_folder_and_changes_nothing(
        self, folder, config
    ):
        with held_elsewhere(folder) as first:
            before = {path: path.stat().st_mtime_ns for path in folder.root.rglob("*")}
            with pytest.raises(LockedError, match=f"process {first} on") as caught, folder.held():
                pytest.fail("held twice")
            assert str(folder.root) in caught.value.message
            assert "--output" in str(caught.value.hint)
            after = {path: path.stat().st_mtime_ns for path in folder.root.rglob("*")}
            assert {k: v for k, v in after.items() if "lock" not in k.name} == {
                k: v for k, v in before.items() if "lock" not in k.name
            }
        left = folder.checkpoints / f".step.{'0' * 32}.tmp"
        left.touch()
        with folder.held() as still_ours:
            assert not left.exists(), "what a killed process was writing"
            still_ours()
            with folder.held():  # as the launcher's processes do
                pass
            assert folder.lock.exists()
        assert not folder.lock.exists()

    def test_without_locks_nothing_is_removed_that_another_training_may_be_writing(
        self, folder, monkeypatch
    ):
        def none(*_: object) -> None:
            raise OSError(errno.ENOSYS, "not implemented")

        monkeypatch.setattr("filelock.SoftFileLease._acquire", none)
        written = folder.checkpoints / f".step_0000004.pth.{'0' * 32}.tmp"
        written.touch()
        with folder.held():
            assert written.exists()

    def test_it_is_given_back_on_every_way_out_and_leaves_no_new_folder(self, tmp_path):
        folder = RunFolder(tmp_path / "new")
        for error in (ValueError, KeyboardInterrupt):
            with pytest.raises(error), folder.held():
                raise error
            assert not folder.root.exists()

    def test_a_process_of_our_launcher_need_not_hold_it(self, folder):
        def join(write):
            os.environ["PROXYDET_LAUNCHER"] = str(os.getppid())
            with folder.held() as still_ours:
                still_ours()
            os.environ["PROXYDET_LAUNCHER"] = "1"
            try:
                folder.held().__enter__()
            except LockedError:
                write(b"refused")

        with folder.held():
            with another_process(join) as (_, written):
                assert written == b"refused"
            assert folder.lock.exists()

    def test_one_that_was_taken_for_dead_stops_before_it_writes(self, folder):
        with folder.held() as still_ours:
            record = Path(f"{folder.lock}.owner")
            owner = json.loads(record.read_text())
            record.write_text("{")  # unreadable for a moment, as on a network file system
            still_ours()
            folder.lock.write_text(folder.lock.read_text().replace(f"pid={os.getpid()}", "pid=1"))
            record.write_text(json.dumps({**owner, "pid": 1, "since": "2026-01-01"}))
            with pytest.raises(LockedError, match="taken over"):
                still_ours()
        with folder.held() as still_ours:  # and the other one has finished since
            folder.lock.unlink()
            record.unlink()
            with pytest.raises(LockedError, match=str(folder.root)):
                still_ours()

    @pytest.mark.parametrize(
        ("words", "environment"),
        [
            ((), {"RANK": "0", "WORLD_SIZE": "1"}),
            (("--nodes", "2", "--rendezvous", "127.0.0.1:9"), {}),
        ],
        ids=["a process of torchrun", "a launcher of one of two nodes"],
    )
    def test_a_refused_process_writes_no_log(self, folder, words, environment, monkeypatch, cli):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with held_elsewhere(folder) as first:
            words = ("--output", folder.root, *words)
            code, _, err = cli("train", "--recipe", "tiny", "--device", "cpu", *words)
        assert code == 5
        assert f"in use by process {first}" in " ".join(err.split())
        assert not folder.logs.exists()

    @pytest.mark.parametrize("there", [(), ("notes.txt",), ("logs/mine.txt",)])
    def test_a_training_that_is_refused_leaves_no_logs_in_a_new_folder(
        self, tmp_path, there, monkeypatch
    ):
        for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)  # as torchrun starts it: with a log
        root = tmp_path / "new"
        for name in there:
            (root / name).parent.mkdir(parents=True)
            (root / name).touch()
        words = ["--recipe", "tiny", "--device", "cpu", "--output", str(root)]
        assert main(["train", *words]) == ConfigError.exit_code, "there are no data"
        kept = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]
        assert [name for name in kept if "rank_" not in name] == list(there)
        assert root.exists() == bool(there)

    @pytest.mark.parametrize("restarts", ["0", "1"])
    def test_an_overwriting_training_that_is_refused_or_starts_again_keeps_the_logs(
        self, folder, monkeypatch, restarts
    ):
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": restarts}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        folder.logs.mkdir()
        (folder.logs / "rank_1.log").touch()
        words = ["--recipe", "tiny", "--device", "cpu", "--output", str(folder.root)]
        assert main(["train", *words, "--overwrite"]) == ConfigError.exit_code
        assert (folder.logs / "rank_1.log").exists()


class TestGoingBack:
    def test_what_came_after_is_set_aside(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.checkpoints.mkdir()
        for step in (2, 4, 6):
            (folder.checkpoints / f"step_{step:07d}.pth").touch()
            folder.evaluation(step).mkdir(parents=True)
        lines = [json.dumps({"iteration": n}) for n in (2, 4, 6)]
        folder.metrics.write_text("\n".join([*lines, ""]))
        folder.final_weights.touch()
        folder.set_aside_after(4)
        kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*_00000*"))
        assert kept == [
            "aside/after_step_0000004",
            "aside/after_step_0000004/checkpoints/step_0000006.pth",
            "aside/after_step_0000004/evaluations/step_0000006",
            "checkpoints/step_0000002.pth",
            "checkpoints/step_0000004.pth",
            "evaluations/step_0000002",
            "evaluations/step_0000004",
        ]
        assert not folder.final_weights.exists()
        assert (tmp_path / "aside/after_step_0000004/model_final.pth").exists()
        assert folder.metrics.read_text().splitlines() == lines[:2]
        assert (
            tmp_path / "aside/after_step_0000004/metrics.jsonl"
        ).read_text().splitlines() == lines[2:]
        folder.set_aside_after(4)
        folder.set_aside_after(2)
        assert len(list((tmp_path / "aside").iterdir())) == 2

    def test_a_kill_in_between_leaves_no_finished_run(self, tmp_path, monkeypatch):
        folder = RunFolder(tmp_path)
        folder.checkpoints.mkdir()
        for step in (2, 4, 6):
            (folder.checkpoints / f"step_{step:07d}.pth").touch()
        folder.final_weights.touch()
        folder.final_safetensors.touch()
        replace, moved = Path.replace, []

        def once(path: Path, target: Path) -> Path:
            if moved:
                raise KeyboardInterrupt
            moved.append(path)
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", once)
        with pytest.raises(KeyboardInterrupt):
            folder.set_aside_after(2)
        monkeypatch.undo()
        assert not folder.final_weights.exists()
        folder.set_aside_after(2)
        assert [step for step, _ in list_checkpoints(folder.checkpoints)] == [2]
        assert not folder.final_safetensors.exists()
        aside = sorted(path.name for path in (tmp_path / "aside").rglob("*.*"))
        assert aside == [
            "model_final.pth",
            "model_final.safetensors",
            "step_0000004.pth",
            "step_0000006.pth",
        ]

    def test_final_weights_are_set_aside_where_no_later_checkpoint_is(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.final_weights.touch()
        folder.metrics.write_text('{"iteration": 2}\n{"iteration": 6}\n')
        folder.set_aside_after(6, 6)
        assert folder.final_weights.exists()
        folder.set_aside_after(2, 6)
        assert not folder.final_weights.exists()
        assert folder.metrics.read_text() == '{"iteration": 2}\n'
        assert (tmp_path / "aside/after_step_0000002/metrics.jsonl").exists()

    def test_where_only_log_lines_came_after_nothing_is(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.metrics.write_text('{"iteration": 3}\n')
        folder.set_aside_after(2)
        assert not (tmp_path / "aside").exists()


def test_processes_that_differ_are_told_apart(monkeypatch):
    theirs = {"configuration": "same", "annotations": "bb"}
    others = [theirs, {**theirs, "annotations": "zz"}]

    def gather(into: list[Any], ours: Any, group: Any = None) -> None:
        into[:] = [ours, *others]

    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    with pytest.raises(
        TrainingError, match=r"agree on the annotations: ranks \[0, 1\]: bb"
    ) as caught:
        check_agreement(ranks(3), theirs)
    assert "ranks [2]: zz" in caught.value.message
    others[1] = theirs
    check_agreement(ranks(3), theirs)
