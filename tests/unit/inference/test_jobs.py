"""Jobs over many images: what is planned, what a fault costs, and that nothing is lost or computed twice."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fsspec
import job_work
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from job_work import Lines, OpenMean
from PIL import Image

from proxydet.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    LockedError,
    RuntimeEnvironmentError,
    UnreachableError,
)
from proxydet.inference import sharded, sources
from proxydet.inference.pipeline import run_images
from proxydet.inference.sharded import (
    Job,
    JobSummary,
    RunOptions,
    Shard,
    open_job,
    remove_job,
    run_job,
)
from proxydet.inference.sources import SourceImage, stream_images
from proxydet.modeling.config import InferenceConfig


def png(value: int, size: tuple[int, int] = (4, 3)) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def photos(tmp_path) -> Path:
    """Images 00.png to 22.png of two shapes, each of its number's grey."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for value in range(23):
        (folder / f"{value:02d}.png").write_bytes(png(value, (4, 3) if value % 3 else (3, 4)))
    return folder


def plan(place: Path, *names: object, parts: Lines | None = None, **changes: object) -> Job:
    settings: dict = {"identity": {"detector": "a"}, "part_images": 5, **changes}
    return open_job(place / "out", [str(n) for n in names], parts=parts or Lines(), **settings)


def run(job: Job, open_work: OpenMean | None = None, **changes: object) -> JobSummary:
    return run_job(job, open_work or OpenMean(), **changes)


def rows(job: Job) -> dict[str, tuple[float | None, str | None]]:
    """All rows by the image's file name; none is there twice."""
    found: dict[str, tuple[float | None, str | None]] = {}
    for path in sorted((job.folder / "parts").iterdir()):
        for line in path.read_text().splitlines():
            name, content, error = json.loads(line)
            assert name not in found
            found[name] = (content, error)
    return {Path(name).name: value for name, value in found.items()}


def streamed(*names: object, stdin: Path | None = None) -> list[str]:
    return [image.name for image in stream_images(map(str, names), Counter(), stdin=stdin)]


# --- Sources -------------------------------------------------------------------------------------------------------------


def test_sources_stand_for_images_one_after_the_other(photos, tmp_path, monkeypatch):
    listed = tmp_path / "list.txt"
    listed.write_text(
        f"# few\n{photos}/05.png\nabsent.png\r\n  #\n{photos}/0[12].png\n\n./#1.png\n"
    )
    assert streamed(f"@{listed}") == [
        f"{photos}/05.png",
        "absent.png",
        f"{photos}/01.png",
        f"{photos}/02.png",
        "#1.png",
    ]
    nul = tmp_path / "nul"
    nul.write_bytes(b"a\nb.png\0" + os.fsencode(photos) + b"/04.png\0")
    assert streamed("-", stdin=nul) == ["a\nb.png", f"{photos}/04.png"]
    everything = streamed(photos)
    assert everything == sorted(everything)
    monkeypatch.setattr(sources, "_SORTED_AT_ONCE", 4)  # as of a folder of millions
    assert streamed(photos) == streamed(f"{tmp_path}/*/*.png") == everything
    assert len(everything) == 23
    listed.write_bytes(b"x" * (1 << 17))
    with pytest.raises(DataError, match="line is too long"):
        streamed(f"@{listed}")
    packed = bytearray(gzip.compress(os.fsencode(f"{photos}/04.png\n") * 100, mtime=0))
    listed = listed.with_suffix(".gz")
    listed.write_bytes(packed)
    assert len(streamed(f"@{listed}")) == 100
    packed[12] ^= 255
    for damaged in (packed[:-20], packed):
        listed.write_bytes(damaged)
        with pytest.raises(DataError, match=r"list\.gz"):
            streamed(f"@{listed}")


