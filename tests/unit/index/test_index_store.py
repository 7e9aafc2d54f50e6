"""Images are added, replaced, moved, merged and removed; nothing is lost, nothing is there twice, and damage is named."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from region_indexes import made, paths

from proxydet import Detector, RegionIndex
from proxydet.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    InputError,
    LockedError,
)
from proxydet.index import store
from proxydet.index.build import (
    finish_addition,
    index_images,
    open_addition,
    open_index,
    run_addition,
)
from proxydet.index.store import IndexWriter, StoredIndex
from proxydet.inference.sharded import Shard


@pytest.fixture
def own(photos, tmp_path) -> Path:
    """Photos that a test may change."""
    return Path(shutil.copytree(photos, tmp_path / "own"))


@pytest.fixture
def index(exact, photos, tmp_path) -> Path:
    """An index that a test may change."""
    return Path(shutil.copytree(exact, tmp_path / "copy.index"))


def run(detector, folder: Path, index: Path, **options):
    return index_images(detector, [folder], index, **options)


def changed(folder: Path) -> None:
    """Give all photos another content."""
    for file in folder.glob("*.png"):
        file.write_bytes(file.read_bytes() + b"0")


class Counting(Detector):
    """Counts the images that are embedded; raises an error at the third."""

    def __init__(self, like: Detector, error: BaseException | None = None) -> None:
        super().__init__(like.network, shortest=64, longest=100, encoder=like.encoder)
        self.embedded = 0
        self.error = error

    def embed(self, images, settings=None):
        self.embedded += len(images)
        if self.error is not None and self.embedded > 2:
            raise self.error
        return super().embed(images, settings)


def test_what_has_not_changed_is_left_alone_and_what_has_is_replaced(own, detector, tmp_path):
    counting, index = Counting(detector), tmp_path / "photos.index"
    (own / "broken.jpg").write_bytes(b"no image")
    first = run(counting, own, index)
    assert (first.added, first.unchanged, first.images, counting.embedded) == (4, 0, 4, 4)
    assert [Path(entry.file).name for entry in first.unreadable] == ["broken.jpg"]
    (own / "broken.jpg").unlink()
    again = run(counting, own, index)
    assert (again.added, again.unchanged, again.images, counting.embedded) == (0, 4, 4, 4)

    Image.new("RGB", (70, 50), (200, 30, 30)).save(own / "p1.png")
    (own / "p2.png").rename(own / "moved.png")
    shutil.copy(own / "p0.png", own / "copy.png")
    changed = run(counting, own, index)
    assert (changed.added, changed.copied, changed.unchanged) == (1, 2, 2)
    assert counting.embedded == 5
    assert paths(index) == sorted(map(str, own.glob("*.png")))
    assert StoredIndex(index).verify(images=True) == []
    fresh = made(tmp_path / "fresh.index", detector, own)
    hits, wanted = (RegionIndex(place).search(score_threshold=0.1) for place in (index, fresh))
    assert {hit.path: hit.found.to_dict() for hit in hits} == {
        hit.path: hit.found.to_dict() for hit in wanted
    }


def test_a_path_given_twice_is_indexed_once(own, detector, tmp_path):
    index = tmp_path / "photos.index"
    images = [own / "p0.png", own / "../own/p0.png", os.path.relpath(own / "p0.png")]
    index_images(detector, images, index)
    assert paths(index) == [str(own / "p0.png")]


@pytest.mark.parametrize("regions", [None, 20])
def test_parts_that_were_merged_and_cut_give_what_one_index_gives(
    own, detector, tmp_path, regions, monkeypatch
):
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 2)
    names = sorted(own.glob("*"))
    for name, chosen in (("a", names[:3]), ("b", names[2:])):
        index_images(detector, chosen, tmp_path / name, most_regions=regions)
    whole = made(tmp_path / "whole", detector, own, regions)
    with IndexWriter(tmp_path / "a") as writer:
        assert writer.merge(StoredIndex(tmp_path / "b")) == (1, 1)
    assert paths(tmp_path / "a") == paths(whole)
    with IndexWriter(tmp_path / "a") as writer:
        assert writer.merge(StoredIndex(tmp_path / "b")) == (0, 2)
    for place in (tmp_path / "a", whole):
        with IndexWriter(place) as writer:
            assert writer.remove([str(names[0]), "never there"]) == 1
    assert paths(tmp_path / "a") == paths(whole) == list(map(str, names[1:]))
    merged, wanted = (
        {hit.path: hit.found for hit in RegionIndex(place).search(score_threshold=0.1)}
        for place in (tmp_path / "a", whole)
    )
    assert merged.keys() == wanted.keys()
    for path, found in merged.items():
        # Rounding depends on what else is in a part.
        np.testing.assert_allclose(found.scores[:3], wanted[path].scores[:3], atol=0.01)
    assert StoredIndex(tmp_path / "a").verify() == []


def test_another_detector_and_another_mode_are_refused(own, index, detector):
    other = Detector(detector.network, shortest=32, longest=100, encoder=detector.encoder)
    with pytest.raises(DataError, match="sides"):
        run(other, own, index)
    with pytest.raises(DataError, match="--compact"):
        run(detector, own, index, most_regions=30)
    with pytest.raises(ConfigError, match="one view"):
        run(detector.with_augmentation(), own, index)
    with pytest.raises(ConfigError, match="rescoring"):
        run(detector.with_settings(rescore=True), own, index)
    with pytest.raises(DataError, match=r"p0\.png"):
        run(detector, own, own)
    assert sorted(path.name for path in own.glob("*")) == [f"p{n}.png" for n in range(4)]


def test_a_second_process_that_adds_or_removes_is_refused(own, index, detector):
    (own / "p0.png").write_bytes((own / "p1.png").read_bytes() + b"0")
    second = []

    class Late(Counting):
        def embed(self, images, settings=None):
            for again in (lambda: run(detector, own, index), lambda: IndexWriter(index)):
                with pytest.raises(LockedError, match="copy"), IndexWriter(index):
                    again()
                second.append(again)
            with pytest.raises(LockedError, match="adding"):
                run(detector, own, index)
            return super().embed(images, settings)

    assert run(Late(detector), own, index).added == 1
    assert len(second) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stopped")])
def test_what_was_added_before_an_error_is_kept(own, detector, tmp_path, error, monkeypatch):
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 1)
    index = tmp_path / "photos.index"
    with pytest.raises(BaseException, match="stopped"):
        run(Counting(detector, error), own, index, batch_size=1)
    kept = paths(index)
    assert kept == [str(own / "p0.png"), str(own / "p1.png")]
    done = run(detector, own, index)
    assert (done.unchanged, done.images) == (2, 4)


def test_what_a_killed_process_had_finished_is_taken_whatever_is_added_next(
    own, detector, tmp_path, monkeypatch
):
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 1)
    index, counting = tmp_path / "photos.index", Counting(detector)
    with monkeypatch.context() as killed:
        killed.setattr("proxydet.index.build.finish_addition", lambda *_, **__: None)
        with pytest.raises(RuntimeError, match="stopped"):
            run(Counting(detector, RuntimeError("stopped")), own, index, batch_size=1)
    assert paths(index) == []
    assert len(list((index / "adding" / "parts").glob("*"))) == 2
    done = run(counting, own / "p3.png", index)
    assert (done.added, done.images, counting.embedded) == (1, 3, 1)
    assert (run(counting, own, index).images, counting.embedded) == (4, 2)
    assert not (index / "adding").exists()
    assert StoredIndex(index).verify() == []


def test_a_job_stays_until_the_index_can_take_it(own, index, detector, monkeypatch):
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 1)
    changed(own)
    (part,) = (index / "parts").glob("*")

    class Breaking(Detector):
        def embed(self, images, settings=None):
            part.unlink(missing_ok=True)
            return super().embed(images, settings)

    breaking = Breaking(detector.network, shortest=64, longest=100, encoder=detector.encoder)
    with pytest.raises(DataError, match="No such file"):
        run(breaking, own, index)
    with IndexWriter(index) as writer:
        writer.remove_damaged()
    counting = Counting(detector)
    assert (run(counting, own, index).unchanged, counting.embedded) == (4, 0)


@pytest.mark.parametrize("shard", [Shard(), Shard(0, 2)])
def test_what_a_killed_process_left_of_a_finished_job_is_removed(own, index, detector, shard):
    changed(own)
    for name in ("parts/000000.safetensors", "finished/0-of-1.jsonl"):
        (index / "adding" / name).parent.mkdir(parents=True)
        (index / "adding" / name).touch()
    work = open_index(detector, index)
    job = open_addition(index, [str(own)], shard=shard)
    assert run_addition(index, job, lambda _: work, shard=shard).added == 4


@pytest.mark.parametrize("later", ["p1.png", "p0.png"])
def test_a_job_that_another_process_began_meanwhile_stays(own, index, later):
    changed(own)
    ended = open_addition(index, [str(own / "p0.png")])
    finish_addition(index)
    open_addition(index, [str(own / later)])
    before = (index / "adding" / "job.json").read_bytes()
    finish_addition(index, ended)
    assert (index / "adding" / "job.json").read_bytes() == before


def test_an_index_of_more_parts_than_files_may_be_open(own, tmp_path, detector, monkeypatch):
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 1)
    index = tmp_path / "photos.index"
    for copy in range(20):
        shutil.copy(own / "p0.png", own / f"p0-{copy}.png")
        with (own / f"p0-{copy}.png").open("ab") as stream:
            stream.write(bytes([copy]))  # no two files have the same digest
    run(detector, own, index)
    code = f"""
