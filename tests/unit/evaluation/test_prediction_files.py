"""Predictions on disk: whole or not at all, never mixed, the same whatever made them."""

from __future__ import annotations

import errno
import io
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from proxydet.errors import DataError, DiskFullError
from proxydet.evaluation.detector_evaluation import PredictionFolder, PredictionWriter
from proxydet.inference.pipeline import WriteBehind

IDENTITY = {"weights": "abc", "settings": {"score_threshold": 0.02, "sides": (800, 1333)}}


def rows(image_id: int | str) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "category_id": 1, "score": 0.1 + 1e-17, "bbox": [0, 0, 1.5, 2]},
        {"image_id": image_id, "category_id": 2, "score": 1 / 3, "text": "ü\n}"},
    ]


def write(writer: PredictionWriter, image_id: int, found: list[dict[str, Any]]) -> None:
    result = (image_id, lambda: found)
    writer.add(result, writer.prepare(result))


def fill(folder: PredictionFolder, rank: int, image_ids: list[int]) -> None:
    with folder.writer(rank) as writer:
        for image_id in image_ids:
            write(writer, image_id, rows(image_id) if image_id % 3 else [])


@pytest.mark.parametrize(
    "shares", [[[1, 2, 3, 4, 5]], [[5, 1, 3], [4, 2]], [[2], [], [5, 4, 3, 1]]]
)
def test_joined_file_is_the_same_for_any_share_and_order(tmp_path, shares):
    folder = PredictionFolder(tmp_path / "out", IDENTITY)
    for rank, image_ids in enumerate(shares):
        fill(folder, rank, image_ids)
    joined = folder.join([5, 4, 3, 2, 1])
    expected = rows(1) + rows(2) + rows(4) + rows(5)
    assert json.loads(joined.read_text()) == expected
    reference = PredictionFolder(tmp_path / "reference", IDENTITY)
    fill(reference, 0, [1, 2, 3, 4, 5])
    assert joined.read_bytes() == reference.join([1, 2, 3, 4, 5]).read_bytes()
    assert not list(folder.path.glob("part-*"))
    assert PredictionFolder(folder.path, IDENTITY).complete


def test_no_detection_at_all_is_an_empty_list(tmp_path):
    folder = PredictionFolder(tmp_path, IDENTITY)
    fill(folder, 0, [3, 6])
    assert json.loads(folder.join([3, 6]).read_text()) == []


def test_predictions_with_masks_serve_where_none_are_needed(tmp_path):
    fill(PredictionFolder(tmp_path, IDENTITY, masks=True), 0, [1])
    again = PredictionFolder(tmp_path, IDENTITY)
    assert again.masks
    assert again.images_done() == {1}


@pytest.mark.parametrize("joined", [True, False])
def test_predictions_without_masks_give_way_where_masks_are_needed(tmp_path, joined):
    folder = PredictionFolder(tmp_path, IDENTITY)
    fill(folder, 0, [1])
    if joined:
        folder.join([1])
    assert not PredictionFolder(tmp_path, IDENTITY).masks
    again = PredictionFolder(tmp_path, IDENTITY, masks=True)
    assert again.masks
    assert not again.complete
    assert again.images_done() == set()
    assert PredictionFolder(tmp_path, IDENTITY).masks


def test_a_folder_of_version_0_1_is_read(tmp_path):
    """It held masks among the settings that make the predictions."""
    settings = {"score_threshold": 0.02, "masks": True}
    (tmp_path / "identity.json").write_text(json.dumps({"inference settings": settings}))
    del settings["masks"]
    assert PredictionFolder(tmp_path, {"inference settings": settings}).masks


def test_settings_that_came_later_count_at_their_defaults(tmp_path):
    PredictionFolder(tmp_path, {"inference settings": {"alpha": 0.15}})
    PredictionFolder(tmp_path, {"inference settings": {"alpha": 0.15, "tiles": 0}})
    with pytest.raises(DataError, match="inference settings"):
        PredictionFolder(tmp_path, {"inference settings": {"alpha": 0.15, "tiles": 640}})