def test_members_of_tars_are_images_wherever_the_tar_is(tmp_path, monkeypatch):
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        for name, data in (("d/1.png", png(1)), ("d/1.json", b"{}"), ("../2.png", png(2))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    left_out: Counter[str] = Counter()
    images = list(stream_images([str(tar)], left_out))
    assert [image.name for image in images] == [f"{tar}/d/1.png", f"{tar}/../2.png"]
    assert left_out == {".json": 1}
    assert [int(image.read().max()) for image in images] == [1, 2]
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/sub/a.tar", tar.read_bytes())
    store.pipe("/bucket/sub/b.png", png(3))
    remote = list(stream_images(["memory://bucket/sub/*"], Counter()))
    assert [int(image.read().max()) for image in remote] == [1, 2, 3]
    assert streamed("memory://bucket/") == ["memory:///bucket/sub/b.png"]
    with pytest.raises(DataError, match="no file memory://bucket/c"):
        streamed("memory://bucket/c.png")
    with monkeypatch.context() as web:  # a server that states no size
        info = {"name": "/bucket/sub/a.tar", "size": None, "type": "file"}
        web.setattr(MemoryFileSystem, "info", lambda *_, **__: info)
        with pytest.raises(DataError, match="does not state its size"):
            streamed("memory://bucket/sub/a.tar")
    os.truncate(tar, 520)
    assert list(stream_images([str(tar)], left_out)) == []
    assert left_out["damaged tar"] == 1
    with pytest.raises(DataError, match="tar has changed"):
        images[0].read()


def test_what_changed_in_a_store_is_not_read_as_what_was_listed(tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    tars = []
    for value in (7, 9):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as file:
            member = tarfile.TarInfo("a.png")
            member.size = len(png(value))
            file.addfile(member, io.BytesIO(png(value)))
        tars.append(data.getvalue())
    store.pipe("/changing/a.tar", tars[0])
    store.pipe("/changing/b.png", png(1))
    packed, single = stream_images(["memory://changing/*"], Counter())
    monkeypatch.setattr(sources, "TAG_AGE_S", 0.0)
    assert packed.read().max() == 7
    store.pipe("/changing/a.tar", tars[1])
    with pytest.raises(DataError, match="tar has changed"):
        packed.read()
    store.pipe("/changing/b.png", png(2, (90, 80)))
    assert single.read().shape == (90, 80, 3)
    monkeypatch.setattr(sources, "LARGEST_IMAGE", 50)
    for image in (single._replace(size=10), SourceImage("memory://changing/b.png")):
        with pytest.raises(DataError, match="larger than"):
            image.read()


# --- Planning ------------------------------------------------------------------------------------------------------------


def test_a_plan_has_each_image_once_and_is_kept(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = plan(tmp_path, photos, "photos/03.png", f"{photos}/*1.png", "photos/./04.png")
    assert (job.planned, job.images, job.duplicates, len(job.offsets)) == (True, 23, 5, 5)
    planned = [image.name for part in range(5) for image in job.plan(part)]
    assert planned == streamed(photos)
    (photos / "zz.png").write_bytes(png(1))
    again = plan(tmp_path, photos, "photos/03.png", f"{photos}/*1.png", "photos/./04.png")
    assert (again.planned, again.images, again.offsets) == (False, 23, job.offsets)
    manifest = json.loads((tmp_path / "out" / "job.json").read_text())
    assert manifest["bytes"] == sum(p.stat().st_size for p in photos.glob("[0-9]*"))


def test_a_small_job_has_parts_for_several_workers(tmp_path, monkeypatch):
    listed = tmp_path / "list"
    monkeypatch.setattr(sharded, "LARGEST_PART", 100)
    for images, parts in ((300, 6), (6_000, 120), (6_400, 64), (7_000, 70)):
        listed.write_text("".join(f"{index}.png\n" for index in range(images)))
        job = plan(tmp_path / str(images), f"@{listed}", part_images=None)
        assert len(job.offsets) == parts
        assert sum(len(job.plan(part)) for part in range(parts)) == images


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"identity": {"detector": "b"}}, "detector"),
        ({"identity": {"detector": "a", "settings": {"top": 3}}}, "settings.top"),
        ({"parts": Lines(name="other")}, "results"),
        ({"part_images": 6}, "5 images"),
    ],
)
def test_a_folder_with_another_job_is_refused(photos, tmp_path, change, what):
    run(plan(tmp_path, photos))
    with pytest.raises(ConfigError, match=what):
        plan(tmp_path, photos, **change)
    with pytest.raises(ConfigError, match="sources"):
        plan(tmp_path, photos / "01.png")
    remove_job(tmp_path / "out")
    assert plan(tmp_path, photos / "01.png").images == 1


