"""``proxydet predict`` from end to end, with a detector that is already open."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proxydet.detector import Detector
from proxydet.errors import InputError
from proxydet.reporting import SilentProgress
from proxydet_cli import progress


@pytest.fixture
def run(detector, monkeypatch, cli, tmp_path):
    monkeypatch.setattr("proxydet.models.locate_published", Path)
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: detector)
    monkeypatch.setattr("proxydet.models.trained_classes", lambda _: detector)
    # How long a busy machine takes is no part of what is expected on stderr.
    monkeypatch.setattr(progress, "show_progress", SilentProgress)
    # Nor is what the processor has units for.
    monkeypatch.setattr("proxydet.modeling.network.half_speed", lambda *_: 0.01)
    monkeypatch.chdir(tmp_path)

    return lambda *words: cli("predict", "--score-threshold", "0.02", *words)


def test_json_equals_the_python_api(run, detector, folder):
    code, out, err = run(folder / "a0.png", "-v", "red circle, blue star", "--json")
    assert (code, err) == (0, "")
    wanted = detector.predict(folder / "a0.png", ["red circle", "blue star"], score_threshold=0.02)
    content = json.loads(out)
    assert content["unreadable"] == []
    (image,) = content["images"]
    assert image == {"file": str(folder / "a0.png"), **json.loads(json.dumps(wanted.to_dict()))}


def test_pictures_are_saved_and_results_listed(run, folder, tmp_path):
    code, out, err = run(
        folder / "a0.png",
        folder / "sub",
        "--all-labels",
        "--top",
        "2",
        "--output",
        tmp_path / "out",
    )
    assert code == 0
    lines = out.splitlines()
    assert [Path(line.split(": ")[0]).name for line in lines] == ["a0.png", "b3.png", "b4.png"]
    assert all(line.count(", ") == 1 for line in lines)
    assert "saved 3 files" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a0.png", "b3.png", "b4.png"]


def test_a_line_tells_the_best_few_and_files_hold_all(run, folder, tmp_path):
    colours, forms = ("red", "blue", "green"), ("circle", "square", "star")
    shapes = [*colours, *forms, *(f"{colour} {form}" for colour in colours for form in forms)]
    words = (
        folder / "a2.png",
        "-v",
        ", ".join(shapes),
        "--output",
        tmp_path / "out",
        "--all-labels",
    )
    _, out, _ = run(*words, "--json")
    found = json.loads(out)["images"][0]["detections"]
    assert len(found) > 10
    _, out, _ = run(*words, "--save", "json")
    best = ", ".join(f"{entry['label']} {entry['score']:.2f}" for entry in found[:10])
    assert out == f"{folder / 'a2.png'}: {best}, ... and {len(found) - 10} more\n"
    assert json.loads((tmp_path / "out" / "a2.json").read_text())["detections"] == found
    _, out, _ = run(*words, "--save", "none", "--top", "10")
    assert out == f"{folder / 'a2.png'}: {best}\n"


def test_kinds_to_save_may_be_named_one_by_one(run, folder, tmp_path):
    words = (folder / "a0.png", "--output", tmp_path / "out", "--save", "json", "--save", "csv")
    assert run(*words)[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a0.json", "detections.csv"]


def test_unreadable_pictures_make_the_exit_code_3_after_the_others_are_done(run, folder, tmp_path):
    code, out, err = run(folder, "--json", "--save", "csv", "--output", tmp_path / "out")
    assert code == 3
    content = json.loads(out)
    assert len(content["images"]) == 5
    assert [Path(entry["file"]).name for entry in content["unreadable"]] == ["broken.jpg"]
    assert "1 of 6 images" in err
    assert (tmp_path / "out" / "detections.csv").exists()


def test_files_are_listed_on_stdin(run, folder, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin",
        io.TextIOWrapper(io.BytesIO(f"{folder}/a1.png\r\n#\n\n {folder}/a2.png \n".encode())),
    )
    code, out, _ = run("-", folder / "a0.png", "--save", "none")
    assert code == 0
    assert [Path(line.split(": ")[0]).name for line in out.splitlines()] == [
        "a1.png",
        "a2.png",
        "a0.png",
    ]


def test_a_missing_file_of_a_list_is_left_out_and_counted(run, folder, monkeypatch):
    listed = io.BytesIO(f"{folder}/a1.png\n{folder}/absent.png\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(listed))
    code, out, err = run("-", "--save", "none")
    assert code == 3
    assert [Path(line.split(": ")[0]).name for line in out.splitlines()] == ["a1.png"]
    assert "absent.png" in err
    assert "1 of 2 images could not be read" in err


@pytest.mark.parametrize(
    "words",
    [
        ["-v", ""],
        ["-v", "cup, cup"],
        ["-v", "absent.txt"],
        ["-v", "./absent"],
        ["-v", "{folder}/absent"],
        ["--vocabulary", "absent.yaml"],
        ["--vocabulary", "{folder}/absent.npy", "--names", "{folder}/notes.txt"],
    ],
)
def test_mistakes_in_class_names_are_named_before_the_detector_is_opened(
    run, folder, monkeypatch, words
):
    monkeypatch.setattr("proxydet.detector.open_named", None)
    code, _, err = run(folder / "a0.png", *[word.format(folder=folder) for word in words])
    assert code == 3
    assert "absent" in err or "class name" in err


def test_class_names_may_hold_a_slash(run, folder):
    code, _, err = run(folder / "a0.png", "-v", "red/star, blue star", "--save", "none")
    assert (code, err) == (0, "")


def test_lists_of_find_print0_hold_any_name(run, folder, monkeypatch):
    odd = [
        folder / os.fsdecode(name) for name in (b"a [1].png", b"b\n.png", b" c.png", b"\xff.png")
    ]
    for path in odd:
        path.write_bytes((folder / "a0.png").read_bytes())
    listed = b"".join(os.fsencode(path) + b"\0" for path in odd)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
    code, out, err = run("-", "--json")
    assert (code, err) == (0, "")
    assert [entry["file"] for entry in json.loads(out)["images"]] == list(map(str, odd))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
    code, out, _ = run("-", "--save", "none", "--top", "1")
    assert code == 0
    assert [line.rpartition(": ")[0] for line in out.splitlines()] == [
        f"{folder}/a [1].png",
        f"{folder}/b\\n.png",
        f"{folder}/ c.png",
        f"{folder}/\\udcff.png",
    ]


def test_what_is_left_out_of_a_folder_is_reported(run, folder):
    (folder / "broken.jpg").unlink()
    (folder / "a.HEIC").write_bytes(b"")
    code, out, err = run(folder, "--json")
    assert code == 0
    assert json.loads(out)["left_out"] == {".txt": 1, ".heic": 1}
    assert err.startswith("left out: ")
    assert err.count("\n") == 1


def test_results_of_an_earlier_command_stay(run, folder):
    image = folder / "a0.png"
    assert "saved predictions/a0.png" in run(image)[2]
    assert "saved predictions-2/a0.png" in run(image)[2]
    code, out, err = run(image, "-o", "predictions")
    assert (code, out) == (3, "")
    assert "--overwrite" in err
    assert run(image, "-o", "predictions", "--overwrite", "--save", "images,csv")[0] == 0
    assert "detections.csv" in run(image, "-o", "predictions", "--save", "csv")[2]


def test_files_that_are_no_images_are_named_as_what_they_are(run, tmp_path):
    for content, what in (
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"a photograph of a cat", "a text file"),
        (b"", "empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "pip install pillow-heif"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ):
        (tmp_path / "a.jpg").write_bytes(content)
        code, _, err = run(tmp_path / "a.jpg")
        assert (code, what in err) == (3, True), err


def test_vocabularies_come_from_files(run, detector, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("green star\nblue square\n")
    np.save(tmp_path / "table.npy", detector.encoder.encode(["green star", "blue square"]))
    saved = detector.vocabulary_of(["green star", "blue square"]).save(tmp_path / "saved.vocab")
    picture = folder / "a0.png"
    answers = [
        run(picture, "--json", "--vocabulary", names),
        run(picture, "--json", "--vocabulary", saved),
        run(picture, "--json", "--vocabulary", tmp_path / "table.npy", "--names", names),
        run(picture, "--json", "-v", "green star, blue square"),
        run(picture, "--json", "-v", names),
    ]
    assert all(answer == answers[0] and answer[0] == 0 for answer in answers)


def test_options_change_what_is_kept(run, folder):
    boxes = run(folder / "a0.png", "--json", "--no-masks", "--one-label")
    detections = json.loads(boxes[1])["images"][0]["detections"]
    assert all("mask" not in entry for entry in detections)
    places = [tuple(entry["box_xyxy"]) for entry in detections]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["absent.jpg"], 3, "absent.jpg"),
        (["{folder}/broken.jpg"], 3, "broken.jpg"),
        (["{folder}/a0.png", "-v", "red star,,"], 3, "empty"),
        (["{folder}/a0.png", "-v", "a giraffe"], 3, "giraffe"),
        (["{folder}/a0.png", "-v", "{folder}/notes.txt"], 3, "no picture"),
        (["{folder}/a0.png", "--vocabulary", "lviss"], 3, "Did you mean 'lvis'?"),
        (["{folder}/a0.png", "-o", "{folder}/notes.txt"], 5, "is a file, not a folder"),
        (["{folder}/a0.png", "--vocabulary", "a.npy"], 3, "no file a.npy"),
        (["{folder}/a0.png", "--save", "pictures,movie"], 3, "'movie'"),
        (
            ["{folder}/a0.png", "-v", "red star", "--background", "green star, red star"],
            3,
            "'red star'",
        ),
        (["{folder}/a0.png", "-v", "red star", "--background", "absent.vocab"], 3, "absent.vocab"),
        (["{folder}/a0.png", "-v", "red star", "--background", "red, red"], 3, "duplicate"),
        (["{folder}/a0.png", "-v", "red star", "--background", "purple"], 3, "purple"),
        (["{folder}/a0.png", "-v", "red star", "--vocabulary", "lvis"], 2, "either"),
        (["{folder}/a0.png", "--names", "a.txt"], 2, "--names"),
        (["{folder}/a0.png", "--top", "0"], 2, "--top"),
        ([], 2, "IMAGE"),
    ],
)
def test_mistakes_are_named_without_a_traceback(run, folder, words, code, what):
    found, out, err = run(*[word.format(folder=folder) for word in words])
    assert found == code
    assert what in err
    assert "Traceback" not in err
    assert out == ""


def test_a_large_picture_is_looked_at_without_a_warning(run, folder, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 48 * 64 - 1)
    code, _, err = run(folder / "a0.png", "--save", "none")
    assert (code, err) == (0, "")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 48 * 64 // 2 - 1)
    code, _, err = run(folder / "a0.png", "--save", "none")
    assert code == 3
    assert "decompression bomb" in err


@pytest.fixture
def clip(tmp_path, pictures) -> Path:
    """Five frames at ten a second."""
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 80, 80, "yuv420p"
        for shift in range(5):
            pixels = np.roll(pictures[2], shift, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_videos_give_a_line_a_frame_and_files(run, clip, folder):
    code, out, err = run(
        clip,
        folder / "a0.png",
        "--json",
        "--every",
        "2",
        "--save",
        "images,json,csv",
        "-o",
        "out",
    )
    assert (code, "saved 6 files" in err) == (0, True)
    picture, *frames = [json.loads(line) for line in out.splitlines()]
    assert picture["file"] == str(folder / "a0.png")
    assert [(f["file"], f["frame"], f["seconds"]) for f in frames] == [
        (str(clip), index, index / 10) for index in (0, 2, 4)
    ]
    assert {path.name for path in Path("out").iterdir()} >= {"clip.mp4", "clip.jsonl", "clip.csv"}
    assert [json.loads(line) for line in Path("out/clip.jsonl").read_text().splitlines()] == frames


def test_videos_are_listed_for_people(run, clip):
    code, out, _ = run(clip, "--save", "none", "--top", "1")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 5
    assert lines[3].startswith(f"{clip} 0.30 s: ")


def test_a_broken_video_keeps_what_came_before(run, clip):
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) // 2])
    code, _, err = run(clip, "--save", "csv")
    assert code == 3
    assert "clip.mp4" in err
    assert "Traceback" not in err


def test_what_cannot_be_read_does_not_keep_the_rest_from_being_looked_at(
    run, clip, folder, tmp_path
):
    bad, empty = tmp_path / "bad.mp4", tmp_path / "empty.mp4"
    bad.write_bytes(b"no video at all")
    empty.write_bytes(b"")
    code, out, err = run(folder / "broken.jpg", bad, empty, clip, "--json", "--save", "csv")
    assert code == 3
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(clip)] * 5
    for name in ("broken.jpg", "bad.mp4", "empty.mp4"):
        assert (
            sum("warning: cannot read" in line and name in line for line in err.splitlines()) == 1
        )
        assert f"{name} could not be read" in err
    assert "the rest is done" in err
    assert [path.name for path in Path("predictions").iterdir()] == ["clip.csv"]


def test_a_single_video_that_cannot_be_read_is_one_error(run, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    code, out, err = run(tmp_path / "bad.mp4")
    assert (code, out) == (3, "")
    assert "error: cannot read the video" in err
    assert "warning" not in err


def test_a_full_disk_ends_the_run_and_names_the_file(run, clip, folder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def opened(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return full() if "w" in mode else original(self, mode, *arguments, **options)

    original = Path.open
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "open", opened)
    for kind, name in (("images", "a0.png"), ("json", "a0.json"), ("csv", "detections.csv")):
        code, _, err = run(folder / "a0.png", clip, "--save", kind)
        assert code == 5
        assert f"no room left on the disk to write predictions/{name}" in err
        assert "warning" not in err


@pytest.mark.parametrize(
    ("kinds", "name", "wanted"),
    [
        ("json,coco", "coco", {"coco.json", "coco_2.json", "a0.json"}),
        ("json", "coco", {"coco.json", "a0.json"}),
        ("pictures,coco", "coco", {"coco.json", "coco.png", "a0.png"}),
    ],
)
def test_a_picture_called_like_a_file_of_all_pictures(run, folder, kinds, name, wanted):
    picture = (folder / "a1.png").rename(folder / f"{name}.png")
    code, _, _ = run(folder / "a0.png", picture, "--save", kinds, "-o", "out")
    assert code == 0
    assert {path.name for path in Path("out").iterdir()} == wanted
    if "coco" in kinds:
        assert len(json.loads(Path("out/coco.json").read_text())["images"]) == 2


def test_a_folder_called_crops_does_not_mix_with_the_crops(run, folder):
    (folder / "sub").rename(folder / "crops")
    code, _, _ = run(folder / "a0.png", folder, "--save", "pictures,crops", "-o", "out")
    assert code == 3  # the broken one
    assert {path.name for path in Path("out/crops_2").iterdir()} == {"b3.png", "b4.png"}
    assert all(path.suffix == ".jpg" for path in Path("out/crops").glob("*/*"))


def test_a_video_called_detections_does_not_take_the_table(run, clip, folder):
    clip = clip.rename(clip.with_name("detections.mp4"))
    assert run(clip, folder / "a0.png", "--save", "csv", "-o", "out")[0] == 0
    tables = {path.name: path.read_text().split(",")[0] for path in Path("out").iterdir()}
    assert tables == {"detections.csv": "file", "detections_2.csv": "frame"}
    assert run(clip, "--save", "csv", "-o", "alone")[0] == 0
    assert [path.name for path in Path("alone").iterdir()] == ["detections.csv"]


def test_augmentation_and_limits_reach_the_detector(run, detector, folder, monkeypatch):
    seen = []
    original = Detector.predict_images

    def watch(self, images, vocabulary, settings):
        seen.append((vocabulary, settings))
        return original(self, images, vocabulary, settings)

    monkeypatch.setattr(Detector, "predict_images", watch)
    words = [folder / "a0.png", "--json", "-v", "red circle, red star"]
    run(*words)
    run(*words, "--tta", "--base-above", "-1")
    (plain, settings), (spread, augmented) = seen
    assert not settings.augmented
    assert (augmented.flip, augmented.scales) == (True, (0.75, 1.0, 1.25))
    assert plain.base.tolist() == [True, False]
    assert spread.base.all()


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["{clip}", "--save", "crops"], 3, "'crops' of a video"),
        (["{clip}", "--every", "0"], 2, "--every"),
        (["absent.mp4"], 3, "no video file"),
        (["{clip}", "--precision", "fp16"], 3, "needs a GPU"),
        (["{clip}", "--precision", "fp8"], 2, "--precision"),
    ],
)
def test_mistakes_with_videos_are_named(run, clip, words, code, what):
    found, out, err = run(*[word.format(clip=clip) for word in words])
    assert (found, out) == (code, "")
    assert what in err
    assert "Traceback" not in err


def test_bf16_runs_where_the_processor_has_units_for_it(run, folder, monkeypatch):
    words = (folder / "a0.png", "-v", "red circle", "--json")
    code, out, err = run(*words, "--precision", "bf16")
    assert (code, out) == (3, "")
    assert "no units for bf16: a matrix product takes 100 times" in err
    _, exact, err = run(*words, "--precision", "auto")
    assert err == ""
    for module in ("modeling.network", "detector"):
        monkeypatch.setattr(f"proxydet.{module}.half_speed", lambda *_: 8.0)
    code, out, err = run(*words)
    assert (code, out) == (0, exact)
    assert "8.0 times as fast in bf16" in err
    assert "--precision bf16" in err
    code, fast, err = run(*words, "--precision", "auto")
    assert (code, err) == (0, "")
    scores, others = (
        [entry["score"] for entry in json.loads(text)["images"][0]["detections"]]
        for text in (exact, fast)
    )
    assert scores != others
    assert scores[0] == pytest.approx(others[0], abs=0.02)
    code, _, err = run(*words, "--precision", "fp16")
    assert (code, "needs a GPU" in err) == (3, True)
    monkeypatch.setattr("proxydet.modeling.network.half_speed", lambda *_: 0.01)
    monkeypatch.setenv("PROXYDET_ALLOW_SLOW_PRECISION", "1")
    code, again, _ = run(*words, "--precision", "bf16")
    assert (code, again) == (0, fast)


def test_without_pyav_the_command_is_named_before_any_work(run, clip, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: pytest.fail("opened"))
    code, out, err = run(clip)
    assert (code, out) == (5, "")
    assert "pip install 'proxydet[video]'" in err


def parts(output: Path) -> list[dict[str, Any]]:
    """The rows of a job."""
    rows = []
    for path in sorted((output / "parts").iterdir()):
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        rows += [json.loads(line) for line in text.splitlines()]
    return rows


def test_a_job_saves_what_the_command_prints_and_continues(run, folder, tmp_path):
    words = (folder, "-v", "red circle, blue star", "--batch-size", "1")
    code, out, err = run(*words, "--save", "jsonl", "-o", "job", "--part-size", "2")
    assert code == 3
    assert "6 images" in out
    assert "left out: 1 .txt" in err
    assert "1 of 6 images could not be read" in err
    rows = parts(Path("job"))
    (broken,) = (row for row in rows if "error" in row)
    assert broken["file"] == str(folder / "broken.jpg")
    printed = json.loads(run(*words, "--json")[1])
    assert [row for row in rows if "error" not in row] == printed["images"]
    assert any(row.get("detections") for row in rows)
    before = {path: path.stat().st_mtime_ns for path in Path("job/parts").iterdir()}
    _, out, err = run(*words, "--save", "jsonl", "-o", "job", "--json")
    assert "continuing" in err
    summary = json.loads(out)
    assert (summary["before"], summary["errors"], summary["parts"]) == (6, 1, 3)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, _, err = run(folder, "-v", "red circle", "--save", "jsonl", "-o", "job")
    assert (code, "another vocabulary" in err) == (3, True)
    assert run(*words, "--save", "jsonl.gz", "-o", "job", "--overwrite")[0] == 3
    assert parts(Path("job")) == rows


def test_a_job_as_parquet_has_the_same_rows(run, folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "broken.jpg").unlink()
    assert run(folder, "--save", "jsonl", "-o", "lines")[0] == 0
    assert run(folder, "--save", "parquet", "-o", "table")[0] == 0
    table = parquet.read_table("table/parts").to_pylist()
    assert [row["file"] for row in table] == [row["file"] for row in parts(Path("lines"))]
    for row, line in zip(table, parts(Path("lines")), strict=True):
        assert row["labels"] == [entry["label"] for entry in line["detections"]]
        assert row["scores"] == [entry["score"] for entry in line["detections"]]
        assert row["boxes"] == [entry["box_xyxy"] for entry in line["detections"]]
        assert row["masks"] == [entry["mask"]["counts"] for entry in line["detections"]]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--save", "jsonl,images"], "--save images"),
        (["--save", "images", "--workers", "2"], "--workers"),
        (["--save", "jsonl,parquet"], "choose one"),
        (["--shard", "3/2"], "3/2"),
        (["--workers", "2", "--gpus", "2"], "leave one out"),
        (["--shard", "0/2", "--overwrite"], "--overwrite"),
        (["--save", "jsonl", "clip.mp4"], "clip.mp4"),
    ],
)
def test_mistakes_about_jobs_are_named_before_a_detector_is_opened(
    run, folder, monkeypatch, words, what
):
    monkeypatch.setattr("proxydet.detector.open_named", None)
    code, out, err = run(folder, *words)
    assert (code, out) == (3, "")
    assert what in err
    assert "hint:" in err


def test_a_tar_and_a_list_are_taken_as_a_few_images_too(run, folder, tmp_path):
    with tarfile.open("a.tar", "w") as tar:
        tar.add(folder / "a0.png", "x/a0.png")
        tar.add(folder / "a1.png", "x/a1.png")
    Path("list").write_text(f"{folder}/a2.png\na.tar\n")
    code, out, _ = run("@list", "--json", "--save", "json,yolo,csv")
    assert code == 0
    names = [f"{folder}/a2.png", "a.tar/x/a0.png", "a.tar/x/a1.png"]
    assert [entry["file"] for entry in json.loads(out)["images"]] == names
    assert json.loads(Path("predictions/x/a0.json").read_text())["file"] == names[1]
    copied = Path("predictions/yolo/images/x_a0.png")
    assert copied.read_bytes() == (folder / "a0.png").read_bytes()


def test_quiet_prints_a_line_for_all(run, folder, monkeypatch):
    (folder / "broken.jpg").unlink()
    code, out, _ = run(folder, "--save", "none", "--quiet")
    assert (code, out.count("\n"), out.startswith("5 images: ")) == (0, 1, True)
    monkeypatch.setattr("proxydet_cli.commands.predict._MANY", 4)
    assert run(folder, "--save", "none")[1] == out
    assert run(folder, "--save", "none", "--no-quiet")[1].count("\n") == 5


def test_the_callable_gives_the_rows_of_a_job(detector, folder, run):
    from proxydet.inference.rows import DetectRows

    step = DetectRows(detector, ["red circle", "blue star"], score_threshold=0.02, batch_size=1)
    run(folder, "-v", "red circle, blue star", "--save", "jsonl", "-o", "job", "--batch-size", "1")
    rows = parts(Path("job"))
    paths = [row["file"] for row in rows]
    found = step({"path": np.array(paths, dtype=object), "id": np.arange(len(paths))})
    assert list(found["id"]) == list(range(6))
    for index, row in enumerate(rows):
        if "error" in row:
            assert found["error"][index] == row["error"]
            assert found["scores"][index] == []
            continue
        entries = row["detections"]
        assert found["error"][index] is None
        assert (found["width"][index], found["height"][index]) == (row["width"], row["height"])
        assert found["labels"][index] == [entry["label"] for entry in entries]
        assert found["boxes"][index] == [entry["box_xyxy"] for entry in entries]
        assert found["masks"][index] == [entry["mask"]["counts"] for entry in entries]
    readable = [path for path, row in zip(paths, rows, strict=True) if "error" not in row]
    encoded = step({"bytes": [Path(path).read_bytes() for path in readable]})
    arrays = step([np.asarray(Image.open(path)) for path in readable])
    assert "bytes" not in encoded
    assert encoded["scores"] == [row["scores"] for row in arrays]
    assert [
        s for s, e in zip(found["scores"], found["error"], strict=True) if e is None
    ] == encoded["scores"]
    with pytest.raises(InputError, match="column"):
        step({"pixels": []})


def test_background_is_in_no_output(run, detector, folder, tmp_path):
    words = (folder / "a0.png", "-v", "red circle, blue star", "--background", "green star, red")
    saved = ("--save", "coco,yolo,csv,labelstudio", "--output", tmp_path / "out")
    code, out, _ = run(*words, *saved, "--json")
    assert code == 0
    wanted = detector.predict(
        folder / "a0.png",
        ["red circle", "blue star"],
        background=["green star", "red"],
        score_threshold=0.02,
    )
    (image,) = json.loads(out)["images"]
    assert image["detections"] == json.loads(json.dumps(wanted.to_dict()["detections"]))
    written = [path for path in (tmp_path / "out").rglob("*") if path.suffix != ".png"]
    assert len([p for p in written if p.is_file()]) >= 4
    for path in written:
        if path.is_file():
            assert "green star" not in path.read_text(errors="ignore"), path
    code, out, _ = run(folder / "a0.png", "-v", "red circle", "--background", "training", "--json")
    assert code == 0
    assert {e["label"] for e in json.loads(out)["images"][0]["detections"]} <= {"red circle"}


def test_what_is_not_an_image_is_a_row_with_its_error(detector):
    from proxydet.errors import ConfigError
    from proxydet.inference.rows import DetectRows

    step = DetectRows(detector, ["red circle"], batch_size=1)
    grey, clear = np.zeros((40, 40), np.uint8), np.zeros((40, 40, 4), np.uint8)
    found = step([grey, np.zeros((40, 40, 3), np.uint8), None, clear, [[1], [2, 3]]])
    assert [bool(row["error"]) for row in found] == [True, False, True, True, True]
    with pytest.raises(ConfigError, match="channel_order"):
        DetectRows(detector, ["red circle"], channel_order="gbr")


def test_a_name_that_is_not_utf8_has_its_row_in_a_table_where_it_cannot_be_read():
    from proxydet.inference.sharded import Row
    from proxydet.inference.sources import SourceImage
    from proxydet.inference.writers import columns

    row = columns(Row(SourceImage("a\udcff.png"), None, "cannot read a\udcff.png"))
    assert (row["file"], row["error"]) == ("a\\udcff.png", "cannot read a\\udcff.png")


def test_a_mistake_in_the_sources_leaves_the_job_that_is_to_be_replaced(run, folder):
    (folder / "broken.jpg").unlink()
    assert run(folder, "--save", "jsonl", "-o", "job")[0] == 0
    rows = parts(Path("job"))
    code, _, err = run("absent", "--save", "jsonl", "-o", "job", "--overwrite")
    assert (code, "absent" in err) == (3, True)
    assert parts(Path("job")) == rows