import os, resource
from proxydet.errors import RuntimeEnvironmentError
from proxydet.index.store import StoredIndex
few = len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")) + 12
resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
stored = StoredIndex({str(index)!r})
held = [part.arrays for part in stored.parts]
assert len(held) == 24 and stored.damaged(whole=True) == {{}}
opened = []
try:
    while True:
        opened.append(os.dup(0))
except OSError:
    pass
try:
    stored.of_parts([stored.parts[0].record]).parts[0].arrays
except RuntimeEnvironmentError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout.strip()) == ("", "RuntimeEnvironmentError")


def test_shards_share_a_plan_and_the_last_one_puts_all_into_the_index(
    own, detector, tmp_path, monkeypatch
):
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 1)
    index = tmp_path / "photos.index"
    work, done = open_index(detector, index), []
    for number in (1, 0):
        shard = Shard(number, 2)
        job = open_addition(index, [str(own)], shard=shard)
        (own / "late.png").write_bytes((own / "p0.png").read_bytes() + b"0")
        with pytest.raises(ConfigError, match="sources"):
            open_addition(index, [str(own / "p0.png")], shard=shard)
        done.append(run_addition(index, job, lambda _: work, shard=shard))
    assert [(d.added, d.unfinished, d.images) for d in done] == [(2, 2, 0), (2, 0, 4)]
    assert (run(detector, own, index).added, len(paths(index))) == (1, 5)