def test_results_of_another_job_are_never_taken_as_those_of_this_one(photos, tmp_path):
    job = plan(tmp_path, photos)
    run(job)
    (job.folder / "job.json").unlink()
    with pytest.raises(ConfigError, match=r"job\.json is missing"):
        plan(tmp_path, photos, identity={"detector": "b"})
    other = plan(tmp_path / "other", photos, identity={"detector": "b"})
    for name in ("finished", "parts"):
        shutil.copytree(job.folder / name, other.folder / name)
    assert run(other).before == 0
    assert run(plan(tmp_path, photos, overwrite=True)).before == 0


def test_a_job_is_replaced_only_when_the_images_of_the_next_are_found(photos, tmp_path):
    job = plan(tmp_path, photos)
    run(job)
    before = rows(job)
    with pytest.raises(DataError, match="absent"):
        plan(tmp_path, tmp_path / "absent", overwrite=True)
    assert rows(job) == before
    assert run(plan(tmp_path, photos)).before == 23
    (job.folder / "parts" / "notes.txt").write_text("mine")
    assert plan(tmp_path, photos / "01.png", overwrite=True).images == 1
    assert [path.name for path in (job.folder / "parts").iterdir()] == ["notes.txt"]


def test_settings_that_came_later_count_as_their_defaults(photos, tmp_path):
    settings = dataclasses.asdict(InferenceConfig())
    job = plan(tmp_path, photos, identity={"settings": settings})
    path = job.folder / "job.json"
    manifest = json.loads(path.read_text())
    del manifest["identity"]["settings"]["tiles"]
    path.write_text(json.dumps(manifest))
    assert not plan(tmp_path, photos, identity={"settings": settings}).planned
    with pytest.raises(ConfigError, match=r"settings\.tiles"):
        plan(tmp_path, photos, identity={"settings": {**settings, "tiles": 800}})


def test_a_plan_that_changed_is_refused(photos, tmp_path):
    path = plan(tmp_path, photos).folder / "images.jsonl"
    path.write_bytes(path.read_bytes().replace(b"01.png", b"02.png"))
    with pytest.raises(DataError, match=r"images\.jsonl"):
        plan(tmp_path, photos)


def test_what_ends_the_listing_of_images_is_not_called_the_plan(tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> Iterator[SourceImage]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/disk/photos")
        yield

    monkeypatch.setattr(sharded, "stream_images", broken)
    with pytest.raises(RuntimeEnvironmentError, match="/disk/photos") as caught:
        plan(tmp_path, "photos")
    assert "images.jsonl" not in caught.value.message


def test_a_list_that_changed_is_another_job(photos, tmp_path):
    listed = tmp_path / "list"
    listed.write_text(f"{photos}\n")
    plan(tmp_path, f"@{listed}")
    listed.write_text(f"{photos}/01.png\n")
    with pytest.raises(ConfigError, match="sources"):
        plan(tmp_path, f"@{listed}")


def test_shards_by_number_and_by_environment():
    assert Shard.parse("2/8") == Shard(2, 8)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}
    assert Shard.parse("auto", {**array, "SLURM_ARRAY_TASK_COUNT": "4"}) == Shard(3, 4)
    nodes = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}
    assert Shard.parse("auto", nodes) == Shard(1, 2)
    assert Shard.parse("auto/9", {"JOB_COMPLETION_INDEX": "8"}) == Shard(8, 9)
    for text in ("8/8", "1", "-1/3", "a/b", "auto"):
        with pytest.raises(ConfigError, match="shard"):
            Shard.parse(text, {})
    with pytest.raises(ConfigError, match="Kubernetes"):
        Shard.parse("auto", {"JOB_COMPLETION_INDEX": "8"})


