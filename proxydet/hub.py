"""Detectors on the Hugging Face hub by ``owner/name`` or ``owner/name@revision``: names, downloads, what failures mean.

A repository holds at its top the files of a run folder that a detector needs (`FILES`). They go through `huggingface_hub` into
that library's cache, which other programs share; its environment variables apply (``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``). `proxydet.publishing` writes and uploads them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxydet.config import load_mapping
from proxydet.errors import (
    ArtifactError,
    DiskFullError,
    InputError,
    ProxydetError,
    RuntimeEnvironmentError,
    TransferError,
)
from proxydet.extensions import is_python_path
from proxydet.wording import size_text

logger = logging.getLogger(__name__)

WEIGHTS = "model_final.safetensors"
REQUIRED = ("config.yaml", "vocabulary.npz", WEIGHTS)
FILES = (*REQUIRED, "text_encoder.json")
"""What is downloaded of a repository; the last only where it is there."""

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
_FILES_OF_WEIGHTS = (".pth", ".pt", ".pkl", ".bin", ".safetensors", ".npz", ".onnx", ".pt2")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOGIN = "log in with: hf auth login (or set HF_TOKEN)"


def split_name(name: str) -> tuple[str, str | None] | None:
    """Return repository and revision (a branch, a tag, a commit) of ``owner/name@revision``; None for what is not such a name."""
    match = _NAME.fullmatch(name)
    if match is None or match[1].lower().endswith(_FILES_OF_WEIGHTS) or ".." in name:
        return None
    return match[1], match[2]


def check_name(repository: str) -> None:
    """Raise InputError for what is not a repository's name, ``owner/name`` without a revision."""
    if (split_name(repository) or (None, ""))[1] is not None:
        raise InputError(
            f"{repository!r} is not a repository's name",
            hint="give it as owner/name, your account's or organisation's name first, letters, digits, - _ and . only",
        )


def fetch(name: str) -> Path:
    """Return a folder with the files of a repository; those that are not there are downloaded.

    Where the hub cannot be reached, a complete copy that was downloaded before is used, with a warning.

    Args:
        name: ``owner/name`` or ``owner/name@revision``.

    Raises:
        InputError: There is no such repository or revision, or it does not hold a detector of proxydet.
        ArtifactError: The hub refuses it, as to those who are not logged in.
        TransferError: The hub cannot be reached, or must not be asked (``HF_HUB_OFFLINE``).
        RuntimeEnvironmentError: The cache cannot be written.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    repository, revision = split_name(name) or (name, None)
    copy = _downloaded(repository, revision)
    if copy is not None and (constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(revision or "")):
        return _without_code(name, copy)
    try:
        with errors_of_hub(name, "downloaded"):
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            if lacking := [file for file in REQUIRED if file not in sizes]:
                raise InputError(
                    f"the repository {name} on the Hugging Face hub does not hold a detector that proxydet wrote: it lacks "
                    + ", ".join(lacking),
                    hint="give a repository that proxydet push wrote; download weights of another kind and open them with "
                    "--weights FILE --config",
                )
            size = size_text(sum(sizes.get(file, 0) for file in FILES))
            logger.info("%s on the Hugging Face hub: %s, %s", name, info.sha, size)
            folder = Path(
                snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
            )
            if folder.name != info.sha:  # the library's copy, as of a hub that went away meanwhile
                raise TransferError(f"{name} changed on the Hugging Face hub while it was read.")
    except TransferError as error:
        if copy is None:
            raise
        logger.warning("%s; using the copy downloaded before, %s", error.message.rstrip("."), copy)
        folder = copy
    return _without_code(name, folder)


def _downloaded(repository: str, revision: str | None) -> Path | None:
    """Return the folder of a complete copy that was downloaded before; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: dict[str, Any] = {"revision": revision, "allow_patterns": list(FILES)}
    with contextlib.suppress(LocalEntryNotFoundError, OSError, ValueError):
        found = Path(snapshot_download(repository, local_files_only=True, **asked))
        return found if all((found / file).is_file() for file in REQUIRED) else None
    return None


def _without_code(name: str, folder: Path) -> Path:
    """Return the folder, if what is opened names no Python code; what only training reads may."""
    with damage_explained(name, folder):
        content = load_mapping(folder / "config.yaml")
    refuse_code(name, folder, [content.get(part) for part in ("data", "model", "inference")])
    return folder


def refuse_code(name: str, folder: Path, settings: Any) -> None:
    """Raise `InputError` where settings of a repository name Python code: a stranger's file must not choose what is imported."""
    for code in code_paths(settings):
        raise InputError(
            f"the detector {name} on the Hugging Face hub uses Python code by its path, {code}, which is not imported on the "
            "word of a downloaded file",
            hint=f"read its config.yaml; if you trust it, copy the folder and open the copy with --run: {folder}",
            path=folder / "config.yaml",
        )


