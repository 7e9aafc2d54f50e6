"""Jobs over any number of images: planned once, run by any number of processes, continued after any end.

What is done with an image is an argument, as is the form of the results::

    class Work:                                       # an ImageWork: what a process holds, such as an open detector
        def read(self, image, root): ...              # such as image.read(root): what `run` takes; threads call it
        def shape(self, read): ...                    # images of equal shape share a batch
        def run(self, batch): ...                     # list of what was read -> content of each image, in their order
        large = False                                 # whether few images, as a whole, fit into memory

    class Parts:                                      # a PartFormat: picklable; writes the results of some images
        name, suffix = "mine", ".npz"
        def write(self, target, rows): ...            # consumes Rows (image, content or error) as they are computed;
                                                      # returns how many objects were in them

    job = open_job(folder, ["photos/", "s3://bucket/*.tar"], identity={"detector": digest, ...}, parts=Parts())
    done = run_job(job, open_work, shard=Shard(0, 8), workers=2)    # open_work(number) -> Work, in each process

The folder of a job::

    job.json                what is computed (its identity), from which sources, how many images; where each part begins
    images.jsonl            the plan: an image a line (name, bytes, stamp, tar, offset); it is what the parts are cut from
    parts/000012.jsonl      results of one part: at most 1,000 images; written whole or not at all
    finished/0-of-8.jsonl   a line for each part that shard 0 of 8 has finished: counts, size and digest of its file
    shards/0-of-8.lock      held by the process that runs the shard

A part is computed as a whole by one process, from the plan alone: which process, on how many machines, in what order and
after how many interruptions makes no difference to it. A part counts as finished when a line of this very job says so and its
file has the size and digest that the line says, so that a killed process costs the parts that it worked on, nothing is computed
twice and nothing is lost. Images that a store did not hand out are tried again when the job is continued; an image that cannot be read is a
row with its error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec

from proxydet._version import __version__
from proxydet.errors import (
    ConfigError,
    DataError,
    JobInterruptedError,
    MissingDependencyError,
    ProxydetError,
    RuntimeEnvironmentError,
    UnreachableError,
)
from proxydet.files import (
    JsonLines,
    Lock,
    build_once,
    read_errors,
    read_json,
    sha256,
    staged,
    write_errors,
    write_json,
)
from proxydet.inference.pipeline import READERS, run_images
from proxydet.inference.sources import SourceImage, stream_images
from proxydet.modeling.config import with_later_settings
from proxydet.reporting import SILENT, Progress
from proxydet.wording import first_of

logger = logging.getLogger(__name__)

MANIFEST = "job.json"
LARGEST_PART = 1000
"""Images in a part, unless another number is asked for; a small job has smaller ones, so that several workers share it."""
_SMALLEST_PART = 50
_FORMAT = 1
_STORE_READERS = 16
_NAMED_FAILURES = 3
_MOST_DEATHS = 3


# --- What is done with an image, and what is written --------------------------------------------------------------------


class ImageWork(Protocol):
    """What is done with an image."""

    def read(self, image: SourceImage, root: str) -> Any:
        """Read an image, whose relative path starts from a folder, and do what needs no order, such as scaling; threads call it."""

    def shape(self, read: Any) -> Hashable:
        """Return what images of one batch have in common."""

    def run(self, batch: list[Any]) -> Sequence[Any]:
        """Return the content of each image's row."""

    @property
    def large(self) -> bool:
        """Whether images are too large for many to be in memory: each is run by itself, and few are read ahead."""


Choose: TypeAlias = Callable[[Iterator[SourceImage], Counter[str]], Iterator[SourceImage]]

OpenWork: TypeAlias = Callable[[int], ImageWork]
"""Opens the work in the process of that number, from 0; picklable where there are several workers."""


class Row(NamedTuple):
    """The result of one image."""

    image: SourceImage
    content: Any
    """What the work made of it; None where there is an error."""
    error: str | None


class PartFormat(Protocol):
    """How the results of a part become a file; picklable."""

    @property
    def name(self) -> str:
        """What the manifest calls it."""

    @property
    def suffix(self) -> str:
        """Of the files."""

    def write(self, target: Path, rows: Iterable[Row]) -> int:
        """Write a file from rows, which are computed as they are taken, and return how many objects are in them."""


