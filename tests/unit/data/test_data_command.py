import json

from proxydet_cli import main


def run(*words: object) -> int:
    try:
        return main.main(["data", *(str(word) for word in words)])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_check_says_what_is_wrong_and_exits_with_3(small_set, capsys):
    assert run("check", small_set) == 0
    assert "small: sound" in capsys.readouterr().out
    (small_set.parent / "val" / "101.png").unlink()
    assert run("check", small_set, "--json") == 3
    (report,) = json.loads(capsys.readouterr().out)
    assert report["sound"] is False
    assert [f["part"] for f in report["findings"] if f["level"] == "error"] == ["val"]


def test_check_of_a_root(small_set, tmp_path, capsys):
    assert run("check", small_set.parent) == 0
    assert "1 dataset config" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert run("check", tmp_path / "empty") == 3
    assert "proxydet download" in capsys.readouterr().out
    assert run("check", tmp_path / "absent") == 3
    assert "no file or folder" in capsys.readouterr().err


def test_stats_as_tables_and_as_json(small_set_with_labels, capsys):
    assert run("stats", small_set_with_labels) == 0
    text = capsys.readouterr().out
    assert "image_labels" in text
    assert "novel" in text
    assert run("stats", small_set_with_labels, "--json") == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert [part["images"] for part in parts] == [6, 2, 7]


def test_a_tilde_that_the_shell_left_is_the_home_folder(small_set, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(small_set.parent))
    monkeypatch.chdir(tmp_path)
    assert run("preview", f"~/{small_set.name}", "--output=~/home.png", "--count", 1) == 0
    assert run("preview", f"~/{small_set.name}", "-o", "~/short.png", "--count", 1) == 0
    assert capsys.readouterr().out.split() == [
        str(small_set.parent / f"{n}.png") for n in ("home", "short")
    ]
    assert {path.name for path in small_set.parent.glob("*.png")} == {"home.png", "short.png"}
    assert not (tmp_path / "~").exists()


def test_prepare_reports_and_fails_clearly(tmp_path, capsys):
    assert run("prepare", "lvis", "--root", tmp_path) == 3
    captured = capsys.readouterr()
    assert "lvis_v1_train.json" in captured.err
    assert "hint:" in captured.err
    assert run("prepare", "lvsi") == 2


def test_prepare_objects365(tmp_path, capsys):
    folder = tmp_path / "objects365" / "annotations"
    folder.mkdir(parents=True)
    (tmp_path / "metadata").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "Bakset"}]}
    (folder / "zhiyuan_objv2_val.json").write_text(json.dumps(content))
    (tmp_path / "metadata" / "Objects365_names_fix.csv").write_text("1,Bakset,Basket\n")
    assert run("prepare", "objects365", "--root", tmp_path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [step["action"] for step in report["steps"]] == ["made", "made", "made"]
    assert report["steps"][0]["detail"] == "1 name changed"
    assert run("prepare", "objects365", "--root", tmp_path) == 0
    assert "up to date  names corrected" in capsys.readouterr().out
