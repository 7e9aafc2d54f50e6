"""``proxydet download``: checkpoints, data sets and metadata, fetched, checked and unpacked."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar
from urllib.parse import urlsplit

import typer

from proxydet.wording import counted, size_text
from proxydet_cli.options import DryRun, Json, Yes, command_app, examples, panel
from proxydet_cli.output import Output, aligned

if TYPE_CHECKING:
    from proxydet.artifacts import Catalogue, Downloader, Item, Plan

app = command_app()

_DEFAULT = "r50"
_act, _files, _transfer = panel("What to do"), panel("Files"), panel("Transfer")

Row = Mapping[str, object]


@app.command(
    epilog=examples(
        "proxydet download",
        "proxydet download boxsup-swinb lvis coco --root /data --yes",
        "proxydet download eval --dry-run",
        "proxydet download --list",
        "proxydet download --verify",
    )
)
def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="What to download; without a name, what train --backbone r50 needs.",
        ),
    ] = None,
    list_: Annotated[
        bool, _act("--list", help="Show everything that can be fetched, or what is named.")
    ] = False,
    dry_run: DryRun = False,
    verify: Annotated[
        bool, _act("--verify", help="Read what is there through again; fetch nothing.")
    ] = False,
    root: Annotated[
        Path | None, _files(help="Folder for models and datasets, instead of the working folder.")
    ] = None,
    jobs: Annotated[int, _transfer(min=1, max=64, help="Files fetched at a time.")] = 2,
    connections: Annotated[
        int, _transfer(min=1, max=64, help="Connections for one large file.")
    ] = 4,
    limit_rate: Annotated[
        str | None, _transfer(help="Bytes a second in all, such as 800k or 20M.")
    ] = None,
    mirror: Annotated[
        str | None,
        _transfer(envvar="PROXYDET_MIRROR", help="Address to try first, laid out like the folder."),
    ] = None,
    catalogue: Annotated[
        list[Path] | None, _files(help="A file with further entries; may be given several times.")
    ] = None,
    strict: Annotated[
        bool, _files("--strict", help="Refuse files without a published or recorded digest.")
    ] = False,
    force: Annotated[
        bool, _files("--force", help="Replace files that are there and wrong.")
    ] = False,
    keep_archives: Annotated[
        bool, _files("--keep-archives", help="Keep archives after unpacking them.")
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Download checkpoints, data sets and metadata: resumable, verified, put where the other commands expect them.

    Shows first what is needed, what is there, sizes, free room, licences and what needs an account, and asks once.
    Run the same command again after any interruption: what was fetched is kept.
    """
    from proxydet.artifacts import (
        Catalogue,
        Downloader,
        DownloadOptions,
        TransferSettings,
        bytes_per_second,
    )
    from proxydet.errors import ConfigError
    from proxydet_cli.progress import show_progress

    output, known = Output(json=json), Catalogue.load(catalogue or ())
    if list_:
        _list(known, names or [], output)
        return
    try:
        rate = None if limit_rate is None else bytes_per_second(limit_rate)
    except ConfigError as error:  # one of the command line, as of --jobs
        raise typer.BadParameter(
            f"{error.message} {error.hint or ''}".rstrip(), param_hint="--limit-rate"
        ) from None
    options = DownloadOptions(
        root=root,
        strict=strict,
        force=force,
        keep_archives=keep_archives,
        settings=TransferSettings(
            connections=connections, jobs=jobs, limit_rate=rate, mirror=mirror
        ),
    )
    with _stoppable(), Downloader(known, options, show_progress()) as downloader:
        if verify:
            _verify(downloader, names or [], output)
            return
        plan = downloader.ask_sizes(downloader.plan(names or [_DEFAULT]))
        if not dry_run:
            _fetch(downloader, plan, names or [], output, asked=not yes)
            return
        value = {
            "files": _plan_rows(plan),
            "bytes_to_fetch": plan.bytes_to_fetch,
            "unknown_sizes": plan.unknown_sizes,
            "room": [vars(need) for need in plan.needs],
        }
        output.data(value, _plan_text(plan))
        for name, (what, how) in _account_notes(plan).items():
            output.message(f"{name}: {what} {how}")


