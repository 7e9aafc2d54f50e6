"""The report in environments that are broken in the usual ways: each a folder that hides or replaces packages.

A ``sitecustomize`` in front of the path hides packages from the report's process and from the one that asks torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

_HIDE = """
import sys

class _Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

sys.meta_path.insert(0, _Hidden())
"""


def report_in(folder: Path, *, quick: bool = False) -> dict[str, dict]:
    code = (
        "import json, sys; from proxydet.runtime.report import environment; "
        f"json.dump(environment(quick={quick}).to_dict(), sys.stdout)"
    )
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    return {field["key"]: field for field in json.loads(done.stdout)["fields"]}


def hide(folder: Path, *names: str) -> None:
    (folder / "sitecustomize.py").write_text(_HIDE.format(hidden=set(names)))


def stand_in(folder: Path, name: str, version: str, start: str) -> Path:
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text(start)
    (package / "version.py").write_text(f"__version__ = {version!r}\n")
    return package


def test_without_torch(tmp_path):
    hide(tmp_path, "torch", "torchvision")
    fields = report_in(tmp_path)
    assert fields["torch"]["value"] is None
    assert fields["torch"]["verdict"] == "will fail"
    assert "No module named 'torch'" in fields["torch.import"]["problem"]
    assert fields["detectron2"]["verdict"] == "same"


def test_without_detectron2(tmp_path):
    hide(tmp_path, "detectron2")
    fields = report_in(tmp_path, quick=True)
    assert fields["detectron2"]["verdict"] == "will fail"
    assert fields["detectron2"]["reason"] == "run: proxydet setup"
    assert fields["roi_align"]["verdict"] == "will fail"


def test_with_a_torchvision_whose_operators_do_not_load(tmp_path):
    package = stand_in(tmp_path, "torchvision", "0.28.0+cu118", "raise RuntimeError('nms')")
    (package / "_C.so").write_bytes(b"not a library")
    fields = report_in(tmp_path)
    assert fields["torchvision"]["value"].startswith("0.28.0+cu118 @")
    assert fields["torchvision.import"]["verdict"] == "will fail"
    assert "do not load into this torch" in fields["torchvision.import"]["problem"]


def test_with_a_torch_built_for_another_cuda(tmp_path):
    message = "libcudart.so.11.0: cannot open shared object file: No such file or directory"
    stand_in(tmp_path, "torch", "2.7.0+cu118", f"raise OSError({message!r})")
    fields = report_in(tmp_path)
    assert fields["torch"]["value"].startswith("2.7.0+cu118 @")
    assert "libcudart.so.11.0" in fields["torch.import"]["problem"]
    assert fields["torch.import"]["verdict"] == "will fail"


def test_with_a_torch_that_ends_the_process(tmp_path):
    stand_in(tmp_path, "torch", "2.7.0", "import os; os.abort()")
    fields = report_in(tmp_path)
    assert "ends the process (SIGABRT)" in fields["torch.import"]["problem"]


def test_with_two_detectron2_of_which_another_version_is_used(tmp_path):
    package = stand_in(tmp_path, "detectron2", "0.7", "__version__ = '0.7'")
    (package / "layers").mkdir()
    installed = Path(importlib.util.find_spec("detectron2").origin).parent
    shutil.copy(installed / "layers" / "roi_align.py", package / "layers")
    fields = report_in(tmp_path, quick=True)
    assert fields["detectron2"]["value"] == f"0.7 @{package}"
    assert fields["detectron2"]["verdict"] == "may change results"
    assert fields["roi_align"]["value"].startswith(f"original @{package}")
    assert fields["roi_align"]["problem"] == "2 copies of detectron2 are on Python's path"
    assert fields["roi_align"]["verdict"] == "may change results"


def test_the_command_fails_only_when_asked_to_check(tmp_path):
    hide(tmp_path, "torch", "torchvision", "numpy", "detectron2", "PIL", "cv2", "fvcore")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    codes = [
        subprocess.run(
            [sys.executable, "-m", "proxydet_cli", "env", *words],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        ).returncode
        for words in ((), ("--check",))
    ]
    assert codes == [0, 5]