@pytest.mark.parametrize("cut", [1, 30, 150])
def test_a_line_cut_by_a_stop_is_predicted_again(tmp_path, cut):
    folder = PredictionFolder(tmp_path, IDENTITY)
    fill(folder, 0, [1, 2, 4])
    part = next(tmp_path.glob("part-*"))
    part.write_bytes(part.read_bytes()[:-cut])
    again = PredictionFolder(tmp_path, IDENTITY)
    assert again.images_done() == {1, 2}
    with pytest.raises(DataError, match="1 of 3 images are not predicted yet") as caught:
        again.join([1, 2, 4])
    assert "continues where it stopped" in caught.value.hint
    fill(again, 0, [4])
    assert json.loads(again.join([1, 2, 4]).read_text()) == rows(1) + rows(2) + rows(4)


def test_another_number_of_processes_goes_on(tmp_path):
    fill(PredictionFolder(tmp_path, IDENTITY), 2, [1, 2])
    again = PredictionFolder(tmp_path, IDENTITY)
    assert again.images_done() == {1, 2}
    fill(again, 0, [3, 4])
    assert len(json.loads(again.join([1, 2, 3, 4]).read_text())) == 6


def test_predictions_of_another_detector_are_refused(tmp_path):
    fill(PredictionFolder(tmp_path, IDENTITY), 0, [1])
    with pytest.raises(DataError, match="made with other settings, weights"):
        PredictionFolder(tmp_path, {"weights": "xyz", "settings": {}})
    assert PredictionFolder(tmp_path, IDENTITY).images_done() == {1}
    other = PredictionFolder(tmp_path, {"weights": "xyz"}, again=True)
    assert other.images_done() == set()
    assert PredictionFolder(tmp_path, {"weights": "xyz"}).images_done() == set()


def test_predictions_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "predictions.json").write_text("[]")
    with pytest.raises(DataError, match=r"no identity\.json says of what"):
        PredictionFolder(tmp_path, IDENTITY)


def test_a_damaged_line_is_reported_and_predicted_again(tmp_path, caplog):
    fill(PredictionFolder(tmp_path, IDENTITY), 0, [1, 2])
    part = tmp_path / "part-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0] + bytes(40) + b"\n" + lines[1])
    folder = PredictionFolder(tmp_path, IDENTITY)
    assert folder.images_done() == {1, 2}
    part.write_bytes(b'{"image_id": 1, "detec\n' + lines[1])
    assert folder.images_done() == {2}
    part.write_bytes(b"{\n" * 2 + lines[1])
    assert folder.images_done() == folder.images_done() == {2}
    reports = [record.message for record in caplog.records]
    assert [text.count("skipped") for text in reports] == [1, 1]  # for one line, and for two
    assert "2 damaged lines" in reports[1]


def test_after_a_moment_of_a_full_disk_nothing_is_written_behind_the_cut_line(
    tmp_path, monkeypatch, caplog
):
    class FullOnce(io.FileIO):
        calls = 0

        def write(self, data: Any) -> int:
            self.calls += 1
            if self.calls == 3:
                return super().write(bytes(data)[:20])
            if self.calls == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    folder = PredictionFolder(tmp_path, IDENTITY)
    release = threading.Event()

    def slow_rows(image_id: int) -> list[dict[str, Any]]:
        release.wait(5)
        # More than a file buffers, so that what is not written is lost.
        return [{"image_id": image_id, "text": "x" * 2**18}]

    def predict_all() -> None:
        with folder.writer(0) as writer, WriteBehind([writer], 8) as behind:
            try:
                for image_id in sorted({*range(1, 7)} - folder.images_done()):
                    behind.add((image_id, partial(slow_rows, image_id)), f"image {image_id}")
            finally:
                release.set()
                behind.finish()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: io.BufferedWriter(FullOnce(path, mode)))
        patch.setattr(folder, "images_done", set)
        with pytest.raises(DiskFullError, match="no room left") as caught:
            predict_all()
    assert "continues where it stopped" in str(caught.value.hint)
    assert folder.images_done() == {1, 2}
    assert caplog.messages == []
    predict_all()
    assert folder.images_done() == {1, 2, 3, 4, 5, 6}