def _list(catalogue: Catalogue, names: list[str], output: Output) -> None:
    """Show one row a name: what it is, its size, licence, and what is known of its digest."""
    catalogue.resolve(names)
    rows: list[Row] = []
    shown: list[Row] = []
    for name in (*catalogue.groups, *catalogue.families, *catalogue.artifacts):
        if name not in names and names:
            continue
        artifacts = catalogue.resolve([name])
        kind = "group" if name in catalogue.groups else "file" if len(artifacts) == 1 else "family"
        pinned = sum(artifact.pinned for artifact in artifacts)
        size = _sum(artifact.size for artifact in artifacts)
        digest = "published" if pinned == len(artifacts) else "partly" if pinned else "none"
        account = any(artifact.login is not None for artifact in artifacts)
        licence, title = artifacts[0].licence if kind != "group" else "", catalogue.titles[name]
        row: Row = {"name": name, "kind": kind, "files": len(artifacts), "bytes": size, "digest": digest,
                    "account": account, "licence": licence, "title": title}  # fmt: skip
        rows.append(row)
        about = {
            "size": _size(size),
            "digest": digest if kind != "group" else "",
            "account": "needed" if account else "",
            "what": title + (f" [{licence}]" if licence else ""),
        }
        shown.append({"name": name, "files": len(artifacts), **about})
    output.data(rows, aligned(shown))


T = TypeVar("T")


def with_downloads(action: Callable[[], T], *, also: Sequence[str] = (), yes: bool) -> T:
    """Do something; where it fails for want of downloads, fetch them after one question and do it again.

    Without ``yes``, and where nobody can be asked, the error names everything that is missing.

    Args:
        action: What to do; its errors name missing downloads in ``needs``.
        also: Further downloads that will be needed, fetched in the same go.
        yes: Do not ask.

    Raises:
        ProxydetError: It failed for another reason, or what it needs was not downloaded.
    """
    from proxydet.errors import ProxydetError

    fetched: set[str] = set()
    while True:
        try:
            return action()
        except ProxydetError as error:
            if not error.needs or fetched.issuperset(error.needs):
                raise
            from proxydet.artifacts import Catalogue, Downloader, DownloadOptions
            from proxydet_cli.progress import show_progress

            needs = list(dict.fromkeys((*error.needs, *also)))
            fetched.update(needs)
            with (
                _stoppable(),
                Downloader(Catalogue.load(), DownloadOptions(), show_progress()) as downloader,
            ):
                plan = downloader.plan(needs)
                missing = [name for name in needs if downloader.plan([name]).todo] or needs
                error.hint = f"run: proxydet download {' '.join(missing)}; --yes does so first"
                if not yes and not sys.stdin.isatty():
                    raise
                output = Output()
                output.message(error.message)
                if not _agreed(downloader.ask_sizes(plan), output, asked=not yes):
                    raise
                downloader.fetch(plan).raise_for_failures()


def _agreed(plan: Plan, output: Output, *, asked: bool) -> bool:
    """Show a plan and, where asked for, whether the user wants it.

    Raises:
        ConfigError: Nobody can be asked.
        JobInterruptedError: Ctrl-C, or Ctrl-D, in place of an answer.
        DiskFullError: There is no room for it.
    """
    output.message(_plan_text(plan))
    plan.require_room()
    return not asked or output.agreed("the download", nothing="Nothing was fetched.")


def _fetch(downloader: Downloader, plan: Plan, names: list[str], output: Output, *, asked: bool) -> None:  # fmt: skip
    from proxydet.errors import ArtifactError

    if plan.todo and not _agreed(plan, output, asked=asked):
        return
    report = downloader.fetch(plan)
    value = {
        "files": [vars(outcome) for outcome in report.outcomes],
        "failed": [
            {"name": name, "error": error.message} for name, error in report.failures.items()
        ],
    }
    ready = sum(outcome.status == "ready" for outcome in report.outcomes)
    rows = [
        {
            "status": outcome.status,
            "name": outcome.name,
            "size": size_text(outcome.bytes_fetched) if outcome.bytes_fetched else "",
            "path": outcome.path,
            "note": outcome.note,
        }
        for outcome in report.outcomes
        if outcome.status not in ("ready", "needs account")
    ]
    lines = ([aligned(rows)] if rows else []) + [f"{ready} ready before"] * (ready > 0)
    output.data(value, "\n".join(lines) or "nothing was done")
    report.raise_for_failures()
    for name, (what, how) in _account_notes(plan).items():
        if any(given.partition("/")[0] == name for given in names):  # asked for by its own name
            raise ArtifactError(f"{name}: {what}", hint=how)
        output.warning(f"{name}: {what} {how}")