class PartRecord(msgspec.Struct, kw_only=True, frozen=True):
    """What the ledger holds of a finished part.

    Attributes:
        part: Its number.
        job: Digest of the job that it is of (`Job.digest`).
        images: Rows in it.
        objects: Detections, or what the work finds, in all of them.
        errors: Images that could not be read, those that a store did not hand out among them.
        unreachable: Images that a store did not hand out.
        changed: Images whose file is not the one that was planned; what is there now was run on.
        bytes: Size of the file.
        sha256: Its digest.
        failures: Messages of the first few errors.
    """

    part: int
    job: str
    images: int
    objects: int
    errors: int
    unreachable: int
    changed: int
    bytes: int
    sha256: str
    failures: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Shard:
    """The parts ``index``, ``index + count``, ``index + 2 * count``, ... of a job: what one process, or machine, runs."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Shard:
        """Read ``0/8``, the first of eight; ``auto``, or ``auto/8``, takes it from the environment.

        The environment is that of a task of a SLURM array, of a task of a SLURM step, of a node of SkyPilot, or of a pod of an
        indexed Job of Kubernetes, which does not know how many there are.

        Raises:
            ConfigError: It is something else, or the environment has no numbers.
        """
        first, _, second = text.partition("/")
        if first == "auto":
            found = _from_environment(environment)
            if found is None:
                raise ConfigError(
                    "--shard auto finds no number in the environment: not SLURM_ARRAY_TASK_ID, SLURM_PROCID, "
                    "SKYPILOT_NODE_RANK or JOB_COMPLETION_INDEX",
                    hint="give it: --shard 0/8 is the first of 8, --shard 7/8 the last",
                )
            first, stated = str(found[0]), found[1]
            second = second or ("" if stated is None else str(stated))
            if not second:
                raise ConfigError(
                    "Kubernetes states the number of the pod, not how many there are",
                    hint="give the completions of the Job: --shard auto/8",
                )
        if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
            raise ConfigError(
                f"the shard {text!r} is not a number and a count, the number from 0",
                hint="--shard 0/8 is the first of 8, --shard 7/8 the last",
            )
        return cls(int(first), int(second))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def _from_environment(environment: Mapping[str, str]) -> tuple[int, int | None] | None:
    numbers = {name: int(value) for name, value in environment.items() if value.isdecimal()}
    for index, count, first, step in (
        (
            "SLURM_ARRAY_TASK_ID",
            "SLURM_ARRAY_TASK_COUNT",
            "SLURM_ARRAY_TASK_MIN",
            "SLURM_ARRAY_TASK_STEP",
        ),
        ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "", ""),
        ("SLURM_PROCID", "SLURM_NTASKS", "", ""),
        ("JOB_COMPLETION_INDEX", "", "", ""),
    ):
        if index in numbers:
            place = (numbers[index] - numbers.get(first, 0)) // (numbers.get(step) or 1)
            return place, numbers.get(count)
    return None


# --- Planning ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A planned job.

    Attributes:
        folder: Where everything of it is.
        parts: How results are written.
        images: Number of images, each once.
        duplicates: How many were named again, and left out.
        left_out: Files that are not images, by kind.
        counts: What `choose` of `open_job` counted.
        root: Absolute path that relative names of images start from.
        offsets: Where each part begins in the plan, in bytes.
        digest: Of what is computed from which plan: parts of another digest are not of this job.
        planned: Whether it was planned just now, not continued.
    """

    folder: Path
    parts: PartFormat
    images: int
    duplicates: int
    left_out: Counter[str]
    counts: Counter[str]
    root: str
    offsets: Sequence[int]
    digest: str
    planned: bool = False

    def plan(self, part: int) -> list[SourceImage]:
        """Return the images of a part."""
        end = self.offsets[part + 1] if part + 1 < len(self.offsets) else None
        path = self.folder / "images.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(self.offsets[part])
                data = file.read() if end is None else file.read(end - self.offsets[part])
            return [SourceImage(*json.loads(line)) for line in data.splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"the plan {path} cannot be read: {error}",
                hint="put it back, or give another folder with --output",
                path=path,
            ) from error

    def file(self, part: int) -> Path:
        """Return where the results of a part are, or will be."""
        return self.folder / "parts" / f"{part:06d}{self.parts.suffix}"

    def finished(self) -> dict[int, PartRecord]:
        """Return what is known of each finished part; those of another job, or whose file is gone or of another size, are not."""
        found: dict[int, PartRecord] = {}
        sizes = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / "parts") as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
        for ledger in sorted((self.folder / "finished").glob("*.jsonl")):
            for line in JsonLines(ledger).read(then="their parts are computed again"):
                with contextlib.suppress(msgspec.ValidationError):
                    record = msgspec.convert(line, PartRecord)
                    inside = record.job == self.digest and 0 <= record.part < len(self.offsets)
                    if inside and sizes.get(self.file(record.part).name) == record.bytes:
                        found[record.part] = record
        return found

    def begun(
        self, shard: Shard, *, retry_errors: bool = False
    ) -> tuple[dict[int, PartRecord], list[int]]:
        """Return what is finished of a shard, digests compared, and the parts that are to be computed.

        Args:
            shard: Which parts.
            retry_errors: Whether parts with images that could not be read are computed again.
        """
        mine = range(shard.index, len(self.offsets), shard.count)
        finished = self.finished()
        records = {part: finished[part] for part in mine if part in finished}
        for part, record in list(records.items()):
            again = record.unreachable or (retry_errors and record.errors)
            if not again:
                with contextlib.suppress(OSError):
                    if sha256(self.file(part)) == record.sha256:
                        continue
                logger.warning("%s is damaged: it is computed again", self.file(part))
            del records[part]
        return records, [part for part in mine if part not in records]

    def summary(self, records: Mapping[int, PartRecord], *, before: int) -> JobSummary:
        """Return what there is of a shard.

        Args:
            records: Its finished parts.
            before: Images that were done when this process began.
        """
        values = records.values()
        counts = ("images", "objects", "errors", "unreachable", "changed")
        return JobSummary(
            folder=self.folder,
            **{name: sum(getattr(record, name) for record in values) for name in counts},
            failures=tuple(text for record in values for text in record.failures)[:_NAMED_FAILURES],
            before=before,
            unfinished=len(self.offsets) - len(self.finished().keys() | records.keys()),
        )


