"""detectron2 as users have it: absent, old, shadowed, compiled, broken; each in a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxydet.errors import MissingDependencyError
from proxydet.runtime.detectron2 import locate_detectron2

PROBE = """
import json
from proxydet.errors import ProxydetError
try:
    import proxydet.runtime.d2 as d2
    from detectron2 import _C
    answer = {"version": d2.INSTALLED.version, "operators": d2.INSTALLED.operators, "real": _C.__dict__.get("REAL", False)}
except ProxydetError as error:
    answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
print(json.dumps(answer))
"""


class Site:
    """A folder that comes first on the import path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The states do not depend on torch; an empty one saves seconds a test.
        (folder / "torch.py").write_text("")

    def detectron2(self, version: str = "0.6", compiled: str | None = None, body: str = "") -> None:
        package = self.folder / "detectron2"
        package.mkdir()
        (package / "__init__.py").write_text(f"{body}\n__version__ = {version!r}\n")
        if compiled is not None:
            (package / "_C.py").write_text(compiled)

    def probe(self, *options: str) -> dict[str, object]:
        run = subprocess.run(
            [sys.executable, *options, "-W", "ignore", "-c", PROBE],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": f"{self.folder}:{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
            check=True,
        )
        answer: dict[str, object] = json.loads(run.stdout)
        return answer


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def test_compiled_operators_are_left_alone(site):
    site.detectron2(compiled="REAL = True")
    assert site.probe() == {"version": "0.6", "operators": "compiled", "real": True}


def test_operators_that_do_not_load_are_replaced(site):
    site.detectron2(compiled="raise ImportError('undefined symbol: _ZN3c10')")
    answer = site.probe()
    assert answer["operators"] == "broken"


def test_pure_python_installation(site):
    site.detectron2(version="0.6+main")
    answer = site.probe()
    assert (answer["version"], answer["operators"]) == ("0.6+main", "absent")


def test_python_without_docstrings(site):
    site.detectron2()
    answer = site.probe("-OO")
    assert answer["error"] == "RuntimeEnvironmentError"
    assert "-OO" in str(answer["hint"])
    assert site.probe("-O")["version"] == "0.6"


def test_too_old(site):
    site.detectron2(version="0.5")
    answer = site.probe()
    assert answer["error"] == "MissingDependencyError"
    assert "0.5" in str(answer["message"])


def test_a_package_that_it_needs_is_missing(site):
    site.detectron2(body="import fvcore_of_another_name")
    answer = site.probe()
    assert answer["error"] == "MissingDependencyError"
    assert "fvcore_of_another_name" in str(answer["message"])


def test_folder_of_the_same_name_is_not_an_installation(tmp_path, monkeypatch):
    (tmp_path / "detectron2").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    with pytest.raises(MissingDependencyError, match=str(tmp_path / "detectron2")):
        locate_detectron2()


def test_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    with pytest.raises(MissingDependencyError) as caught:
        locate_detectron2()
    assert caught.value.hint == "run: proxydet setup"


def test_opencv_that_cannot_load_does_not_take_detectron2_down(site):
    (site.folder / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open')")
    site.detectron2(
        body="import os\nif not os.environ.get('DETECTRON2_DISABLE_CV2'):\n    import cv2"
    )
    assert site.probe()["operators"] == "absent"
