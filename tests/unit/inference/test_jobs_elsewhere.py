"""The command with worker processes, and jobs and the callable on Ray, for those who have it: the same rows as here."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from job_work import FATAL, Lines, OpenMean
from PIL import Image

from proxydet.inference.sharded import RunOptions, open_job, run_job


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for index in range(12):
        size = (48, 64) if index % 3 else (64, 48)
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def run_folder(tmp_path, network, encoder) -> Path:
    import torch

    from proxydet.config import dump_yaml
    from proxydet.recipes import get_recipe

    folder = tmp_path / "run"
    folder.mkdir()
    recipe = get_recipe("tiny")
    data = dataclasses.replace(recipe.data, test_shortest_side=64, test_longest_side=100)
    (folder / "config.yaml").write_text(dump_yaml(dataclasses.replace(recipe, data=data)))
    network.vocabulary.save(folder / "vocabulary.npz")
    encoder.save(folder / "text_encoder.json")
    torch.save({"model": network.state_dict()}, folder / "model_final.pth")
    return folder


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    paths = os.pathsep.join(path for path in sys.path if path)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    yield ray
    ray.shutdown()


def predict(run: Path, photos: Path, output: Path, *words: str, **variables: str) -> list[bytes]:
    """Run the command, and return the lines of all parts that are there then."""
    command = [sys.executable, "-m", "proxydet_cli", "predict", photos, "--run", run]
    command += ["--output", output, "--part-size", "3", *words]
    command += ["--score-threshold", "0.02", "--device", "cpu"]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert "Traceback" not in ended.stderr
    assert ended.returncode in (0, 3), ended.stderr
    parts = sorted((output / "parts").iterdir())
    return [line for part in parts for line in part.read_bytes().splitlines()]


@pytest.mark.slow
def test_workers_and_shards_of_the_command_give_the_same_rows(run_folder, photos, tmp_path):
    alone = predict(run_folder, photos, tmp_path / "one", "--save", "jsonl")
    rows = [json.loads(line) for line in alone]
    assert len(rows) == 13
    assert [row["file"] for row in rows if "error" in row] == [str(photos / "broken.png")]
    assert any(row.get("detections") for row in rows)
    assert predict(run_folder, photos, tmp_path / "two", "--workers", "2") == alone
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
    done = [
        predict(
            run_folder,
            photos,
            tmp_path / "shards",
            "--shard",
            "auto",
            SLURM_ARRAY_TASK_ID=task,
            **array,
        )
        for task in ("1", "0")
    ]
    assert len(done[0]) == 6
    assert done[1] == alone


@pytest.mark.slow
def test_actors_of_ray_give_the_same_rows_and_are_replaced(ray, photos, tmp_path):
    Image.fromarray(np.full((4, 4, 3), FATAL, np.uint8)).save(photos / "05.png")
    killed = tmp_path / "killed"
    killed.mkdir()
    parts = {}
    for engine in ("ray", "processes"):
        job = open_job(tmp_path / engine, [str(photos)], identity={}, parts=Lines(), part_images=3)
        work = OpenMean(lethal=1, folder=str(killed))
        done = run_job(job, work, engine=engine, options=RunOptions(workers=2))
        assert (done.images, done.errors) == (13, 1)
        parts[engine] = [path.read_bytes() for path in sorted((job.folder / "parts").iterdir())]
    assert parts["ray"] == parts["processes"]
    assert len(list(killed.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray's own settings
def test_ray_data_takes_the_callable_as_it_is(ray, run_folder, photos, tmp_path):
    import ray.data

    from proxydet.inference.rows import DetectRows

    rows = [
        json.loads(line)
        for line in predict(
            run_folder, photos, tmp_path / "out", "--save", "jsonl", "--batch-size", "1"
        )
    ]
    found = ray.data.from_items([{"path": row["file"]} for row in rows]).map_batches(
        DetectRows,
        fn_constructor_kwargs={
            "detector": str(run_folder),
            "score_threshold": 0.02,
            "device": "cpu",
            "batch_size": 1,
        },
        batch_size=4,
        concurrency=2,
    )
    columns = sorted(found.take_all(), key=lambda row: row["path"])
    for row, column in zip(rows, columns, strict=True):
        assert column["path"] == row["file"]
        assert column["error"] == row.get("error")
        entries = row.get("detections", [])
        assert list(column["labels"]) == [entry["label"] for entry in entries]
        assert list(column["scores"]) == [entry["score"] for entry in entries]
        assert [list(box) for box in column["boxes"]] == [entry["box_xyxy"] for entry in entries]
        assert list(column["masks"]) == [entry["mask"]["counts"] for entry in entries]