def open_job(
    folder: Path,
    sources: Sequence[str],
    *,
    identity: Mapping[str, Any],
    parts: PartFormat,
    part_images: int | None = None,
    largest: int = LARGEST_PART,
    stdin: Path | None = None,
    overwrite: bool = False,
    choose: Choose | None = None,
    request: str = "",
    shard: Shard | None = None,
    hint: str = "give another folder with --output, or replace the job that is there: --overwrite",
    progress: Progress = SILENT,
) -> Job:
    """Continue the job of a folder, or plan one where there is none; of several processes that come at once one plans.

    Images are found one after the other and written to the plan, so that memory does not grow with their number; names that
    were there before are found by their digests in a temporary SQLite table on the disk, whose cache is bounded.

    Args:
        folder: Of the job; made when it is not there.
        sources: As for `stream_images`.
        identity: What is computed: digests of detector and vocabulary, settings; values that JSON has. A folder with a job
            of another identity is refused. ``settings`` of `InferenceConfig` that came after the job was planned count as its
            defaults.
        parts: How results are written.
        part_images: Images in a part; None: ``largest``, fewer in a job of less than 64 such parts.
        largest: Most images in a part.
        stdin: The list that came on stdin, where ``-`` is among the sources.
        overwrite: Plan one in any case; the job that is there is removed (`remove_job`) when the new one's images are found.
        choose: Yields those of the images that the job is to do, and counts others; what it does at its end is done before the
            plan counts. None: all.
        request: What asks for the job, for `finished_job`; empty: that does not know it.
        shard: Drop a plan that has no part for this shard, and return a job without parts, whose digest is empty. None: keep it.
        hint: What to do where the folder has another job.
        progress: Where planning is shown.

    Raises:
        ConfigError: The folder has a job that computes something else, or from other sources, or results without their job.
        DataError: As of `stream_images`; no images were found; the plan is not the one that the job was planned with.
        LockedError: A process runs the job that is to be replaced.
        RuntimeEnvironmentError: The folder cannot be written to.
    """
    root = os.getcwd()  # noqa: PTH109 what names are joined with
    stated = {
        "identity": json.loads(json.dumps(identity)),
        "results": parts.name,
        "sources": _places(sources, root, stdin),
    }
    path = folder / MANIFEST
    planned = False
    unused: Job | None = None

    def build(_: Path) -> None:
        nonlocal planned, unused
        planned = True
        if overwrite:
            require_idle(folder)
        elif (strays := next(_files(folder), None)) is not None:
            raise ConfigError(
                f"{strays} belongs to a job whose {MANIFEST} is missing",
                hint="put it back, give another folder with --output, or replace what is there: --overwrite",
                path=folder,
            )
        step = part_images or min(_SMALLEST_PART, largest)
        left_out: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        images = duplicates = size = place = 0
        starts = array("q")
        target = folder / "images.jsonl"
        digest = hashlib.sha256()

        def found(is_new: Callable[[str], bool]) -> Iterator[SourceImage]:
            nonlocal duplicates
            try:
                for image in stream_images(sources, left_out, stdin=stdin):
                    task.advance()
                    if is_new(image.name):
                        yield image
                    else:
                        duplicates += 1
            except OSError as error:
                raise RuntimeEnvironmentError(
                    f"the images cannot be listed: {error}",
                    hint="check the disk that they are on, and that of temporary files, and run the same command again",
                ) from error

        with (
            progress.task("finding images", unit="images") as task,
            _first_seen(folder, root) as is_new,
            staged(target) as temporary,
            write_errors(target),
            temporary.open("wb") as file,
        ):
            for image in found(is_new) if choose is None else choose(found(is_new), counts):
                if images % step == 0:
                    starts.append(place)
                line = json.dumps(image).encode() + b"\n"
                file.write(line)
                digest.update(line)
                images, size, place = images + 1, size + (image.size or 0), place + len(line)
            if images == 0 and not counts:
                raise DataError("no images were found", hint="name files, folders or patterns")
            if overwrite:
                remove_job(folder)
        # Some dozens of parts at least, and of no more than so many images.
        steps = max(1, min(part_images or largest, -(-images // 64)) // step)
        write_json(
            path,
            {
                "format": _FORMAT,
                "proxydet": __version__,
                **stated,
                "request": request,
                "root": root,
                "images": images,
                "bytes": size,
                "duplicates": duplicates,
                "left_out": dict(left_out),
                "counts": dict(counts),
                "part_images": step * steps,
                "plan_sha256": digest.hexdigest(),
                "offsets": starts[::steps].tolist(),
                "number": uuid.uuid4().hex,
            },
        )
        if shard is not None and len((job := load_job(folder, parts)).offsets) <= shard.index:
            unused = dataclasses.replace(job, offsets=(), digest="", planned=True)
            path.unlink()  # before others see it: they wait for the lock of the plan

    if overwrite:
        with Lock(path.with_name(f"{path.name}.lock")):  # that of build_once
            build(path)
    else:
        build_once(path, build)
    if unused is not None:
        return unused
    content = _manifest(folder, hint)
    there: dict[str, Any] = {name: content.get(name) for name in stated}
    settings, mine = (
        place["identity"].get("settings") if isinstance(place["identity"], dict) else None
        for place in (there, stated)
    )
    if isinstance(settings, dict) and isinstance(mine, dict):
        filled = with_later_settings(settings, mine)
        there["identity"] = {**there["identity"], "settings": filled}
    if there != stated:
        was, now = _flat(there), _flat(stated)
        differing = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        raise ConfigError(
            f"the folder {folder} has a job with other {first_of(differing)}"
            if differing == ["sources"]
            else f"the folder {folder} has a job with another {first_of(differing)}",
            hint=hint,
            path=path,
        )
    if part_images not in (None, content["part_images"]):
        raise ConfigError(
            f"the job in {folder} has parts of {content['part_images']} images, not {part_images}",
            hint="leave the size of parts out to continue it",
            path=path,
        )
    plan = folder / "images.jsonl"
    with read_errors(plan, hint=f"put it back; or {hint}", error=DataError):
        if not planned and sha256(plan) != content["plan_sha256"]:
            raise ValueError("the plan changed after the job started")
    return dataclasses.replace(load_job(folder, parts), planned=planned)


def _places(sources: Sequence[str], root: str, stdin: Path | None) -> list[str]:
    """Return sources as a manifest has them: absolute, lists with their digests."""
    places = []
    for source in sources:
        listed = stdin if source == "-" else Path(source[1:]) if source.startswith("@") else None
        if listed is not None and not os.path.lexists(source) and listed.is_file():
            places.append(f"{source}: {sha256(listed)}")
        else:
            local = "://" not in source or os.path.lexists(source)
            places.append(os.path.join(root, source) if local else source)  # noqa: PTH118
    return places


def _manifest(folder: Path, hint: str) -> dict[str, Any]:
    path = folder / MANIFEST
    content = read_json(path, what="job", hint=hint, error=DataError)
    if content.get("format") != _FORMAT:
        raise DataError(f"{path} is not a job of this version of proxydet", hint=hint, path=path)
    return content


def load_job(folder: Path, parts: PartFormat) -> Job:
    """Return the job of a folder, as it was planned.

    Args:
        folder: Of the job.
        parts: How results are written.

    Raises:
        DataError: There is none, or its manifest is damaged.
    """
    content = _manifest(folder, "put it back")
    names = ("identity", "results", "root", "offsets", "plan_sha256")
    try:
        # Of two plans of the same images each is a job of its own; an earlier version did not number them.
        named = {name: content[name] for name in names + ("number",) * ("number" in content)}
        return Job(
            folder=folder,
            parts=parts,
            images=content["images"],
            duplicates=content["duplicates"],
            left_out=Counter(content["left_out"]),
            counts=Counter(content.get("counts")),
            root=content["root"],
            offsets=content["offsets"],
            digest=hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest(),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / MANIFEST} is damaged: {type(error).__name__}: {error}",
            hint="put it back",
            path=folder / MANIFEST,
        ) from error


def finished_job(
    folder: Path,
    sources: Sequence[str],
    *,
    request: str,
    parts: PartFormat,
    shard: Shard,
    retry_errors: bool = False,
) -> tuple[Job, JobSummary] | None:
    """Return a job, and what there is of a shard, where the same request made it and nothing is to be computed; else None.

    Nothing has to be opened for it that computes.

    Args:
        folder: Of the job.
        sources: As for `open_job`; with a list on stdin it is not looked for.
        request: As of `open_job`.
        parts: How results are written.
        shard: Which parts.
        retry_errors: As of `run_job`.
    """
    try:
        content = _manifest(folder, "")
        places = None if "-" in sources else _places(sources, os.getcwd(), None)  # noqa: PTH109
        same = content.get("results") == parts.name and content.get("sources") == places
        if not (request and content.get("request") == request and same):
            return None
        job = load_job(folder, parts)
        if sha256(folder / "images.jsonl") != content["plan_sha256"]:
            return None
        records, todo = job.begun(shard, retry_errors=retry_errors)
    except (DataError, OSError, KeyError):
        return None
    if todo:
        return None
    return job, job.summary(records, before=sum(record.images for record in records.values()))


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{above}.{key}" if above and above != "identity" else key
        flat.update(_flat(item, name) if isinstance(item, Mapping) else {name: item})
    return flat


@contextlib.contextmanager
def _first_seen(folder: Path, root: str) -> Iterator[Callable[[str], bool]]:
    """Give a function that says whether a name comes for the first time: relative and absolute, ``./a`` and ``a`` are one."""
    path = folder / ".seen.sqlite"  # under the lock of the plan: nobody else's
    with write_errors(path):
        path.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as table:
            for setting in ("journal_mode = off", "synchronous = off", "cache_size = -65536"):
                table.execute(f"pragma {setting}")
            table.execute("create table seen (digest blob primary key) without rowid")
            table.execute("begin")

            def is_new(name: str) -> bool:
                full = name if "://" in name else os.path.join(root, Path(name))  # noqa: PTH118
                key = hashlib.blake2b(full.encode("utf-8", "surrogateescape"), digest_size=16)
                added = table.execute("insert or ignore into seen values (?)", (key.digest(),))
                return added.rowcount == 1

            yield is_new
    except sqlite3.Error as error:
        raise RuntimeEnvironmentError(
            f"images that are named twice cannot be found, with a table in {folder}: {error}",
            hint="free some space, or choose another folder with --output",
            path=path,
        ) from error
    finally:
        path.unlink(missing_ok=True)


def remove_job(folder: Path) -> None:
    """Remove the job of a folder, its results included; other files stay.

    Raises:
        LockedError: A process runs a shard of it.
        RuntimeEnvironmentError: A file cannot be removed.
    """
    require_idle(folder)
    with write_errors(folder / MANIFEST):
        (folder / MANIFEST).unlink(missing_ok=True)  # first: without it nothing else counts
        for path in [*_files(folder), *(folder / "shards").glob("*-of-*")]:
            path.unlink(missing_ok=True)
        (folder / "images.jsonl").unlink(missing_ok=True)


def remove_remains(folder: Path) -> None:
    """Remove results whose manifest is gone: those of a job whose removal was interrupted.

    Raises:
        LockedError: A process runs a shard of it.
        RuntimeEnvironmentError: A file cannot be removed.
    """
    # No job is planned next to results, so what is seen here without a manifest stays without.
    if next(_files(folder), None) is not None and not (folder / MANIFEST).exists():
        remove_job(folder)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the ledgers, and the parts, those that a killed process left incomplete among them."""
    for pattern in ("finished/*-of-*.jsonl", "parts/[0-9]*.*", "parts/.[0-9]*.*"):
        yield from folder.glob(pattern)


def require_idle(folder: Path) -> None:
    """Make sure that no process runs a shard of the job of a folder.

    Raises:
        LockedError: One does.
    """
    for lock in (folder / "shards").glob("*.lock"):
        Lock(lock, subject=f"the job in {folder}").require_free()


# --- Running -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSummary:
    """What there is of a shard when it has been run.

    Attributes:
        folder: Of the job.
        images: Images of the shard, all of them done.
        objects: Detections in them.
        errors: Images that could not be read: rows with an error.
        unreachable: Those of them that a store did not hand out; they are tried again when the job is continued.
        changed: Images that changed between planning and running.
        failures: Messages of the first few errors.
        before: Images that were done when this process began.
        unfinished: Parts of the job that belong to other shards and are not done yet.
    """

    folder: Path
    images: int
    objects: int
    errors: int
    unreachable: int
    changed: int
    failures: tuple[str, ...]
    before: int
    unfinished: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How parts are computed; another choice computes the same images.

    Attributes:
        batch_size: Images in the network at once.
        max_errors: End the job where more images cannot be read; None: never.
        workers: Processes of this machine, or actors of Ray.
        threads: Threads of each; None: those of this process, divided among the workers.
        gpus: GPUs that each actor of Ray takes.
    """

    batch_size: int = 4
    max_errors: int | None = None
    workers: int = 1
    threads: int | None = None
    gpus: float = 0


def run_job(
    job: Job,
    open_work: OpenWork,
    *,
    options: RunOptions | None = None,
    shard: Shard | None = None,
    engine: str = "processes",
    retry_errors: bool = False,
    task: str = "predicting",
    progress: Progress = SILENT,
) -> JobSummary:
    """Compute the parts of a shard that are not finished.

    Args:
        job: What `open_job` returned.
        open_work: Opens the detector in each process; in this one where there is one worker.
        options: How parts are computed.
        shard: Which parts; None: all.
        engine: ``processes`` of this machine, or actors of ``ray``.
        retry_errors: Compute parts again that have images which could not be read.
        task: What progress calls it.
        progress: Where progress is shown.

    Raises:
        ConfigError: A number is out of range.
        LockedError: Another process runs this shard, or one of another number of shards.
        DataError: More images cannot be read than may.
        UnreachableError: A store handed out no image of a part.
        RuntimeEnvironmentError: Results cannot be written, or workers keep being killed.
        JobInterruptedError: Ctrl-C or SIGTERM; finished parts stay.
    """
    shard, options = shard or Shard(), options or RunOptions()
    for name, value in (("batch size", options.batch_size), ("number of workers", options.workers)):
        if value < 1:
            raise ConfigError(f"the {name} is {value}; it must be at least 1")
    lock = _shard_lock(job.folder, shard)
    lock.acquire(wait=False)
    try:
        for other in (job.folder / "shards").glob("*-of-*.lock"):
            count = other.stem.rpartition("-")[2]
            if count != str(shard.count):
                Lock(
                    other,
                    subject=f"the job in {job.folder}, cut into {count} shards,",
                    hint=f"wait for it to end, or run one of its shards: --shard 1/{count}",
                ).require_free()
        records, todo = job.begun(shard, retry_errors=retry_errors)
        before = sum(record.images for record in records.values())
        size = len(job.plan(0)) if job.offsets else 0
        total = min(len(range(shard.index, len(job.offsets), shard.count)) * size, job.images)
        ledger = JsonLines(job.folder / "finished" / f"{lock.path.stem}.jsonl")
        with (
            progress.task(task, total=total, unit="images", done=before) as shown,
            _stopped_by_sigterm() as stopped,
        ):
            try:
                results: Results
                if engine == "ray":
                    results = _on_ray(job, todo, open_work, options, shown.advance)
                elif min(options.workers, len(todo)) > 1:
                    results = _in_processes(job, todo, open_work, options, shown.advance)
                else:
                    work = open_work(0) if todo else None
                    results = (run_part(job, n, work, options, shown.advance) for n in todo if work)
                with closing(results):
                    for record in results:
                        lock.check()
                        ledger.append(msgspec.to_builtins(record))
                        records[record.part] = record
                        texts = (text for each in records.values() for text in each.failures)
                        errors = sum(each.errors for each in records.values())
                        _check_errors(errors, next(texts, ""), options.max_errors)
            except KeyboardInterrupt as error:
                done = sum(record.images for record in records.values())
                raise JobInterruptedError(
                    f"stopped after {done} images; their results are in {job.folder / 'parts'}",
                    signal_number=stopped[0] if stopped else 2,
                    hint="run the same command again to continue",
                ) from error
    finally:
        lock.release()
    return job.summary(records, before=before)


def _shard_lock(folder: Path, shard: Shard) -> Lock:
    return Lock(
        folder / "shards" / f"{shard.index}-of-{shard.count}.lock",
        subject=f"shard {shard} of the job in {folder}",
        hint="wait for it to end, or run another shard",
    )


def require_free(folder: Path, shard: Shard) -> None:
    """Make sure that no other process runs a shard, where there is a job.

    Raises:
        LockedError: One does.
    """
    _shard_lock(folder, shard).require_free()


def _check_errors(errors: int, first: str, most: int | None) -> None:
    if most is not None and errors > most:
        raise DataError(
            f"more images than --max-errors {most} cannot be read: {first}",
            hint="inspect them, and continue with a larger --max-errors; what is finished stays",
        )


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt for SIGTERM, which schedulers send before they kill, and note that in the list."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def run_part(
    job: Job,
    part: int,
    work: ImageWork,
    options: RunOptions,
    advance: Callable[[], object] = lambda: None,
) -> PartRecord:
    """Compute one part and write its file.

    Args:
        job: The job.
        part: Number of the part.
        work: What is done with an image.
        options: How.
        advance: Called for each image.

    Raises:
        UnreachableError: A store handed out none of the images.
        DataError: More images cannot be read than may.
        RuntimeEnvironmentError: The file cannot be written.
    """
    images = job.plan(part)
    errors: list[str] = []
    unreachable = changed = 0

    def read(image: SourceImage) -> tuple[bool, Any]:
        return image.changed(job.root), work.read(image, job.root)

    def rows() -> Iterator[Row]:
        nonlocal unreachable, changed
        for image, made in results:
            advance()
            if isinstance(made, DataError):
                errors.append(made.message)
                unreachable += isinstance(made, UnreachableError)
                _check_errors(len(errors), errors[0], options.max_errors)
                yield Row(image, None, made.message)
            else:
                (other, _), content = made
                changed += other
                yield Row(image, content, None)

    target = job.file(part)
    remote = any("://" in image.name for image in images)
    running = run_images(
        images,
        read,
        lambda batch: work.run([own for _, own in batch]),
        batch_size=1 if work.large else options.batch_size,
        shape=None if work.large else lambda made: work.shape(made[1]),
        readers=_STORE_READERS if remote and not work.large else READERS,
    )
    with staged(target) as temporary, closing(running) as results, write_errors(target):
        objects = job.parts.write(temporary, rows())
        if unreachable == len(images):
            raise UnreachableError(
                f"no image of part {part} could be read: {errors[0]}",
                hint="check the connection and the store's credentials, and run the same command again to continue",
            )
        return PartRecord(
            part=part,
            job=job.digest,
            images=len(images),
            objects=objects,
            errors=len(errors),
            unreachable=unreachable,
            changed=changed,
            bytes=temporary.stat().st_size,
            sha256=sha256(temporary),
            failures=tuple(errors[:_NAMED_FAILURES]),
        )


# --- Engines: where parts are computed -----------------------------------------------------------------------------------

Results: TypeAlias = Generator[PartRecord, None, None]


def _threads(options: RunOptions) -> int:
    """Return the threads of a worker. What needs no torch loads none here."""
    torch = sys.modules.get("torch")
    here = (os.cpu_count() or 1) if torch is None else torch.get_num_threads()
    return options.threads or max(1, here // options.workers)


def _limit_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # where torch is loaded later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def load_ahead(module: str) -> ForkServerContext | SpawnContext:
    """Start the process that workers are forked from: it loads modules once, and while this process does other things.

    Args:
        module: What they need, such as that of the `OpenWork`.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    ensure_running()
    return context


def _in_processes(
    job: Job,
    parts: Sequence[int],
    open_work: OpenWork,
    options: RunOptions,
    advance: Callable[..., object],
) -> Results:
    """Keep worker processes busy with a part each; one that is killed is replaced, and its part computed again."""
    context = load_ahead(getattr(open_work, "__module__", ""))
    threads = _threads(options)
    todo = list(reversed(parts))
    deaths: Counter[int] = Counter()
    workers: dict[Connection, tuple[Any, int, int]] = {}  # process, its number, its part

    def start(number: int) -> None:
        ours, theirs = context.Pipe()
        arguments = (theirs, ours, job, open_work, number, threads, options)
        process = context.Process(target=_worker, args=arguments, daemon=True)
        process.start()
        theirs.close()
        give(ours, process, number)

    def give(connection: Connection, process: Any, number: int) -> None:
        workers[connection] = (process, number, todo.pop())
        with contextlib.suppress(OSError):  # it has ended: so its next message says, too
            connection.send(workers[connection][2])

    def end(connection: Connection) -> tuple[Any, int, int]:
        process, number, part = workers.pop(connection)
        connection.close()
        process.terminate()
        process.join()
        return process, number, part

    try:
        for number in range(min(options.workers, len(parts))):
            start(number)
        while workers:
            for ready in wait(list(workers)):
                assert isinstance(ready, Connection)
                try:
                    message = ready.recv()
                except (EOFError, OSError):
                    process, number, part = end(ready)
                    deaths[part] += 1
                    if deaths[part] >= _MOST_DEATHS:
                        first = job.plan(part)[0].name
                        raise RuntimeEnvironmentError(
                            f"part {part}, which begins with {first}, ended its worker process "
                            f"{_MOST_DEATHS} times (exit code {process.exitcode})",
                            hint="-9 mostly means that memory was short: use fewer --workers or a smaller --batch-size",
                        ) from None
                    logger.warning(
                        "a worker process ended (exit code %s); part %d is computed again",
                        process.exitcode,
                        part,
                    )
                    todo.append(part)
                    start(number)
                    continue
                if isinstance(message, int):
                    advance(message)
                elif isinstance(message, Exception):
                    raise message
                else:
                    yield message  # into the ledger first, whatever becomes of the worker
                    process, number, _ = workers[ready]
                    if todo:
                        give(ready, process, number)
                    else:
                        end(ready)
    finally:
        for connection in list(workers):
            end(connection)


def _worker(
    connection: Connection,
    parents: Connection,
    job: Job,
    open_work: OpenWork,
    number: int,
    threads: int,
    options: RunOptions,
) -> None:
    """Compute the parts that come through a connection, in a process of its own, for as long as its parent lives."""
    parents.close()  # else its own copy would keep the connection open after the parent's end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _limit_threads(threads)
    images = 0

    def advance() -> None:
        nonlocal images
        images += 1
        if images % 8 == 0:
            connection.send(8)

    try:
        work = open_work(number)
        while True:
            record = run_part(job, connection.recv(), work, options, advance)
            connection.send(images % 8)
            images = 0
            connection.send(record)
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 raised in the parent
        known = isinstance(error, ProxydetError | MemoryError | OSError)
        connection.send(error if known else RuntimeError(f"{type(error).__name__}: {error}"))


class _RayWorker:
    def __init__(self, folder: str, job: Job, open_work: OpenWork, options: RunOptions) -> None:
        os.chdir(folder)
        _limit_threads(options.threads or 1)
        self._job, self._options, self._work = job, options, open_work(0)

    def run(self, part: int) -> PartRecord:
        return run_part(self._job, part, self._work, self._options)


def _on_ray(
    job: Job,
    parts: Sequence[int],
    open_work: OpenWork,
    options: RunOptions,
    advance: Callable[..., object],
) -> Results:
    """Give the parts to actors of Ray, of the cluster that RAY_ADDRESS names or of this machine; Ray restarts them."""
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise MissingDependencyError(
            f"--engine ray needs the package ray, which cannot be imported: {error}",
            hint="run: pip install 'proxydet[ray]' (or: pip install 'ray[data]')",
        ) from error
    threads = _threads(options)
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        actor = ray.remote(_RayWorker).options(
            num_cpus=threads, num_gpus=options.gpus, max_restarts=-1, max_task_retries=_MOST_DEATHS
        )
        split = dataclasses.replace(options, threads=threads)
        place = dataclasses.replace(job, folder=job.folder.absolute())
        actors = [
            actor.remote(job.root, place, open_work, split)
            for _ in range(min(options.workers, len(parts)))
        ]
        pool = ActorPool(actors)
        for record in pool.map_unordered(lambda worker, part: worker.run.remote(part), parts):
            advance(record.images)
            yield record
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (
            cause
            if isinstance(cause, ProxydetError)
            else RuntimeEnvironmentError(
                f"an actor of Ray failed: {str(cause)[:2000]}",
                hint="the log of the actor is in Ray's dashboard; run the same command again to continue",
            )
        ) from error
    except ray.exceptions.RayError as error:
        raise RuntimeEnvironmentError(
            f"Ray failed: {str(error)[:2000]}", hint="run the same command again to continue"
        ) from error
    finally:
        if started:
            ray.shutdown()
