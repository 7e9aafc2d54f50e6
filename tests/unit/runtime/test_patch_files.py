"""The life of the patch on files: apply, again, revert; refusals leave everything as it was."""

from __future__ import annotations

import os
import py_compile
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from proxydet.errors import RuntimeEnvironmentError
from proxydet.runtime.patch import apply_patch, patch_status, revert_patch, roi_align_files


def folder_content(file: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in file.parent.iterdir() if p.is_file()}


def test_apply_again_and_revert_byte_for_byte(roi_align_file):
    before, names = roi_align_file.read_bytes(), folder_content(roi_align_file)
    change = apply_patch(roi_align_file)
    assert change.changed
    assert "+            input.half().double()," in change.diff
    assert roi_align_file.read_bytes() != before
    status = patch_status(roi_align_file)
    assert status.state == "applied"
    assert status.record is not None
    assert (status.record.before, status.record.after) == (change.before, change.after)

    again = apply_patch(roi_align_file)
    assert not again.changed
    assert again.after == change.after

    back = revert_patch(roi_align_file)
    assert back.changed
    assert (back.before, back.after) == (change.after, change.before)
    assert folder_content(roi_align_file) == names
    assert not revert_patch(roi_align_file).changed


def test_dry_runs_change_nothing_and_show_the_diff(roi_align_file):
    before = folder_content(roi_align_file)
    shown = apply_patch(roi_align_file, dry_run=True)
    assert shown.changed
    assert ".half().double()" in shown.diff
    assert folder_content(roi_align_file) == before
    apply_patch(roi_align_file)
    applied = folder_content(roi_align_file)
    assert revert_patch(roi_align_file, dry_run=True).changed
    assert folder_content(roi_align_file) == applied


@pytest.mark.parametrize(
    "move",
    [
        lambda s: b"# a comment\n" * 40 + s,
        lambda s: s.replace(b"\n", b"\r\n"),
        lambda s: s.replace(b"Copyright", "Cöpyright ©".encode()),
        lambda s: s.replace(
            b"            rois.to(dtype=input.dtype),\n", b" rois.to(dtype=input.dtype) ,"
        ),
        lambda s: s.replace(b"rois.to(dtype=input.dtype)", b"rois.to(input.dtype)"),
        lambda s: s.replace(b"return roi_align(", b"return roi_align(  # \xc3\xa9 pooled\n"),
        lambda s: s.replace(b"input,\n            rois", b"input, rois"),
    ],
)
def test_position_layout_and_comments_do_not_matter(roi_align_file, move):
    moved = move(roi_align_file.read_bytes())
    assert moved != roi_align_file.read_bytes()
    roi_align_file.write_bytes(moved)
    apply_patch(roi_align_file)
    changed = roi_align_file.read_bytes()
    assert patch_status(roi_align_file).state == "applied"
    assert changed.count(b".half().double()") == 2
    assert changed.count(b").to(dtype=input.dtype)") == 1
    revert_patch(roi_align_file)
    assert roi_align_file.read_bytes() == moved


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        (b"            input,\n", b"            input.half().double(),\n", "boxes"),
        (b"rois.to(dtype=input.dtype)", b"rois.half().double()", "features"),
        (b"self.aligned,\n        )", b"self.aligned,\n        ).to(dtype=input.dtype)", "boxes"),
    ],
)
def test_a_part_of_the_change_is_told_apart(roi_align_file, old, new, missing):
    roi_align_file.write_bytes(roi_align_file.read_bytes().replace(old, new, 1))
    status = patch_status(roi_align_file)
    assert status.state == "half"
    assert f"not {missing}" in status.reason or f", {missing}" in status.reason


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"self.sampling_ratio,\n            self.aligned", b"2,\n            self.aligned"),
        (b"rois.to(dtype=input.dtype)", b"rois.double()"),
        (b"        return roi_align(", b"        input = input.half()\n        return roi_align("),
        (b"input = input.dequantize()", b"input = input.float()"),
        (b"import roi_align", b"import roi_align\nroi_align = abs"),
        (b"import roi_align", b"import roi_align\nimport mine as roi_align"),
        (b"class ROIAlign(", b"class ROIAlign: ...\nclass ROIAlign("),
        (b"def forward(", b"@staticmethod\n    def forward("),
        (b"def __repr__", b"def forward(self): ...\n    def __repr__"),
        (b"def __repr__", b"forward = None\n    def __repr__"),
        (b"return roi_align(", b"return roi_align("[:-1]),
        (b"return roi_align(", b"return " + b"(" * 3000),
        (b"return roi_align(", b"return \0roi_align("),
    ],
)
def test_other_code_is_altered_and_is_left_alone(roi_align_file, old, new):
    changed = roi_align_file.read_bytes().replace(old, new, 1)
    assert changed != roi_align_file.read_bytes()
    roi_align_file.write_bytes(changed)
    status = patch_status(roi_align_file)
    assert status.state == "altered"
    assert len(status.reason) > 10
    with pytest.raises(RuntimeEnvironmentError, match=r"roi_align\.py"):
        apply_patch(roi_align_file)
    assert roi_align_file.read_bytes() == changed