def _verify(downloader: Downloader, names: list[str], output: Output) -> None:
    from proxydet.errors import DigestError

    rows: list[Row] = [
        {"verdict": f.status, "name": f.name, "path": str(f.path), "detail": f.note}
        for f in downloader.verify(names)
    ]
    root = downloader.options.root
    output.data(rows, aligned(rows) if rows else f"nothing is there ({root or Path.cwd()})")
    wrong = [str(row["name"]) for row in rows if row["verdict"] in ("damaged", "absent")]
    if wrong:
        force = " --force" if any(row["verdict"] == "damaged" for row in rows) else ""
        where = "" if root is None else f" --root {shlex.quote(str(root))}"
        raise DigestError(
            f"{len(wrong)} of {counted(len(rows), 'file')} damaged or absent: {', '.join(wrong[:5])}.",
            hint=f"Run: proxydet download{force} {' '.join(wrong[:5])}{where}",
        )


@contextmanager
def _stoppable() -> Iterator[None]:
    from proxydet.errors import JobInterruptedError

    try:
        yield
    except KeyboardInterrupt:
        raise JobInterruptedError(
            "Stopped. What was fetched is kept.", hint="Run the same command again to continue."
        ) from None


def _plan_rows(plan: Plan) -> list[Row]:
    """Return one row a file, the members of a family in one: state, bytes to fetch, licence, account."""
    rows: list[Row] = []
    for name, items in _by_family(plan).items():
        first = items[0]
        counts = Counter(item.state.value for item in items)
        state = ", ".join(f"{n} {s}" for s, n in counts.items()) if len(counts) > 1 else first.state.value  # fmt: skip
        why = first.why if len(items) == 1 and state != "needs account" else ""
        rows.append(
            {
                "name": name,
                "files": len(items),
                "state": f"{state} ({why})" if why else state,
                "to fetch": None if state == "needs account" else _sum(i.to_fetch for i in items),
                "licence": first.artifact.licence,
                "account": first.artifact.login.site if first.artifact.login is not None else None,
                "path": str(first.path if len(items) == 1 else first.path.parent),
            }
        )
    return rows


def _plan_text(plan: Plan) -> str:
    """Lay out a plan: the rows, their licences, what is to be fetched in all, and the room it takes."""
    rows = _plan_rows(plan)
    columns = ("name", "files", "state", "to fetch", "account")
    shown = [
        {**row, "to fetch": _size(row["to fetch"]), "account": urlsplit(str(row["account"] or "")).hostname or ""}
        for row in rows
    ]  # fmt: skip
    licences: dict[object, list[str]] = {}  # too long for a column
    for row in rows:
        licences.setdefault(row["licence"], []).append(str(row["name"]))
    unknown = f"{counted(plan.unknown_sizes, 'file')} of unknown size" if plan.unknown_sizes else ""
    known = size_text(plan.bytes_to_fetch) if plan.bytes_to_fetch or not unknown else ""
    lines = [
        aligned(shown, columns),
        "",
        "licences:",
        *(f"  {', '.join(under)}: {licence}" for licence, under in licences.items()),
        "",
        f"to fetch: {' and '.join(filter(None, [known, unknown]))}",
    ]
    for need in plan.needs:
        room = f"{size_text(need.needed)}{' or more' if unknown else ''} needed, {size_text(need.free)} free"
        short = ": not enough" if need.needed > need.free else ""
        lines.append(f"room in {need.folder}: {room}{short}")
    return "\n".join(lines)


def _account_notes(plan: Plan) -> dict[str, tuple[str, str]]:
    """Return what cannot be fetched without an account, and what to do, by the name of the file or family."""
    notes: dict[str, tuple[str, str]] = {}
    for name, items in _by_family(plan).items():
        login = items[0].artifact.login
        locked = sum(item.state.value == "needs account" for item in items)
        if login is not None and locked:
            need = "needs" if len(items) == 1 else "need"
            what = f"{locked} of {counted(len(items), 'file')} {need} an account at {login.site}."
            notes[name] = (what, login.how)
    return notes


def _by_family(plan: Plan) -> dict[str, list[Item]]:
    rows: dict[str, list[Item]] = {}
    for item in plan.items:
        rows.setdefault(item.artifact.name.partition("/")[0], []).append(item)
    return rows


def _sum(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if None in known else sum(size or 0 for size in known)


def _size(value: object) -> str:

    return size_text(value if isinstance(value, int) else None).rjust(8)
