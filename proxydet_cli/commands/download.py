"""``proxydet download``: checkpoints, data sets and metadata, fetched, checked and unpacked."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.options import DryRun, Json, Yes, command_app, examples

if TYPE_CHECKING:
    from proxydet.artifacts.catalogue import Catalogue
    from proxydet.artifacts.downloader import Downloader
    from proxydet.artifacts.plan import Plan
    from proxydet_cli.output import Output

app = command_app()

_DEFAULT = "r50"


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
        typer.Argument(help="What to fetch; without a name, what train --backbone r50 needs."),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show everything that can be fetched, or what is named.")
    ] = False,
    dry_run: DryRun = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is there through again; fetch nothing.")
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder for models and datasets, instead of the working folder."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Files fetched at a time.")] = 2,
    connections: Annotated[
        int, typer.Option(min=1, max=64, help="Connections for one large file.")
    ] = 4,
    limit_rate: Annotated[
        str | None, typer.Option(help="Bytes a second in all, such as 800k or 20M.")
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            envvar="PROXYDET_MIRROR", help="Address to try first, laid out like the folder."
        ),
    ] = None,
    catalogue: Annotated[
        list[Path] | None,
        typer.Option(help="A file with further entries; may be given several times."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse files without a published or recorded digest.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that are there and wrong.")
    ] = False,
    keep_archives: Annotated[
        bool, typer.Option("--keep-archives", help="Keep archives after unpacking them.")
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Fetch checkpoints, data sets and metadata: resumable, checked, put where the other commands expect them.

    Shows first what is needed, what is there, sizes, free room, licences and what needs an account, and asks once.
    Run the same command again after any interruption: what was fetched is kept.
    """
    from proxydet.artifacts.catalogue import Catalogue
    from proxydet.artifacts.downloader import Downloader, DownloadOptions
    from proxydet.artifacts.settings import TransferSettings
    from proxydet_cli.output import Output
    from proxydet_cli.progress import show_progress

    output, known = Output(json=json), Catalogue.load(catalogue or ())
    if list_:
        _list(known, names or [], output)
        return
    options = DownloadOptions(
        root=root,
        strict=strict,
        force=force,
        keep_archives=keep_archives,
        settings=TransferSettings(
            connections=connections,
            jobs=jobs,
            limit_rate=_rate(limit_rate),
            mirror=mirror,
        ),
    )
    with _stoppable(), Downloader(known, options, show_progress()) as downloader:
        if verify:
            _verify(downloader, names or [], output)
        elif dry_run:
            _show_plan(downloader.ask_sizes(downloader.plan(names or [_DEFAULT])), output)
        else:
            _fetch(downloader, names or [], output, asked=not yes)


def _rate(text: str | None) -> float | None:
    """Read ``--limit-rate``; a value that is none is an error of the command line, as one of ``--jobs`` is."""
    from proxydet.artifacts.settings import bytes_per_second
    from proxydet.errors import ConfigError

    try:
        return None if text is None else bytes_per_second(text)
    except ConfigError as error:
        raise typer.BadParameter(
            f"{error.message} {error.hint or ''}".rstrip(), param_hint="--limit-rate"
        ) from None


def _list(catalogue: Catalogue, names: list[str], output: Output) -> None:
    from proxydet_cli import downloads

    rows = downloads.catalogue_rows(catalogue, names)
    output.data(rows, downloads.catalogue_text(rows))


def _show_plan(plan: Plan, output: Output) -> None:
    from proxydet_cli import downloads

    output.data(downloads.plan_value(plan), downloads.plan_text(plan))
    for name, note in downloads.account_notes(plan).items():
        output.message(f"{name}: {note.what} {note.how}")


def _fetch(downloader: Downloader, names: list[str], output: Output, *, asked: bool) -> None:
    from proxydet_cli import downloads

    plan = downloader.ask_sizes(downloader.plan(names or [_DEFAULT]))
    if plan.todo:
        output.message(downloads.plan_text(plan))
        plan.require_room()
        if asked and not _agreed():
            output.message("Nothing was fetched.")
            return
    report = downloader.fetch(plan)
    output.data(downloads.report_value(report), downloads.report_text(report))
    report.raise_for_failures()
    _tell_of_accounts(plan, names, output)


def _agreed() -> bool:
    """Ask once whether to go on; where nobody can answer, say which option does."""
    from proxydet.errors import ConfigError, Interrupted

    if not sys.stdin.isatty():
        raise ConfigError(
            "Nobody is there to agree to the download.", hint="Add --yes to go on without asking."
        )
    try:
        return typer.confirm("Go on?", default=True, err=True)
    except typer.Abort:  # Ctrl-C or Ctrl-D in place of an answer
        raise Interrupted("Stopped. Nothing was fetched.") from None


def _tell_of_accounts(plan: Plan, names: list[str], output: Output) -> None:
    """Say what could not be fetched without an account; an error if it was asked for by its own name."""
    from proxydet.errors import ArtifactError
    from proxydet_cli import downloads

    for name, note in downloads.account_notes(plan).items():
        if any(asked.partition("/")[0] == name for asked in names):
            raise ArtifactError(f"{name}: {note.what}", hint=note.how)
        output.warning(f"{name}: {note.what} {note.how}")


def _verify(downloader: Downloader, names: list[str], output: Output) -> None:
    from proxydet.errors import DigestError
    from proxydet.wording import counted
    from proxydet_cli import downloads

    rows = downloads.finding_rows(downloader.verify(names))
    root = downloader.options.root
    output.data(
        rows, downloads.aligned(rows) if rows else f"nothing is there ({root or Path.cwd()})"
    )
    wrong = [str(row["name"]) for row in rows if row["verdict"] in ("damaged", "absent")]
    force = " --force" if any(row["verdict"] == "damaged" for row in rows) else ""
    where = "" if root is None else f" --root {shlex.quote(str(root))}"
    if wrong:
        raise DigestError(
            f"{len(wrong)} of {counted(len(rows), 'file')} damaged or absent: {', '.join(wrong[:5])}.",
            hint=f"Run: proxydet download{force} {' '.join(wrong[:5])}{where}",
        )


@contextmanager
def _stoppable() -> Iterator[None]:
    from proxydet.errors import Interrupted

    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped. What was fetched is kept.", hint="Run the same command again to go on."
        ) from None
