"""The toy training, killed at every single moment of its writing: resumed it is the same run, and nothing is left over."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHANGES = {
    "iterations": 6,
    "checkpoints": {"period": 2, "keep_last": 2},
    "evaluation": {"period": 3},
    "log": {"period": 1},
}
MOMENTS = ("fsync", "replace", "open", "truncate", "unlink")


def test_killed_at_every_moment_of_its_writing_it_is_the_same_run(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["checkpoints"] > 15, "moments in the middle of a checkpoint"
    assert found["logs"] > 5, "moments in the middle of a log"
    assert found["wrong"] == []


def main(folder: Path) -> None:
    """Kill and resume in forks of this process, which has imported what they need."""

    importlib.import_module("torch._dynamo")
    path = Path(__file__).parents[2] / "unit/training/toy_run.py"
    spec = importlib.util.spec_from_file_location("toy_run", path)
    assert spec is not None
    assert spec.loader is not None
    toy = importlib.util.module_from_spec(spec)
    sys.modules["toy_run"] = toy
    spec.loader.exec_module(toy)

    def train(root: Path, kill_at: int = -1) -> list[str]:
        """Train in the lock of a folder; note each moment of its writing in a file, and die at one of them."""
        names: list[str] = []
        note = (folder / f"{root.name}.moments").open("w", buffering=1)

        def counting(name: str, call: Callable) -> Callable:
            def counted(target: object, *arguments: object, **options: object) -> object:
                if name != "open" or (arguments[:1] and int(arguments[0]) & os.O_CREAT):
                    place = (
                        str(Path(f"/proc/self/fd/{target}").readlink())
                        if isinstance(target, int)
                        else str(target)
                    )
                    if str(root) in place:
                        note.write(f"{name} {place.removeprefix(str(root))}\n")
                        names.append(name)
                        if len(names) == kill_at:
                            os.kill(os.getpid(), signal.SIGKILL)
                return call(target, *arguments, **options)

            return counted

        for name in MOMENTS:
            setattr(os, name, counting(name, getattr(os, name)))
        with toy.RunFolder(root).held() as still_ours:
            toy.run(
                root,
                CHANGES,
                evaluate=lambda _, at, place: evaluate(at, place),
                still_ours=still_ours,
            )
        return names

    def evaluate(at: int, place: Path) -> dict[str, float]:
        place.mkdir(parents=True, exist_ok=True)
        (place / "report.json").write_text("{}")
        return {"AP": at}

    def fork(job: Callable[[], object]) -> int:
        child = os.fork()
        if not child:
            try:
                job()
            except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def content(root: Path) -> list[object]:
        lines = [
            {
                k: v
                for k, v in json.loads(line).items()
                if "second" not in k and k not in ("time", "memory_mib")
            }
            for line in (root / "metrics.jsonl").read_text().splitlines()
        ]
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        evaluations = (root / "evaluations.jsonl").read_text()
        weights = (root / "model_final.pth").read_bytes()
        return [lines, files, evaluations, weights]

    assert fork(lambda: train(folder / "whole")) == 0
    moments = (folder / "whole.moments").read_text().splitlines()
    whole = content(folder / "whole")
    wrong = []
    for number in range(1, len(moments) + 1):
        root = folder / f"cut{number}"
        killed = fork(lambda root=root, number=number: train(root, number))
        ended = fork(lambda root=root: train(root))
        if killed != signal.SIGKILL or ended != 0 or content(root) != whole:
            wrong.append([number, moments[number - 1], killed, ended])
    found = {
        "checkpoints": sum("checkpoints" in moment for moment in moments),
        "logs": sum("jsonl" in moment for moment in moments),
        "wrong": wrong,
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