def test_a_shard_that_comes_when_the_job_has_ended_leaves_none_behind(own, detector, tmp_path):
    (own / "broken.jpg").write_bytes(b"no image")
    index = tmp_path / "photos.index"
    work, done = open_index(detector, index), []
    for number in (0, 1):
        job = open_addition(index, [str(own)], shard=Shard(number, 2))
        done.append(run_addition(index, job, lambda _: work, shard=Shard(number, 2)))
    assert [(d.added, d.unchanged, d.unfinished, d.images) for d in done] == [
        (4, 0, 0, 4),
        (0, 4, 0, 4),
    ]
    open_addition(index, [str(own / "p0.png"), str(own / "broken.jpg")], shard=Shard(0, 2))


def test_a_plan_of_which_nothing_can_be_read_keeps_no_other_back(
    own, detector, tmp_path, monkeypatch
):
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 1)
    for name in ("a", "b"):
        (own / f"{name}.jpg").write_bytes(b"no image")
    index = tmp_path / "photos.index"
    work = open_index(detector, index)
    for number in (0, 1, 1):  # the last one was put into the queue again, and comes late
        job = open_addition(index, [str(own)], shard=Shard(number, 2))
        done = run_addition(index, job, lambda _: work, shard=Shard(number, 2))
    assert (done.added, done.unfinished, done.images) == (0, 1, 4)
    changed(own)
    assert open_addition(index, [str(own / "p0.png")], shard=Shard(0, 2)).images == 1
    with pytest.raises(ConfigError, match="sources"):
        open_addition(index, [str(own / "p1.png")], shard=Shard(0, 2))


