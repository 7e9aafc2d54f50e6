"""How a training is shown: a live table of its losses on a terminal, short lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from proxydet.reporting import Progress, Task
from proxydet_cli.progress import BarProgress, show_progress

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress
    from rich.table import Table

Fields = dict[str, str | float]

# Shown beside the amount and the time left, under these names; the table above a bar shows the rest.
_HEADLINE = {"total": "loss", "it/s": "it/s", "lr": "lr"}
# Not parts of the loss: shown below them in the table.
_MACHINE = {"data s": "waiting for data, s/it", "MiB": "memory, MiB"}
_COLUMNS = 3


def training_progress(*, quiet: bool = False) -> Progress:
    """Choose how a training is shown.

    Args:
        quiet: Show nothing.
    """
    shown = show_progress(quiet=quiet)
    return TrainingProgress(_TableBars() if isinstance(shown, BarProgress) else shown)


class TrainingProgress:
    """Shows the headline numbers of a training beside its bar; where that is a bar, a table of the losses above it.

    Args:
        inner: Shows bars or lines.
    """

    def __init__(self, inner: Progress) -> None:
        self._inner = inner

    @contextmanager
    def task(
        self, description: str, *, total: float | None = None, unit: str = "", done: float = 0
    ) -> Iterator[Task]:
        """Run a task."""
        with self._inner.task(description, total=total, unit=unit, done=done) as task:
            yield _SplitTask(task, self._inner if isinstance(self._inner, _TableBars) else None)


class _TableBars(BarProgress):
    """Bars with room for a table above them."""

    def __init__(self) -> None:
        super().__init__()
        self._table: Table | None = None

    def show(self, table: Table) -> None:
        self._table = table

    def _enter(self) -> RichProgress:
        bars = super()._enter()
        bars.get_renderables = lambda: self._renderables(bars)  # type: ignore[method-assign]
        return bars

    def _renderables(self, bars: RichProgress) -> Iterator[RenderableType]:
        if self._table is not None:
            yield self._table
        yield bars.make_tasks_table(bars.tasks)


class _SplitTask:
    def __init__(self, task: Task, bars: _TableBars | None) -> None:
        self._task = task
        self._bars = bars

    def advance(self, amount: float = 1, **fields: str | float) -> None:
        """Count, and show what is new."""
        headline = {shown: fields[name] for name, shown in _HEADLINE.items() if name in fields}
        parts = {name: value for name, value in fields.items() if name not in _HEADLINE}
        self._task.advance(amount, **(headline or fields))
        if headline and parts and self._bars is not None:
            self._bars.show(parts_table(parts))

    def describe(self, description: str) -> None:
        """Change the text in front."""
        self._task.describe(description)


def parts_table(parts: Fields) -> Table:
    """Lay out the parts of a loss in columns of name and value, in order of their names; the machine's share last."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for _ in range(_COLUMNS):
        table.add_column(style="dim")
        table.add_column(justify="right")
    losses = sorted(parts.keys() - _MACHINE.keys())
    cells = [(name.removeprefix("loss_"), _number(parts[name], ".4f")) for name in losses]
    height = -(-len(cells) // _COLUMNS)
    for row in range(height):
        line: list[str] = []
        for column in range(_COLUMNS):
            index = column * height + row
            line += cells[index] if index < len(cells) else ("", "")
        table.add_row(*line)
    machine = [
        word
        for name, shown in _MACHINE.items()
        if name in parts
        for word in (shown, _number(parts[name], ".4g"))
    ]
    if machine:
        table.add_row(*machine)
    return table


def _number(value: str | float, form: str) -> str:
    return format(value, form) if isinstance(value, float) else str(value)
