"""``proxydet patch``: what it prints and how it exits, on throw-away copies."""

import json

import pytest


@pytest.fixture
def run(roi_align_file, cli):
    return lambda *words: cli("patch", *words, "--detectron2", roi_align_file.parents[1])


def test_the_life_of_the_patch(run, roi_align_file):
    before = roi_align_file.read_bytes()
    assert run("status")[1].startswith("original: ")
    code, out, _ = run("apply", "--dry-run")
    assert (code, roi_align_file.read_bytes()) == (0, before)
    assert "+            rois.half().double()," in out
    code, out, _ = run("apply")
    assert code == 0
    assert out.startswith("applied the published change")
    assert run("apply")[1].startswith("nothing to do: already applied")
    assert "applied by proxydet" in run("status")[1]
    assert run("revert")[1].startswith("reverted")
    assert run("revert")[1].startswith("nothing to do: already reverted")
    assert roi_align_file.read_bytes() == before


def test_json_is_data_alone(run):
    for words in (("status",), ("apply",), ("revert", "--dry-run")):
        code, out, err = run(*words, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)["file"].endswith("roi_align.py")


def test_a_refusal_is_exit_code_5_with_diff_and_hint(run, roi_align_file):
    roi_align_file.write_bytes(roi_align_file.read_bytes().replace(b"self.aligned,\n", b"True,\n"))
    code, out, err = run("apply")
    assert (code, out) == (5, "")
    assert "error: " in err
    assert ", True)" in err
    assert "hint: " in err
    code, out, _ = run("status")
    assert code == 0
    assert out.startswith("altered: ")
    assert ", True)" in out


def test_verify_wants_a_device_that_there_is(run):
    assert run("verify", "--device", "tpu")[0] == 2
