"""Where proxydet keeps files when nobody says otherwise.

Each folder can be moved by an environment variable; nothing is created here.

================== ========================== ==========================================
variable           default                    holds
================== ========================== ==========================================
PROXYDET_DATASETS  ``datasets`` (working dir) images and annotations
PROXYDET_MODELS    ``models`` (working dir)   downloaded checkpoints
PROXYDET_RUNS      ``runs`` (working dir)     run folders of training
PROXYDET_CACHE     ``proxydet`` in the user's annotation stores, text embeddings and
                   cache folder               other files that can be made again
================== ========================== ==========================================
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from pathlib import Path

from proxydet.errors import InputError, RuntimeEnvironmentError
from proxydet.wording import near_misses


def _from_environment(variable: str, default: Path) -> Path:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else default


def datasets_folder() -> Path:
    """The folder of the data sets: ``$PROXYDET_DATASETS``, or ``datasets`` in the working folder."""
    return _from_environment("PROXYDET_DATASETS", Path("datasets"))


def dataset_path(name: str) -> Path:
    """Return the file or folder that ``--data`` names: of a bare name the prepared data set before what is called so here."""
    path, prepared = Path(name), datasets_folder() / f"{name}.toml"
    bare = not path.suffix and name == path.name
    return prepared if bare and (prepared.exists() or not path.exists()) else path


def models_folder() -> Path:
    """The folder of downloaded checkpoints: ``$PROXYDET_MODELS``, or ``models`` in the working folder."""
    return _from_environment("PROXYDET_MODELS", Path("models"))


def runs_folder() -> Path:
    """The folder of run folders: ``$PROXYDET_RUNS``, or ``runs`` in the working folder."""
    return _from_environment("PROXYDET_RUNS", Path("runs"))


def cache_folder(kind: str) -> Path:
    """The folder of files that can be made again.

    Args:
        kind: What is kept there, one word: ``"stores"``, ``"embeddings"``.

    Returns:
        ``$PROXYDET_CACHE/kind``, or ``proxydet/kind`` in the user's cache folder.

    Raises:
        RuntimeEnvironmentError: There is no home folder and no variable that says where to go.
    """
    try:
        user_cache = _from_environment("XDG_CACHE_HOME", Path("~/.cache").expanduser())
    except RuntimeError as error:
        if not os.environ.get("PROXYDET_CACHE"):
            raise RuntimeEnvironmentError(
                "No home folder was found for the cache.",
                hint="set PROXYDET_CACHE to a folder that can be written",
            ) from error
        user_cache = Path()
    return _from_environment("PROXYDET_CACHE", user_cache / "proxydet") / kind


CACHE_HINT = "check that you may write to its folder, or name another one for the cache in PROXYDET_CACHE or XDG_CACHE_HOME"
"""Hint where the cache folder cannot be written to."""


QUICKSTARTS_RUN = "run"
"""The run folder inside the folder of a quickstart."""


RESTORABLE = ("vocabulary.npz", "text_encoder.json")
"""Files of a run folder, besides weights, that training writes again where they are damaged."""


def run_in(folder: Path) -> Path:
    """The run folder itself; for the folder of a quickstart the one inside it."""
    inner = folder / QUICKSTARTS_RUN
    known = [(place / "config.yaml").is_file() for place in (folder, inner)]
    return inner if known == [False, True] else folder


def how_to_restore(path: Path, otherwise: str) -> str:
    """Return a hint for a damaged file: what writes it again in a run folder, or ``otherwise`` for a file elsewhere."""
    run = path.parent
    if path.name not in RESTORABLE or not (run / "config.yaml").is_file():
        return otherwise
    command = ["proxydet", "train", "--config", str(run / "config.yaml"), "--output", str(run)]
    return f"write it again from the run's last checkpoint: {shlex.join(command)}"


_STEP = re.compile(r"step_(\d{7,})")


def step_name(iteration: int) -> str:
    """Return what the files and folders of an iteration are called in a run folder, without an ending."""
    return f"step_{iteration:07d}"


def step_of(name: str) -> int | None:
    """Return the iteration of a `step_name`; None where it is not one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (iteration, path) of the complete checkpoints in a folder, which may be absent, oldest first."""
    if not folder.is_dir():
        return []
    named = ((step_of(path.stem), path) for path in folder.iterdir() if path.suffix == ".pth")
    return sorted((step, path) for step, path in named if step is not None)


def did_you_mean(path: Path) -> str:
    """Return ``did you mean runs/pets? if not, `` for what is called nearly so in the same folder, or nothing."""
    try:
        there = [other.name for other in itertools.islice(path.parent.iterdir(), 10_000)]
    except OSError:
        return ""
    near = near_misses(path.name, there, 3)
    names = ", ".join(str(path.with_name(name)) for name in near)
    return f"did you mean {names}? if not, " if near else ""


def require_run(folder: Path) -> Path:
    """Return the run folder that a path means; see `run_in`.

    Raises:
        InputError: There is no such folder, or no run in it.
    """
    if folder.is_file():
        raise InputError(
            f"{folder} is a file, not a run folder",
            hint="give the folder that proxydet train or quickstart wrote",
            path=folder,
        )
    if not folder.is_dir():
        raise InputError(
            f"there is no run folder {folder}",
            hint=f"{did_you_mean(folder)}create one with proxydet quickstart or proxydet train",
            path=folder,
        )
    found = run_in(folder)
    if not any((found / name).exists() for name in ("config.yaml", "manifest.json")):
        raise InputError(
            f"{folder} is not a run folder: it has no config.yaml",
            hint="give the folder that proxydet train or quickstart wrote",
            path=folder,
        )
    return found