def code_paths(value: Any) -> Iterator[str]:
    """Yield the texts in nested values that name Python code, such as ``mypackage.networks:Mine``."""
    if isinstance(value, str) and is_python_path(value):
        yield value
    elif isinstance(value, Mapping):
        yield from code_paths(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from code_paths(item)


def require_login(repository: str) -> None:
    """Check, without asking the hub, that an upload is possible.

    Raises:
        ArtifactError: There is no token, or ``HF_HUB_OFFLINE`` is set.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ArtifactError(
            f"{repository} cannot be uploaded: HF_HUB_OFFLINE forbids to ask the Hugging Face hub",
            hint="unset HF_HUB_OFFLINE",
        )
    if get_token() is None:
        raise ArtifactError(
            f"{repository} cannot be uploaded: there is no token for the Hugging Face hub",
            hint="log in with: hf auth login (or set HF_TOKEN), with a token that may write",
        )


@contextlib.contextmanager
def damage_explained(name: str | None, folder: Path) -> Iterator[None]:
    """Give errors about files of a downloaded repository a hint that helps there: training cannot write them again.

    Args:
        name: The repository; None for a run of this machine, whose errors stay as they are.
        folder: Where its files are.
    """
    try:
        yield
    except InputError as error:
        if name is not None:
            error.hint = (
                f"to download {name} again, remove {folder.parents[1]}; if that does not help, it is damaged on the Hugging Face "
                "hub: write to its owner"
            )
        raise


@contextlib.contextmanager
def errors_of_hub(name: str, done: str) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into errors that name the repository, the reason and the next step.

    Args:
        name: The repository, with its revision if one was given.
        done: What could not be done with it: ``"downloaded"``, ``"uploaded"``.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    # The library draws bars into files and pipes, too.
    silent = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if silent:
        disable_progress_bars()
    try:
        yield
    except ProxydetError:
        raise
    except Exception as error:
        raise _explained(error, name, done) from error
    finally:
        if silent:
            enable_progress_bars()


def _explained(error: Exception, name: str, done: str) -> ProxydetError:
    from huggingface_hub import constants, errors, get_token

    while isinstance(error.__cause__, Exception) and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__  # why the library looked into its cache, or gave up an upload
    where = f"the Hugging Face hub ({constants.ENDPOINT})"
    what = f"{name} could not be {done}"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = str(getattr(error, "server_message", None) or "").strip().partition("\n")[0][:200]
    said = f": {said.rstrip('.')}" if said else ""
    if isinstance(error, errors.HFValidationError):
        message = f"{name!r} is not a repository's name: {_first_line(error)}"
        return InputError(message, hint="give it as owner/name")
    if isinstance(error, errors.GatedRepoError):
        return ArtifactError(
            f"{what}: {where} gives it only to those whom its owner has granted access",
            hint=f"ask for access on the repository's page, then {_LOGIN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(
            f"there is no revision {name.partition('@')[2]} of {name.partition('@')[0]} on {where}",
            hint="give a branch, a tag or a full commit hash after the @, or leave @... out",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{name} is neither a file or folder here nor a repository on {where} that "
            + ("your token may read" if get_token() else "can be read without a login"),
            hint="check its spelling; " + ("" if get_token() else "if it is private, ") + _LOGIN,
        )
    if status == 401:
        return ArtifactError(f"{what}: {where} refused the token{said}", hint=_LOGIN)
    if status == 403:
        return ArtifactError(
            f"{what}: {where} does not allow it{said}",
            hint="use a token of an account with access to it; an upload needs a token that may write: hf auth login",
        )
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return TransferError(
            f"{what}: it was not downloaded before, and HF_HUB_OFFLINE forbids to ask the Hugging Face hub",
            hint="unset HF_HUB_OFFLINE, or name a run folder or a weight file",
        )
    if status is not None and status < 500 and status not in (408, 429):
        message = f"{what}: {where} returned status {status}{said}"
        return ArtifactError(message, hint="try again later")
    if status is None and isinstance(error, OSError) and error.errno is not None:
        message = f"{what}: {error.strerror}" + (f" ({error.filename})" if error.filename else "")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or name another folder in HF_HOME"
            return DiskFullError(message, hint=hint)
        if error.filename:
            return RuntimeEnvironmentError(
                message, hint="name a folder that can be written in HF_HOME"
            )
    reason = f"status {status}" if status is not None else _first_line(error)
    return TransferError(
        f"{what}: {where} cannot be used now ({reason}{said})",
        hint="check the network and run the same command again"
        + ("; what was downloaded is kept" if done == "downloaded" else ""),
    )


def _first_line(error: Exception) -> str:
    line = re.sub(r"^\[Errno -?\d+\] ", "", str(error).strip().partition("\n")[0])
    return (line or type(error).__name__).rstrip(".")[:200]