def test_moved_files_are_taken_a_bounded_number_at_once(own, index, detector, photos, monkeypatch):
    monkeypatch.setattr("proxydet.index.store._COPIES_AT_ONCE", 2, raising=False)
    write, written = store.write_part, []

    def counted(folder, arrays):
        written.append(len(arrays["sizes"]))
        return write(folder, arrays)

    monkeypatch.setattr(store, "write_part", counted)
    with IndexWriter(index) as writer:
        writer.remove([str(photos / "p3.png")])
    written.clear()
    own = own.rename(own.with_name("moved"))
    shutil.copy(own / "p0.png", own / "copy.png")
    done = run(detector, own, index)
    assert (done.copied, done.added, done.images, max(written)) == (4, 1, 8, 2)
    assert StoredIndex(index).verify(images=True) == []


def test_a_full_disk_keeps_what_was_committed(own, detector, tmp_path, monkeypatch):
    index = tmp_path / "photos.index"
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 2)
    write = Path.write_bytes
    parts = []

    def full(path, data):
        parts.extend([path] * (path.parent.name == "parts"))
        if len(parts) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(DiskFullError, match="no room"):
            run(detector, own, index, batch_size=1)
    counting = Counting(detector)
    assert (run(counting, own, index).images, counting.embedded) == (4, 2)
    assert StoredIndex(index).verify() == []


def test_parts_that_no_index_names_are_removed_by_the_next_writer(index, detector, photos):
    (stray,) = (index / "parts").glob("*")
    shutil.copy(stray, index / "parts" / f"{'0' * 64}.safetensors")
    assert ["not in the index" in wrong for wrong in StoredIndex(index).verify()] == [True]
    run(detector, photos, index)
    assert [file.name for file in (index / "parts").glob("*")] == [stray.name]
    assert StoredIndex(index).verify() == []


def test_damage_is_named_and_never_a_wrong_result(index):
    (part,) = (index / "parts").glob("*")
    whole = {file: file.read_bytes() for file in (index / "index.json", part)}
    draw = np.random.default_rng(0)
    wanted = [hit.to_dict() for hit in RegionIndex(index).search(score_threshold=0.1)]
    for file, content in whole.items():
        for kind in ("cut", "flip", "absent") * 12:
            data, place = bytearray(content), int(draw.integers(len(content)))
            if kind == "cut":
                del data[place:]
            else:
                data[place] ^= 1 << int(draw.integers(8))
            file.unlink(missing_ok=True)
            if kind != "absent":
                file.write_bytes(data)
            try:
                wrong = StoredIndex(index).verify()
                if file != part or kind == "absent":
                    RegionIndex(index).search(score_threshold=0.1)
            except InputError as error:
                wrong = [error.message]
            if wrong == []:  # white space
                assert [
                    h.to_dict() for h in RegionIndex(index).search(score_threshold=0.1)
                ] == wanted
        file.write_bytes(content)
    assert StoredIndex(index).verify() == []
    (index / "vocabulary.npz").write_bytes(b"")
    assert len(StoredIndex(index).verify()) == 1


def test_what_is_damaged_is_removed_and_indexed_again(index, detector, photos, monkeypatch):
    (part,) = (index / "parts").glob("*")
    os.truncate(part, 1000)
    with pytest.raises(DataError, match="1000 bytes"):
        RegionIndex(index)
    with IndexWriter(index) as writer:
        assert writer.remove_damaged() == 4
    assert run(detector, photos, index).added == 4
    assert StoredIndex(index).verify() == []


