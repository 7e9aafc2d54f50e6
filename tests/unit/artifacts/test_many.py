"""Many files in one call: who is given up, what stops all, what is done one at a time, and how much room it takes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import proxydet.artifacts.fetch as fetch_module
import proxydet.artifacts.obtain as obtain_module
from proxydet.artifacts.artifact import Content, Provided, Unpack
from proxydet.artifacts.catalogue import Catalogue, CatalogueFile
from proxydet.artifacts.downloader import Downloader, DownloadOptions
from proxydet.artifacts.obtain import Outcome
from proxydet.errors import DigestError, DiskFullError, TransferError


@pytest.fixture
def run(tmp_path, quick):
    def make(*artifacts, jobs: int = 1, **options):
        settings = dataclasses.replace(quick, jobs=jobs)
        chosen = DownloadOptions(root=tmp_path, settings=settings, **options)
        catalogue = Catalogue([("test", CatalogueFile(artifacts=artifacts))])
        with Downloader(catalogue, chosen) as downloader:
            plan = downloader.plan([artifact.name for artifact in artifacts])
            return plan, downloader.fetch(plan)

    return make


@pytest.fixture
def ends(monkeypatch) -> Callable[..., list[str]]:
    """Have the artifacts end as told, one after another; returns those that were tried."""

    def tell(*errors: Exception | None) -> list[str]:
        tried: list[str] = []

        def obtain(artifact, job, *, announced=None) -> Outcome:
            error = errors[len(tried)]
            tried.append(artifact.name)
            if error is not None:
                raise error
            return Outcome(name=artifact.name, status="fetched", path=Path(artifact.target))

        monkeypatch.setattr(fetch_module, "obtain", obtain)
        return tried

    return tell


REFUSED, WRONG = TransferError("It refuses."), DigestError("Other bytes.")


@pytest.mark.parametrize(
    ("errors", "tried"),
    [
        ([REFUSED, REFUSED, REFUSED, None], 3),
        ([REFUSED, REFUSED, None, REFUSED, REFUSED, None], 6),
        ([WRONG] * 5, 5),
        ([DiskFullError("No room."), None, None], 1),
    ],
    ids=["three refusals", "an answer between", "wrong bytes are an answer", "full disk"],
)
def test_when_the_rest_is_not_tried(run, artifact, ends, errors, tried) -> None:
    asked = ends(*errors)
    run(*(artifact(f"t{number}", b"x") for number in range(len(errors))))
    assert len(asked) == tried


def photos(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"{name}/1.jpg", b"x" * 1000)
    return stream.getvalue()


@pytest.fixture
def archives(server, artifact):
    made = []
    for name in ("a", "b", "c"):
        data = photos(name)
        server.add(f"/{name}", data)
        unpack = Unpack(folder="datasets/set", provides=(Provided(path=name, size=None),))
        made.append(artifact(name, data, target=f"datasets/set/{name}.zip", unpack=unpack))
    return made


def test_archives_are_unpacked_one_at_a_time(run, archives, monkeypatch) -> None:
    unpack, inside, second = obtain_module.unpack, [], threading.Event()

    def watched(*arguments):
        inside.append(arguments)
        if len(inside) > 1:
            second.set()
        second.wait(0.2)
        count = unpack(*arguments)
        inside.pop()
        return count

    monkeypatch.setattr(obtain_module, "unpack", watched)
    run(*archives, jobs=3)[1].raise_for_failures()
    assert not second.is_set()


@pytest.mark.parametrize(("keep", "at_once"), [(True, 3), (False, 1)])
def test_the_room_for_archives_counts_those_that_lie_there_together(
    run, archives, keep, at_once
) -> None:
    size = len(photos("a"))
    plan, report = run(*archives, keep_archives=keep)
    report.raise_for_failures()
    assert plan.needs[0].needed == 3 * size + at_once * size


def test_a_file_put_there_by_hand_must_hold_what_the_catalogue_says(
    run, artifact, tmp_path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/thing.bin").write_bytes(b"no checkpoint")
    (failure,) = run(artifact(content=Content(kind="tensors")))[1].failures
    assert isinstance(failure.error, DigestError)
    assert "is there, but is not thing" in failure.error.message
    assert not (tmp_path / "models/artifacts.lock.json").exists()


def test_another_size_than_at_first_use_is_refused_before_it_is_fetched(
    run, server, artifact, tmp_path, body
) -> None:
    server.add("/thing", body)
    run(artifact())[1].raise_for_failures()
    (tmp_path / "models/thing.bin").unlink()
    server.add("/thing", body + b"more")
    (failure,) = run(artifact())[1].failures
    assert f"serves {len(body) + 4} bytes, but thing has {len(body)}" in failure.error.message
    assert hashlib.sha256(body).hexdigest() in (tmp_path / "models/artifacts.lock.json").read_text()