def test_permissions_stay_and_hard_links_keep_the_original(roi_align_file, tmp_path):
    roi_align_file.chmod(0o640)
    linked = tmp_path / "in_another_environment.py"
    os.link(roi_align_file, linked)
    original = linked.read_bytes()
    apply_patch(roi_align_file)
    assert stat.S_IMODE(roi_align_file.stat().st_mode) == 0o640
    assert linked.read_bytes() == original
    revert_patch(roi_align_file)
    assert stat.S_IMODE(roi_align_file.stat().st_mode) == 0o640


def test_a_symbolic_link_stays_one_and_its_target_changes(roi_align_file, tmp_path):
    target = tmp_path / "elsewhere" / "roi_align.py"
    target.parent.mkdir()
    roi_align_file.rename(target)
    roi_align_file.symlink_to(target)
    apply_patch(roi_align_file)
    assert roi_align_file.is_symlink()
    assert patch_status(target).state == "applied"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"return roi_align(", b"print(rois)\n        return roi_align("),
        (b"rois.to(dtype=input.dtype)", b"rois.half().double()"),
    ],
)
def test_unexpected_code_is_left_alone_with_a_diff(roi_align_file, old, new):
    roi_align_file.write_bytes(roi_align_file.read_bytes().replace(old, new))
    before = folder_content(roi_align_file)
    for action in (apply_patch, revert_patch):
        with pytest.raises(RuntimeEnvironmentError) as caught:
            action(roi_align_file)
        added = [line for line in caught.value.message.splitlines() if line.startswith("+")]
        assert any(new.decode().split("\n")[0] in line for line in added)
        assert "reinstall" in (caught.value.hint or "")
    assert folder_content(roi_align_file) == before


def test_a_file_changed_after_apply_is_not_reverted(roi_align_file):
    apply_patch(roi_align_file)
    changed = roi_align_file.read_bytes() + b"\n# mine\n"
    roi_align_file.write_bytes(changed)
    with pytest.raises(RuntimeEnvironmentError, match="# mine"):
        revert_patch(roi_align_file)
    assert roi_align_file.read_bytes() == changed
    assert not apply_patch(roi_align_file).changed


def test_a_change_made_by_hand_is_recognised_but_not_reverted(roi_align_file):
    text = roi_align_file.read_text()
    text = text.replace("            input,\n", "            input.half().double(),\n")
    text = text.replace("rois.to(dtype=input.dtype)", "rois.half().double()")
    text = text.replace(
        "self.aligned,\n        )", "self.aligned,\n        ).to(dtype=input.dtype)"
    )
    roi_align_file.write_text(text)
    status = patch_status(roi_align_file)
    assert status.state == "applied"
    assert status.record is None
    assert any("not reverted" in note for note in status.notes)
    assert not apply_patch(roi_align_file).changed
    with pytest.raises(RuntimeEnvironmentError, match="cannot be reverted"):
        revert_patch(roi_align_file)


def test_a_reinstalled_file_makes_the_old_record_void(roi_align_file):
    original = roi_align_file.read_bytes()
    apply_patch(roi_align_file)
    roi_align_file.write_bytes(b"# newer\n" + original)
    assert patch_status(roi_align_file).record is None
    apply_patch(roi_align_file)
    revert_patch(roi_align_file)
    assert roi_align_file.read_bytes() == b"# newer\n" + original


@pytest.mark.parametrize("writes_before", [0, 1, 2])
def test_a_crash_between_the_steps_leaves_a_usable_file(roi_align_file, monkeypatch, writes_before):
    before = folder_content(roi_align_file)
    real, done = Path.replace, []

    def fail_later(self: Path, target: Path) -> Path:
        if len(done) == writes_before:
            raise OSError(28, "No space left on device", str(target))
        done.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fail_later)
    with pytest.raises(RuntimeEnvironmentError, match="No space"):
        apply_patch(roi_align_file)
    monkeypatch.undo()
    assert roi_align_file.read_bytes() == before["roi_align.py"]
    assert not [name for name in folder_content(roi_align_file) if name.endswith(".tmp")]
    assert patch_status(roi_align_file).state == "original"
    apply_patch(roi_align_file)
    revert_patch(roi_align_file)
    assert folder_content(roi_align_file) == before


