"""Mistakes in the options of ``proxydet eval`` are told before anything is opened."""

import pytest


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (
            ["--run", "RUN", "--split", "maxival"],
            "--split is 'maxival'; it can be train, val, test, minival",
            "[test] in a dataset config",
        ),
        (
            ["--run", "RUN", "--split", "minival", "--data", "coco"],
            "--split minival (LVIS minival, 4,809 images) is a split of lvis, not of coco",
            "leave out --data",
        ),
        (["--run", "RUN"], "is not a run folder", "proxydet train or quickstart wrote"),
        (["--run", "RUN/absent"], "there is no run folder", "proxydet quickstart"),
        (["--run", "RUN/file"], "is a file, not a run folder", "give the folder"),
        (
            ["--results", "RUN/file", "--data", "x.json", "--device", "cpu", "--gpus", "2"],
            "--device, --gpus",
            "leave it out",
        ),
        (
            ["--results", "RUN/file", "--data", "x.json", "--batch-size", "2", "--tta"],
            "--tta, --batch-size",
            "leave it out",
        ),
        (
            ["--compare", "RUN/file", "RUN/file", "--data", "x.json", "--device", "cpu"],
            "--device",
            "a proxydet eval of its own",
        ),
        (["--run", "RUN", "--hierarchy", "RUN/absent"], "there is no class hierarchy", "label500"),
        (["--run", "RUN", "--data", "RUN"], "is a folder, not a dataset config", "TOML"),
        (
            ["--compare", "RUN/file", "RUN/absent", "--data", "x.json"],
            "there is no",
            "results file",
        ),
        (["--compare", "RUN/file", "RUN/file"], "requires the data set", "--data"),
        (
            ["--compare", "RUN/file", "RUN/file", "--data", "x.json", "-o", "RUN", "--tta"],
            "--tta, --output",
            "a proxydet eval of its own",
        ),
        (
            ["--compare", "RUN/qs", "RUN/file", "--data", "x.json"],
            "no finished",
            "evaluation/shapes-val",
        ),
    ],
)
def test_what_is_no_run_or_split_is_told(tmp_path, cli, words, message, hint):
    (tmp_path / "file").touch()
    evaluated = tmp_path / "qs" / "run" / "evaluation" / "shapes-val"
    evaluated.mkdir(parents=True)
    (tmp_path / "qs" / "run" / "config.yaml").touch()
    (evaluated / "results.json").touch()
    words = [word.replace("RUN", str(tmp_path)) for word in words]
    code, _, err = cli("eval", *words)
    told = " ".join(err.split())
    assert code == 3
    assert message in told
    assert hint in told


def test_a_place_that_cannot_be_written_to_is_the_environments_fault(tmp_path, cli):
    (tmp_path / "file").touch()
    code, _, err = cli("eval", "--run", tmp_path, "-o", tmp_path / "file")
    assert code == 5
    assert "is a file, not a folder" in err
    assert "--output" in err
