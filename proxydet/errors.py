"""Every error that a user can cause or meet, in one tree.

::

    ProxydetError                exit code 1
    ├── InputError               3   what the user gave is not usable
    │   ├── ConfigError              a configuration key or value
    │   ├── VocabularyError          class names or their embeddings
    │   ├── DataError                annotations, images, dataset configs, results files
    │   │   └── UnreachableError         an object store or network disk that does not answer
    │   └── CheckpointError          weights that are damaged or of another model
    ├── ArtifactError            4   a file to download, verify or unpack
    │   ├── TransferError
    │   ├── DigestError
    │   └── ArchiveError
    ├── RuntimeEnvironmentError  5   the machine or its packages
    │   ├── MissingDependencyError
    │   ├── DiskFullError
    │   └── LockedError
    ├── NumericsError            5   a value that is not finite
    ├── TrainingError            6   training stopped by a failure in a process
    └── JobInterruptedError      130 stopped by SIGINT (or 128 + the signal's number)

The command line turns each into ``error: message``, ``hint: ...`` and the exit code, in one place.
Messages say what happened and why; the hint says what to do next.
"""

from __future__ import annotations

from pathlib import Path


class ProxydetError(Exception):
    """Base of all errors that are reported without a traceback.

    Args:
        message: What happened and why, in one or two sentences.
        hint: What the user can do next; None where there is nothing to advise.
        path: The file or folder that the error is about.
        needs: Names for ``proxydet download``, where the files of these are what is missing; the command line offers to
            fetch them.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        path: Path | None = None,
        needs: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.path = path
        self.needs = needs


class InputError(ProxydetError):
    """Something that the user gave cannot be used."""

    exit_code = 3


class ConfigError(InputError):
    """A configuration key is unknown, or its value has the wrong type or range."""


class VocabularyError(InputError):
    """Class names or text embeddings that do not make a vocabulary."""


class DataError(InputError):
    """Annotations, images, dataset configs or results that cannot be used."""


class UnreachableError(DataError):
    """An object store or a network disk does not answer, which says nothing about what is in it."""


class CheckpointError(InputError):
    """A checkpoint is damaged, unsafe, or belongs to another model."""


class ArtifactError(ProxydetError):
    """A downloadable file failed to download, failed verification, or could not be unpacked."""

    exit_code = 4


class TransferError(ArtifactError):
    """The bytes could not be fetched."""


class DigestError(ArtifactError):
    """The bytes are not the ones that were promised."""


class ArchiveError(ArtifactError):
    """An archive is damaged, or tries to write outside its folder."""


class RuntimeEnvironmentError(ProxydetError):
    """The machine, or what is installed on it, does not allow the job."""

    exit_code = 5


class MissingDependencyError(RuntimeEnvironmentError):
    """A package that this job needs is absent or broken."""


class DiskFullError(RuntimeEnvironmentError):
    """There is no room left for a file that must be written."""


class LockedError(RuntimeEnvironmentError):
    """Another process uses what only one may use at a time; the message names it."""


class NumericsError(ProxydetError):
    """A loss or a weight is not finite.

    Args:
        message: What is not finite, and where.
        hint: What the user can do next.
        path: The file with the details.
        rank: Number of the process where it arose, where every process of a training raises the error; None where the
            one that raises it is meant.
    """

    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        path: Path | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint, path=path)
        self.rank = rank


class TrainingError(ProxydetError):
    """Training stopped because one of its processes failed."""

    exit_code = 6


class JobInterruptedError(ProxydetError):
    """The job was stopped by a signal after saving what it had.

    Args:
        message: What was stopped and where its state was saved.
        signal_number: The signal; the exit code is 128 plus this number.
        hint: What to do next.
    """

    def __init__(self, message: str, *, signal_number: int = 2, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