# --- Running -------------------------------------------------------------------------------------------------------------


def test_batches_are_of_one_shape_and_results_in_order():
    batches = []

    def detect(batch: list[int]) -> list[int]:
        batches.append(batch)
        return [-number for number in batch]

    results = run_images(
        range(20), lambda number: number, detect, batch_size=3, shape=lambda n: n % 2
    )
    assert [(item, made[1]) for item, made in results] == [(n, -n) for n in range(20)]
    assert all(len({n % 2 for n in batch}) == 1 for batch in batches)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1, 3, 3, 3, 1]


def test_shards_do_all_and_nothing_twice(photos, tmp_path):
    job = plan(tmp_path, photos)
    done = [run(job, shard=Shard(index, 3)) for index in range(3)]
    assert [(d.images, d.unfinished) for d in done] == [(10, 3), (8, 1), (5, 0)]
    assert {name: value for name, (value, _) in rows(job).items()} == {
        f"{value:02d}.png": value for value in range(23)
    }
    before = {p: p.stat().st_mtime_ns for p in (job.folder / "parts").iterdir()}
    assert run(job).before == 23
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_errors_are_rows_and_counts_up_to_a_limit(photos, tmp_path):
    (photos / "02.png").write_bytes(b"no image")
    listed = tmp_path / "list"
    listed.write_text(f"{photos}\n{photos}/absent.png\n{photos}/07.png\n")
    job = plan(tmp_path, f"@{listed}")
    (photos / "04.png").unlink()
    (photos / "11.png").write_bytes(png(200, (9, 9)))
    with pytest.raises(DataError, match="--max-errors"):
        run(job, options=RunOptions(max_errors=1))
    assert not list((job.folder / "parts").iterdir())
    done = run(job, options=RunOptions(max_errors=3))
    assert (done.images, done.errors, done.changed, job.duplicates) == (24, 3, 1, 1)
    found = rows(job)
    assert {n for n, (_, error) in found.items() if error} == {"02.png", "04.png", "absent.png"}
    assert found["11.png"][0] == 200
    assert "02.png" in done.failures[0]
    (photos / "02.png").write_bytes(png(77))
    assert run(job).before == 24
    again = run(job, retry_errors=True)
    assert (again.errors, rows(job)["02.png"][0]) == (2, 77)