def test_members_of_tars_are_images_too(photos, exact, detector, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, "photos")
    index = tmp_path / "tar.index"

    def again():
        return index_images(detector, [tmp_path / "photos.tar"], index)

    assert (again().added, again().unchanged) == (4, 4)
    names = {path.removeprefix(f"{tmp_path}/photos.tar/photos/") for path in paths(index)}
    assert names == {f"p{number}.png" for number in range(4)}
    assert StoredIndex(index).verify(images=True) == []
    scores = [
        sorted(hit.score for hit in RegionIndex(place).search(score_threshold=0.1))
        for place in (index, exact)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    found = RegionIndex(index)
    for hit in found.search(score_threshold=0.1):
        wanted = np.asarray(Image.open(photos / Path(hit.path).name))
        np.testing.assert_array_equal(found.read_image(hit.number), wanted)
    with (tmp_path / "photos.tar").open("ab") as tar:
        tar.write(bytes(512))
    with pytest.raises(DataError, match="has changed"):
        hit.source.read()


def test_a_writer_whose_lock_was_taken_over_writes_no_more(index, detector, photos):
    late = IndexWriter(index)
    late.remove([str(photos / "p1.png")])
    for name in ("writer.lock", "writer.lock.owner"):
        (index / name).unlink(missing_ok=True)
    with IndexWriter(index) as writer:
        writer.remove([str(photos / "p0.png")])
    with pytest.raises(LockedError), late:
        pass
    assert paths(index) == [str(photos / f"p{number}.png") for number in (1, 2, 3)]


def test_what_was_removed_and_not_compacted_comes_back(exact, index, monkeypatch):
    every = paths(index)
    with (
        monkeypatch.context() as patched,
        IndexWriter(index) as writer,
    ):
        assert writer.remove(every) == 4
        patched.setattr(IndexWriter, "_compact", lambda _: None)  # killed before that
    assert paths(index) == []
    with IndexWriter(index) as writer:
        assert writer.merge(StoredIndex(exact)) == (4, 0)
    assert paths(index) == every


def test_of_members_of_tars_the_newer_is_kept(photos, detector, tmp_path):
    place = tmp_path / "photos.tar"
    for number, name in enumerate(("old", "new")):
        with tarfile.open(place, "w") as tar:
            tar.add(photos / f"p{number}.png", "p.png")
        os.utime(place, (1_000 + number, 1_000 + number))
        index_images(detector, [place], tmp_path / name)
    for first, second, wanted in (("old", "new", (1, 0)), ("new", "old", (0, 1))):
        merged = Path(shutil.copytree(tmp_path / first, tmp_path / f"{first}-first"))
        with IndexWriter(merged) as writer:
            assert writer.merge(StoredIndex(tmp_path / second)) == wanted
        pixels = RegionIndex(merged).search(score_threshold=0.1)[0].source.read()
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(photos / "p1.png")))


def test_what_has_no_time_is_compared_by_content(photos, detector, tmp_path):
    import fsspec

    counting, store = Counting(detector), fsspec.filesystem("memory")
    for number in (0, 1):
        store.pipe("/p.png", (photos / f"p{number}.png").read_bytes())
        listed = tmp_path / "list"
        listed.write_text("memory://p.png\n")  # of a list: its time is not asked for
        for _ in range(2):
            done = index_images(counting, [f"@{listed}"], tmp_path / f"{number}.index")
        assert (done.unchanged, done.images, counting.embedded) == (1, 1, number + 1)
    with IndexWriter(tmp_path / "1.index") as writer:  # the last one counts
        assert writer.merge(StoredIndex(tmp_path / "0.index")) == (1, 0)
        assert writer.merge(StoredIndex(tmp_path / "0.index")) == (0, 1)


def test_settings_that_came_later_count_as_their_defaults(index):
    detector = StoredIndex(index).detector
    settings = {key: value for key, value in detector.settings.items() if key != "rescore"}
    earlier = msgspec.structs.replace(detector, settings=settings)
    assert earlier != detector
    earlier.require_equal(detector, index)
    with pytest.raises(DataError, match="settings"):
        earlier.require_equal(
            msgspec.structs.replace(detector, settings={**settings, "rescore": True}), index
        )
