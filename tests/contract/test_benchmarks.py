"""Every benchmark still fits the code that it measures: its module runs, up to the measurement."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "parity_path", raising=False)  # sys.path was put back
    runpy.run_path(str(script), run_name=script.stem)


@pytest.fixture
def gpu_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "parity_path", raising=False)

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
        return runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="gpu")["main"]()

    return run


def test_the_gpu_benchmark_ends_at_once_without_a_gpu(gpu_benchmark, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_benchmark() == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(gpu_benchmark, tmp_path):
    file = tmp_path / "gpu.json"
    assert gpu_benchmark("--device", "cpu", "--quick", "--json", file) == 0
    found = json.loads(file.read_text())
    assert found["failed"] == 0
    assert found["left_out"] == []
    trained = found["parts"]["train: tiny fp32"]
    timed = {key for row in trained.values() for key in row if key.endswith("_ms")}
    parts = {
        "backbone",
        "proposals",
        "cascade",
        "mixup",
        "masks",
        "losses",
        "backward",
        "optimiser",
    }
    assert timed == {f"{part}_ms" for part in parts}
    assert all(row["images_per_second"] > 0 for row in trained.values())


def test_the_gpu_benchmark_says_what_its_time_left_out(gpu_benchmark, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    assert gpu_benchmark("--device", "cpu", "--quick", "--minutes", "-1", "--json", file) == 0
    left_out = json.loads(file.read_text())["left_out"]
    printed = capsys.readouterr().out
    assert len(left_out) == 3
    assert all(part in printed for part in left_out)