def test_an_original_that_is_not_the_recorded_one_is_not_restored(roi_align_file):
    apply_patch(roi_align_file)
    kept = roi_align_file.with_name("roi_align.py.proxydet-original")
    kept.write_bytes(kept.read_bytes() + b"# mine\n")
    before = folder_content(roi_align_file)
    assert patch_status(roi_align_file).record is None
    with pytest.raises(RuntimeEnvironmentError, match="cannot be reverted"):
        revert_patch(roi_align_file)
    assert folder_content(roi_align_file) == before


def test_bytecode_in_a_folder_of_its_own_is_deleted(roi_align_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "bytecode"))
    compiled = Path(py_compile.compile(str(roi_align_file)))
    assert tmp_path / "bytecode" in compiled.parents
    assert apply_patch(roi_align_file).removed_bytecode == (compiled,)


def test_a_damaged_record_is_named(roi_align_file):
    apply_patch(roi_align_file)
    record = roi_align_file.with_name("roi_align.py.proxydet-patch.json")
    record.write_text("{}")
    with pytest.raises(RuntimeEnvironmentError, match=r"proxydet-patch\.json is damaged"):
        patch_status(roi_align_file)


def test_a_revert_that_was_cut_short_is_finished(roi_align_file):
    before = folder_content(roi_align_file)
    original = roi_align_file.read_bytes()
    apply_patch(roi_align_file)
    compiled = Path(
        py_compile.compile(
            str(roi_align_file), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
    )
    roi_align_file.write_bytes(original)
    assert revert_patch(roi_align_file, dry_run=True).removed_bytecode == ()
    assert compiled.exists()
    assert revert_patch(roi_align_file).removed_bytecode == (compiled,)
    assert folder_content(roi_align_file) == before


def test_unchecked_bytecode_of_another_source_is_found_and_deleted(roi_align_file):
    compiled = Path(
        py_compile.compile(
            str(roi_align_file), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
    )
    assert patch_status(roi_align_file).stale_bytecode == ()
    change = apply_patch(roi_align_file)
    assert change.removed_bytecode == (compiled,)
    assert not compiled.exists()

    py_compile.compile(
        str(roi_align_file), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    roi_align_file.write_bytes(roi_align_file.read_bytes() + b"\n")
    assert patch_status(roi_align_file).stale_bytecode == (compiled,)
    assert apply_patch(roi_align_file).removed_bytecode == (compiled,)
    assert patch_status(roi_align_file).stale_bytecode == ()


@pytest.mark.parametrize("mode", ["TIMESTAMP", "CHECKED_HASH"])
def test_bytecode_that_python_checks_itself_is_not_stale(roi_align_file, mode):
    kind = py_compile.PycInvalidationMode[mode]
    py_compile.compile(str(roi_align_file), invalidation_mode=kind)
    roi_align_file.write_bytes(roi_align_file.read_bytes() + b"\n")
    assert patch_status(roi_align_file).stale_bytecode == ()


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    assert patch_status(tmp_path / "roi_align.py").state == "missing"
    with pytest.raises(RuntimeEnvironmentError, match="no such file"):
        apply_patch(tmp_path / "roi_align.py")


def test_every_detectron2_on_the_path_is_found_in_order(tmp_path):
    for name in ("first", "second", "no_package"):
        (tmp_path / name / "detectron2" / "layers").mkdir(parents=True)
        (tmp_path / name / "detectron2" / "layers" / "roi_align.py").touch()
    for name in ("first", "second"):
        (tmp_path / name / "detectron2" / "__init__.py").touch()
    search = [str(tmp_path / name) for name in ("no_package", "first", "second", "first")]
    found = roi_align_files(search)
    assert [file.parents[2].name for file in found] == ["first", "second"]


def test_status_warns_of_a_second_detectron2_on_the_path(roi_align_file, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(roi_align_file.parents[2])])
    notes = patch_status(roi_align_file).notes
    assert any("more than one detectron2" in note for note in notes)


def test_status_tells_a_copy_that_is_not_the_one_in_use(roi_align_file):
    notes = patch_status(roi_align_file).notes
    assert any("imports another detectron2" in note for note in notes)


def test_status_warns_of_a_source_tree(roi_align_file, tmp_path):
    tree = tmp_path / "source" / "detectron2" / "layers"
    tree.mkdir(parents=True)
    (tmp_path / "source" / ".git").mkdir()
    copy = tree / "roi_align.py"
    copy.write_bytes(roi_align_file.read_bytes())
    assert any("version control" in note for note in patch_status(copy).notes)


def test_status_needs_neither_torch_nor_detectron2s_import():
    code = (
        "import sys; from proxydet.runtime.patch import patch_status, file_in_use; "
        "patch_status(file_in_use()); assert not {'torch', 'detectron2', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