def test_a_store_that_times_out_is_asked_again_now_and_when_the_job_is_continued(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "RETRY_WAITS_S", (0.0, 0.0))
    store = fsspec.filesystem("memory")
    for value in range(12):
        store.pipe(f"/slow/{value:02d}.png", png(value))
    original, asked = MemoryFileSystem.cat_file, Counter()
    down = {"/slow/03.png"}

    def cat_file(self: MemoryFileSystem, path: str, **bounds: int) -> bytes:
        asked[path] += 1
        if path in down or (path == "/slow/01.png" and asked[path] < 3):
            raise TimeoutError("read timed out")
        return original(self, path, **bounds)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    job = plan(tmp_path, "memory://slow/")
    done = run(job)
    assert (done.images, done.errors, done.unreachable) == (12, 1, 1)
    assert "timed out" in rows(job)["03.png"][1]
    assert asked["/slow/03.png"] == 3
    down |= {f"/slow/{value:02d}.png" for value in range(5)}
    with pytest.raises(UnreachableError, match="no image of part 0"):
        run(job)
    down.clear()
    assert run(job).errors == 0
    assert rows(job) == {f"{value:02d}.png": (value, None) for value in range(12)}
    assert asked["/slow/11.png"] == 1


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server (FTP) that takes connections, and answers nothing but the login."""
    connections = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(server.accept()[0])
                threading.Thread(target=greet, args=connections[-1:], daemon=True).start()

    def greet(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            connection.sendall(b"220 ready\r\n")
            for line in lines:
                if line.startswith(b"USER"):
                    connection.sendall(b"230 welcome\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield f"ftp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


def test_a_store_that_never_answers_costs_its_deadline(photos, silent, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RETRY_WAITS_S", (0.0,))
    monkeypatch.setattr(sources, "ANSWER_S", 0.2)
    listed = tmp_path / "list"
    listed.write_text(f"{silent}/a.png\n{photos}/01.png\n")
    job = plan(tmp_path, f"@{listed}")
    began = time.monotonic()
    done = run(job)
    assert (done.images, done.unreachable, time.monotonic() - began < 10) == (2, 1, True)
    assert "no answer within" in str(rows(job)["a.png"][1])
    with pytest.raises(UnreachableError, match="no answer within"):
        streamed(f"{silent}/photos/")


def test_a_read_that_hangs_keeps_neither_the_job_nor_the_process_from_ending():
    code = """
import threading
from proxydet.inference import pipeline
pipeline.ENDING_S = 0.1
begun, never = threading.Event(), threading.Event()
read = lambda number: number and (begun.set(), never.wait())
results = pipeline.run_images([0, 1], read, list, batch_size=1)
print(next(results), begun.wait())
results.close()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, check=True, timeout=60)
    assert done.stdout == b"(0, (0, 0)) True\n"


def test_a_full_disk_ends_the_job_and_costs_one_part(photos, tmp_path):
    job = plan(tmp_path, photos, parts=Lines(full="000002"))
    with pytest.raises(DiskFullError, match="000002"):
        run(job)
    assert [p.name for p in sorted((job.folder / "parts").iterdir())] == [
        "000000.jsonl",
        "000001.jsonl",
    ]
    done = run(plan(tmp_path, photos))
    assert (done.before, done.images, len(rows(job))) == (10, 23, 23)


def test_half_written_and_lost_parts_are_computed_again(photos, tmp_path):
    job = plan(tmp_path, photos)
    run(job)
    whole = {p.name: p.read_bytes() for p in (job.folder / "parts").iterdir()}
    os.truncate(job.file(1), 20)
    job.file(2).write_bytes(bytes(len(job.file(2).read_bytes())))
    job.file(3).unlink()
    ledger = job.folder / "finished" / "0-of-1.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-9])  # a power cut: the last part's line is not whole
    (job.folder / "parts" / ".000004.jsonl.abc.tmp").write_text("left by a killed process")
    assert run(job).before == 5
    for name, content in whole.items():
        assert (job.folder / "parts" / name).read_bytes() == content


def test_two_writers_on_a_shard_are_told(photos, tmp_path):
    job = plan(tmp_path, photos)
    words = [sys.executable, job_work.__file__, tmp_path / "out2", photos, "0.2", "1", "0/2"]
    with subprocess.Popen(
        words, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ) as other:
        while not list((tmp_path / "out2").glob("parts/.*")):
            time.sleep(0.02)
        theirs = open_job(
            tmp_path / "out2", [str(photos)], identity={}, parts=Lines(), part_images=5
        )
        with pytest.raises(LockedError, match="0/2"):
            run(theirs, shard=Shard(0, 2))
        with pytest.raises(LockedError, match="2 shards"):
            run(theirs, shard=Shard(0, 3))
        with pytest.raises(LockedError):
            remove_job(tmp_path / "out2")
        assert run(theirs, shard=Shard(1, 2)).images == 10
        other.kill()
    assert run(theirs).images == 23
    assert run(job).images == 23
    assert rows(theirs) == rows(job)


