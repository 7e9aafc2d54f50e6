"""How plans, results and findings of downloads are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from proxydet.wording import counted, size_text

if TYPE_CHECKING:
    from proxydet.artifacts.artifact import Artifact
    from proxydet.artifacts.catalogue import Catalogue
    from proxydet.artifacts.fetch import Report
    from proxydet.artifacts.look import Item
    from proxydet.artifacts.plan import Plan
    from proxydet.artifacts.verify import Finding

Row = Mapping[str, object]


def catalogue_rows(catalogue: Catalogue, names: Sequence[str] = ()) -> list[Row]:
    """Return one row a name: what it is, its size, licence, and what is known of its digest.

    Args:
        catalogue: What is known.
        names: Which; none for all.

    Raises:
        ConfigError: A name is not in the catalogue.
    """
    catalogue.resolve(names)
    rows: list[Row] = []
    every = (*catalogue.groups, *catalogue.families, *catalogue.artifacts)
    for name in [name for name in every if name in names or not names]:
        artifacts = catalogue.resolve([name])
        kind = "group" if name in catalogue.groups else "file" if len(artifacts) == 1 else "family"
        pinned = sum(artifact.pinned for artifact in artifacts)
        rows.append(
            {
                "name": name,
                "kind": kind,
                "files": len(artifacts),
                "bytes": _sum(artifact.size for artifact in artifacts),
                "digest": "published"
                if pinned == len(artifacts)
                else "partly"
                if pinned
                else "none",
                "account": any(artifact.login is not None for artifact in artifacts),
                "licence": artifacts[0].licence if kind != "group" else "",
                "title": catalogue.titles[name],
            }
        )
    return rows


def catalogue_text(rows: Sequence[Row]) -> str:
    """Lay out what `catalogue_rows` returned."""
    shown = [
        {
            "name": row["name"],
            "files": row["files"],
            "size": _size_of(row["bytes"]),
            "digest": row["digest"] if row["kind"] != "group" else "",
            "account": "needed" if row["account"] else "",
            "what": f"{row['title']}" + (f" [{row['licence']}]" if row["licence"] else ""),
        }
        for row in rows
    ]
    return aligned(shown, numeric=("files", "size"))


def plan_rows(plan: Plan) -> list[Row]:
    """Return one row a file, the members of a family in one: state, bytes to fetch, licence, account."""
    return [_plan_row(name, items) for name, items in _by_family(plan.items).items()]


def plan_text(plan: Plan) -> str:
    """Lay out a plan: the rows, their licences, what is to be fetched in all, and the room it takes."""
    rows = plan_rows(plan)
    columns = ("name", "files", "state", "to fetch", "account")
    shown = [
        {
            **row,
            "to fetch": _size_of(row["to fetch"]),
            "account": urlsplit(str(row["account"] or "")).hostname,
        }
        for row in rows
    ]
    table = [{column: row[column] or "" for column in columns} for row in shown]
    lines = [aligned(table, numeric=("files", "to fetch")), "", *_licences(rows), ""]
    lines.append(f"to fetch: {_to_fetch(plan)}")
    for need in plan.needs:
        more = " or more" if plan.unknown_sizes else ""
        short = ": not enough" if need.needed > need.free else ""
        lines.append(
            f"room in {need.folder}: {size_text(need.needed)}{more} needed, {size_text(need.free)} free{short}"
        )
    return "\n".join(lines)


def _to_fetch(plan: Plan) -> str:
    unknown = f"{counted(plan.unknown_sizes, 'file')} of unknown size" if plan.unknown_sizes else ""
    known = size_text(plan.bytes_to_fetch) if plan.bytes_to_fetch or not unknown else ""
    return " and ".join(filter(None, [known, unknown]))


def _licences(rows: Sequence[Row]) -> list[str]:
    """Return one line a licence with the names under it: too long for a column."""
    names: dict[object, list[str]] = {}
    for row in rows:
        names.setdefault(row["licence"], []).append(str(row["name"]))
    return ["licences:", *(f"  {', '.join(under)}: {licence}" for licence, under in names.items())]


def plan_value(plan: Plan) -> dict[str, object]:
    """Return what ``--json`` shows of a plan."""
    return {
        "files": plan_rows(plan),
        "bytes_to_fetch": plan.bytes_to_fetch,
        "unknown_sizes": plan.unknown_sizes,
        "room": [vars(need) for need in plan.needs],
    }


@dataclass(frozen=True)
class AccountNote:
    """A source that wants an account."""

    what: str
    """How many files it concerns, and where."""
    how: str
    """What to do."""


def account_notes(plan: Plan) -> dict[str, AccountNote]:
    """Return what cannot be fetched without an account, by the name of the file or family."""
    notes: dict[str, AccountNote] = {}
    for name, items in _by_family(plan.items).items():
        login = items[0].artifact.login
        locked = sum(item.state.value == "needs account" for item in items)
        if login is not None and locked:
            need = "needs" if len(items) == 1 else "need"
            what = f"{locked} of {counted(len(items), 'file')} {need} an account at {login.site}."
            notes[name] = AccountNote(what, login.how)
    return notes


def report_value(report: Report) -> dict[str, object]:
    """Return what ``--json`` shows of a finished job."""
    return {
        "files": [vars(outcome) for outcome in report.outcomes],
        "failed": [{"name": f.name, "error": f.error.message} for f in report.failures],
    }


def report_text(report: Report) -> str:
    """Lay out a finished job: a line a file that was worked on, and how many were ready before."""
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
    lines = [aligned(rows, numeric=("size",))] if rows else []
    return "\n".join([*lines, *([f"{ready} ready before"] if ready else [])]) or "nothing was done"


def finding_rows(findings: Iterable[Finding]) -> list[Row]:
    """Return one row a finding of verification."""
    return [
        {"verdict": f.verdict, "name": f.name, "path": str(f.path), "detail": f.detail}
        for f in findings
    ]


def aligned(rows: Sequence[Row], numeric: Sequence[str] = ()) -> str:
    """Lay out rows as columns under their names.

    Args:
        rows: One mapping a row, all with the same keys.
        numeric: Columns that are set to the right.
    """
    names = list(rows[0]) if rows else []
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = (
        "  ".join(
            text.rjust(width) if name in numeric else text.ljust(width)
            for text, width, name in zip(line, widths, names, strict=True)
        ).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def _by_family(items: Iterable[Item]) -> dict[str, list[Item]]:
    rows: dict[str, list[Item]] = {}
    for item in items:
        rows.setdefault(item.artifact.name.partition("/")[0], []).append(item)
    return rows


def _plan_row(name: str, items: Sequence[Item]) -> Row:
    counts: dict[str, int] = {}
    for item in items:
        counts[item.state.value] = counts.get(item.state.value, 0) + 1
    state = (
        next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {s}" for s, n in counts.items())
    )
    why = items[0].why if len(items) == 1 and items[0].state.value != "needs account" else ""
    artifact: Artifact = items[0].artifact
    return {
        "name": name,
        "files": len(items),
        "state": f"{state} ({why})" if why else state,
        "to fetch": None if state == "needs account" else _sum(item.to_fetch for item in items),
        "licence": artifact.licence,
        "account": artifact.login.site if artifact.login is not None else None,
        "path": str(items[0].path if len(items) == 1 else items[0].path.parent),
    }


def _sum(sizes: Iterable[int | None]) -> int | None:
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total


def _size_of(value: object) -> str:
    return size_text(value if isinstance(value, int) else None)
