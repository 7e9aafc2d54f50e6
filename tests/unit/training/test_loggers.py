"""Where a training's records also go: loggers get every record, and none of them can end the training."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from proxydet.config import merge
from proxydet.errors import ConfigError, MissingDependencyError
from proxydet.training.config import LogConfig
from proxydet.training.logs import find_loggers

MODULE = "own_logs"


class Keeps:
    made: list[Keeps] = []  # noqa: RUF012

    def __init__(self, folder, config, iteration):
        self.folder, self.config, self.began = folder, config, iteration
        self.values, self.closed = {}, False
        Keeps.made.append(self)

    def log(self, values, iteration):
        self.values.setdefault(iteration, {}).update(values)

    def close(self):
        self.closed = True


class Fails(Keeps):
    at = "log"

    def __init__(self, folder, config, iteration):
        super().__init__(folder, config, iteration)
        self.calls = 0
        if self.at == "init":
            raise ConnectionError("the server is down")

    def log(self, values, iteration):
        self.calls += 1
        if self.at == "log":
            raise ConnectionError("the server is down")

    def close(self):
        if self.at == "close":
            raise ConnectionError("the server is down")


class NoClose:
    def __init__(self, folder, config, iteration):
        pass

    def log(self, values, iteration):
        pass


@pytest.fixture(autouse=True)
def _module(monkeypatch):
    module = types.ModuleType(MODULE)
    vars(module).update(Keeps=Keeps, Fails=Fails, NoClose=NoClose)
    monkeypatch.setitem(sys.modules, MODULE, module)
    Keeps.made.clear()


def trained(toy, folder: Path, *loggers: str, iterations: int = 4) -> list[dict]:
    changes = {"log": {"loggers": list(loggers)}, "iterations": iterations}
    toy.run(folder, changes)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_logger_gets_every_record_and_knows_where_it_began(toy, tmp_path):
    records = trained(toy, tmp_path / "run", f"{MODULE}:Keeps")
    (kept,) = Keeps.made
    assert kept.closed
    assert (kept.folder, kept.began) == (tmp_path / "run", 0)
    losses = {
        at: {n.removeprefix("loss/"): v for n, v in values.items() if n.startswith("loss/")}
        for at, values in kept.values.items()
    }
    assert losses == {record["iteration"]: record["losses"] for record in records}
    assert all("train/learning_rate" in values for values in kept.values.values())


@pytest.mark.parametrize("at", ["init", "log", "close"])
def test_one_that_fails_is_reported_once_and_left_out(toy, tmp_path, monkeypatch, caplog, at):
    monkeypatch.setattr(Fails, "at", at)
    records = trained(toy, tmp_path / "run", f"{MODULE}:Fails", f"{MODULE}:Keeps")
    assert len(records) == 2
    failing, kept = Keeps.made
    assert len(kept.values) == 2
    assert kept.closed
    assert at == "init" or failing.calls == {"log": 1, "close": 2}[at]
    said = [r.getMessage() for r in caplog.records if "the server is down" in r.getMessage()]
    assert len([text for text in said if "gets no more" in text]) == 1


@pytest.mark.parametrize("name", ["NoClose", "Absent"])
def test_what_is_no_logger_is_refused_before_training(name):
    with pytest.raises(ConfigError, match=rf"training\.log\.loggers is {MODULE}:{name}"):
        find_loggers(LogConfig(loggers=(f"{MODULE}:{name}",)))


def test_a_package_that_is_not_installed_comes_with_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        find_loggers(LogConfig(tensorboard=False, loggers=("wandb",)))
    assert "proxydet[wandb]" in str(caught.value.hint)


def test_a_misspelt_logger_is_refused():
    with pytest.raises(ConfigError, match="'wandb'"):
        merge(LogConfig(), {"loggers": ["wandbb"]})


class StandIn:
    """What W&B's and MLflow's modules are asked for, and what they were given."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            return None if name == "get_experiment_by_name" else self

        return call

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


def test_wandb_resumes_its_run_and_is_offline_without_a_login(toy, tmp_path, monkeypatch):
    module, run = types.ModuleType("wandb"), StandIn()
    run.id = "abc"
    given = []
    module.init = lambda **options: given.append(options) or run
    module.login = lambda **options: False
    module.Settings = dict
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trained(toy, tmp_path / "run", "wandb")
    trained(toy, tmp_path / "run", "wandb", iterations=6)
    assert [(options["mode"], options["id"]) for options in given] == [
        ("offline", None),
        ("offline", "abc"),
    ]
    logged = [arguments[0] for name, arguments, _ in run.calls if name == "log"]
    assert [values["iteration"] for values in logged] == [2, 4, 6]
    assert run.names().count("finish") == 2


def test_mlflow_gets_parameters_once_and_every_record(toy, tmp_path, monkeypatch):
    client, addresses = StandIn(), []
    client.info = types.SimpleNamespace(run_id="r1")
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    module.MlflowClient = lambda tracking_uri: addresses.append(tracking_uri) or client
    entities.Metric = lambda *values: values
    entities.Param = lambda *values: values
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trained(toy, tmp_path / "run", "mlflow")
    trained(toy, tmp_path / "run", "mlflow", iterations=6)
    assert addresses[0] == f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    assert client.names().count("create_run") == 1
    steps = [
        {metric[3] for metric in options["metrics"]}
        for name, _, options in client.calls
        if name == "log_batch" and "metrics" in options
    ]
    assert steps == [{2}, {4}, {6}]