def test_a_worker_that_is_killed_is_replaced(photos, tmp_path):
    (photos / "12.png").write_bytes(png(job_work.FATAL))
    killed = tmp_path / "killed"
    killed.mkdir()
    job = plan(tmp_path, photos)
    done = run(job, OpenMean(lethal=1, folder=str(killed)), options=RunOptions(workers=2))
    assert (done.images, done.errors, len(list(killed.iterdir()))) == (23, 0, 1)
    alone = plan(tmp_path / "alone", photos)
    run(alone)
    assert rows(job) == rows(alone)


def test_a_worker_that_is_killed_between_two_parts_is_replaced(photos, tmp_path, monkeypatch):
    job = plan(tmp_path, photos)
    original, sent = Connection.send, []

    def send(self: Connection, message: object) -> None:
        sent.append(message)
        if len(sent) == 3:  # the second part of the worker that was first
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
        original(self, message)

    monkeypatch.setattr(Connection, "send", send)
    done = run(job, options=RunOptions(workers=2))
    assert (done.images, done.unfinished, len(sent) > 5) == (23, 0, True)
    assert len(rows(job)) == 23


@pytest.mark.parametrize("large", [False, True])
def test_of_large_images_few_are_in_memory(photos, tmp_path, large):
    prepared: list[int] = []
    done, ahead = [0], []

    class Counted(OpenMean):
        def read(self, image: SourceImage, root: str) -> Any:
            prepared.append(1)
            return super().read(image, root)

        def run(self, batch: list[Any]) -> list[float]:
            time.sleep(0.01)
            ahead.append(len(prepared) - done[0])
            done[0] += len(batch)
            return super().run(batch)

    job = plan(tmp_path, photos, part_images=23)
    run(job, Counted(large=large), options=RunOptions(batch_size=4))
    assert (max(ahead) <= 8) == large


@pytest.mark.slow
def test_an_image_that_kills_every_worker_is_named(photos, tmp_path):
    (photos / "12.png").write_bytes(png(job_work.FATAL))
    (tmp_path / "killed").mkdir()
    job = plan(tmp_path, photos)
    with pytest.raises(RuntimeEnvironmentError, match=r"part 2, .*10\.png, .*3 times"):
        run(
            job,
            OpenMean(lethal=99, folder=str(tmp_path / "killed")),
            options=RunOptions(workers=2),
        )


@pytest.mark.parametrize(
    ("kills", "workers"), [(2, 1), pytest.param(50, 2, marks=pytest.mark.slow)]
)
def test_kills_at_random_moments_lose_nothing(photos, tmp_path, kills, workers):
    """Of the command or of a worker; a job that comes to its end is checked, and another one begun."""
    rng = random.Random(kills)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, job_work.__file__]
    jobs, killed = 0, 0
    finished: set[str] = set()
    while killed < kills:
        out = tmp_path / f"out{jobs}"
        options = [out, photos, str(rng.choice([0.02, 0.1])), str(workers)]
        with subprocess.Popen([*words, *options], env=environment) as process:
            while process.poll() is None and not (out / "shards").exists():
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 2.0))
            victims = tree(process.pid)
            if process.poll() is None:
                killed += 1
                victim = rng.choice(victims)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                if victim != process.pid:
                    time.sleep(rng.uniform(0.0, 1.0))
                    process.kill()
        parts = {path.name for path in (out / "parts").glob("[0-9]*")}
        assert finished <= parts
        finished = parts
        if len(parts) == 5 or killed == kills:
            job = open_job(out, [str(photos)], identity={}, parts=Lines(), part_images=5)
            assert run(job).images == 23
            assert rows(job) == {f"{value:02d}.png": (value, None) for value in range(23)}
            assert not list((out / "parts").glob(".*"))
            jobs, finished = jobs + 1, set()


def tree(pid: int) -> list[int]:
    """A process and those that it has started, at any depth."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            found += [int(child) for child in children]
    return found
