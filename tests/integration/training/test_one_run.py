"""``proxydet train``: two at once in one folder are one run; on changing numbers of processes it stays the same run."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from trainings import finish, records, same, start, wait_for

from proxydet.recipes import resolve_config
from proxydet.training.step import learning_rate_factor

pytestmark = pytest.mark.slow


class Trainings:
    """Starts trainings of one data set."""

    def __init__(self, folder: Path, sets: list[str]) -> None:
        self.folder = folder
        self.sets = sets
        self._words = [word for item in sets for word in ("--set", item)]

    def start(
        self,
        name: str,
        *words: str,
        processes: int = 1,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.Popen[str]:
        command = ["-m", "proxydet_cli", "train", "--recipe", "tiny", "--device", "cpu"]
        command += ["--output", name] if name else []
        command += ["--gpus", str(processes)] if not environment else []
        return start(*command, *self._words, *words, cwd=self.folder, environment=environment)

    def run(self, name: str, *words: str, processes: int = 1) -> str:
        code, errors = finish(self.start(name, *words, processes=processes))
        assert code == 0, errors
        return errors

    def until(
        self, name: str, step: int, *words: str, processes: int, how: int = signal.SIGTERM
    ) -> str:
        """Train until a step is recorded, and stop then: the first process, with which the others end."""
        process = self.start(name, *words, processes=processes)
        wait_for(lambda: len(self.records(name)) >= step, process)
        process.send_signal(how)
        code, errors = finish(process)
        assert code == (-9 if how == signal.SIGKILL else 128 + how), errors
        assert not (self.folder / name / "model_final.pth").exists()
        return errors

    def records(self, name: str) -> list[dict]:
        timeless = ("iteration", "images", "losses", "learning_rate")
        steps = [record for record in records(self.folder / name) if "losses" in record]
        return [{key: record[key] for key in timeless} for record in steps]

    def batches(self, name: str) -> list[tuple[int, str]]:
        """Return processes and iterations of a step from each record of a change."""
        lines = records(self.folder / name)
        changes = [line["batches"] for line in lines if "batches" in line]
        return [(change["processes"], change["step"]) for change in changes]

    def same(self, one: str, other: str) -> bool:
        equal = self.records(one) == self.records(other)
        return equal and same(self.folder / one, self.folder / other)


@pytest.fixture
def trainings(drawn, tmp_path) -> Trainings:
    return Trainings(
        tmp_path,
        [
            *drawn,
            "training.iterations=8",
            "training.checkpoints.period=2",
            "training.log.period=1",
            "training.log.tensorboard=false",
            "training.evaluation.at_end=false",
            "data.workers=0",
        ],
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_or_stopped_at_a_random_step_it_ends_bit_for_bit_the_same(trainings, processes):
    sets = [item for item in trainings.sets if "data.workers" not in item]
    trainings = Trainings(trainings.folder, [*sets, "data.workers=2", "training.scaling=none"])
    trainings.run("whole", processes=processes)
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1):
        trainings.until(how.name, random.randrange(1, 4), processes=processes, how=how)
        trainings.run(how.name, processes=processes)
        assert trainings.same("whole", how.name)


@pytest.mark.parametrize(
    "second", [(), ("--set", "seed=8"), ("--resume", "never"), ("--overwrite",)], ids=" ".join
)
def test_of_two_trainings_at_once_one_wins_and_the_other_exits_at_once(trainings, second):
    both = [trainings.start("run"), trainings.start("run", *second)]
    ended = [finish(process) for process in both]
    codes = [code for code, _ in ended]
    assert sorted(codes) == [0, 5], ended
    loser = codes.index(5)
    assert f"in use by process {both[1 - loser].pid} on" in ended[loser][1].replace("\n", " ")
    trainings.run("alone", *(second if loser == 0 else ()))
    assert trainings.same("run", "alone")
    assert not list((trainings.folder / "run").glob("train.lock*"))


def test_tasks_of_srun_train_in_the_folder_that_the_first_one_chooses(trainings):
    """Even where a task looks for it later, when others have written there, or elsewhere."""
    port = free_port()
    tasks = []
    for rank in range(2):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_ID": 0, "SLURM_JOB_ID": 7}
        count = {"SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NUM_NODES": 1}
        per_node = {"SLURM_TASKS_PER_NODE": 2, "SLURM_STEP_TASKS_PER_NODE": 2}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PROXYDET_RUNS": f"runs-{rank}"}
        variables = {**place, **count, **per_node, **meet}
        tasks.append(
            trainings.start("", environment={name: str(value) for name, value in variables.items()})
        )
    ended = [finish(task) for task in tasks]
    assert [code for code, _ in ended] == [0, 0], ended
    assert [path.name for path in trainings.folder.glob("runs-*")] == ["runs-0"]
    manifest = json.loads((trainings.folder / "runs-0/tiny/manifest.json").read_text())
    assert manifest["world_size"] == 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_processes_then_one_then_two_are_the_same_run(trainings):
    two = ("training.scaling=none", "training.iterations=12")
    trainings = Trainings(trainings.folder, [*trainings.sets, *two])
    trainings.run("whole", processes=2)
    trainings.until("changing", 2, processes=2)
    said = trainings.until("changing", 5, processes=1)
    assert "as many images a step as before" in said.replace("\n", " ")
    trainings.run("changing", processes=2)
    whole, changing = trainings.records("whole"), trainings.records("changing")
    for one, other in zip(whole, changing, strict=True):
        assert one["learning_rate"] == other["learning_rate"]
        assert (one["iteration"], one["images"]) == (other["iteration"], other["images"])
        # The proposal losses are averaged over the cells of both processes, or of each batch.
        assert one["losses"]["total"] == pytest.approx(other["losses"]["total"], rel=0.05)


def test_with_another_batch_the_schedule_follows_the_images(trainings):
    """Two processes with batches of 2, one with batches of 4, two with batches of 4: twice the images a step."""
    sets = [*trainings.sets, "data.image_labels=null", "training.iterations=24"]
    trainings = Trainings(trainings.folder, [*sets, "training.schedule.warmup_iterations=8"])
    larger = ("--set", "data.boxes.batch_size=4")
    trainings.until("run", 3, processes=2)
    said = trainings.until("run", 6, *larger, processes=1).replace("\n", " ")
    assert "data.boxes.batch_size 4 instead of 2" in " ".join(said.split())
    said = trainings.run("run", *larger, processes=2)
    assert "2 times the images a step" in " ".join(said.split())
    training = resolve_config(None, trainings.folder / "run/config.yaml").training
    assert (training.iterations, training.replicas, training.schedule.warmup_iterations) == (
        12,
        2,
        4,
    )
    before, steps = 0.0, set()
    for record in trainings.records("run"):
        step = record["images"] / 4 - before
        factor = learning_rate_factor(before, training.iterations, training.schedule)
        assert record["learning_rate"] == training.optimizer.learning_rate * factor * step
        assert record["iteration"] == min(before + step, 12)
        before += step
        steps.add(step)
    assert steps == {1.0, 2.0}
    assert trainings.batches("run") == [(1, "1"), (2, "2")]
    assert record["iteration"] == 12
