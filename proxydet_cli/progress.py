"""Progress as people see it: bars on a terminal, now and then a line elsewhere; of a training a live table of its losses too."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from proxydet.reporting import Progress, SilentProgress, Task
from proxydet.wording import printable, size_scale
from proxydet_cli.output import Output, is_terminal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.table import Table


Fields = dict[str, str | float]

# Of a training's step, which has the fields of `total`: shown next to the amount and the time left, under these names.
_HEADLINE = {"total": "loss", "it/s": "it/s", "lr": "lr"}
# Shown in the table below the parts of the loss, which are the rest.
_MACHINE = {"data s": "waiting for data, s/it", "MiB": "memory, MiB"}
_COLUMNS = 3

LINE_INTERVAL = 10.0
"""Seconds between two lines about one task where there is no terminal."""


def show_progress(*, quiet: bool = False) -> Progress:
    """Choose how progress is shown: bars where stderr is a terminal, else plain lines on stderr.

    Args:
        quiet: Show nothing.
    """
    if quiet:
        return SilentProgress()
    return BarProgress() if is_terminal(sys.stderr) else LineProgress()


def duration(seconds: float) -> str:
    """Say a length of time in words that fit its size: ``8 s``, ``4 min 05 s``, ``3 h 12 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def amount(done: float, total: float | None, unit: str) -> str:
    """Say how much is done: ``12/40 images``, ``1.2/4.0 GB`` for unit ``B``."""
    if unit == "B":
        divisor, unit = size_scale(total if total is not None else done)
        done, total = done / divisor, None if total is None else total / divisor
        text = f"{done:.1f}" if total is None else f"{done:.1f}/{total:.1f}"
    else:
        text = f"{done:.0f}" if total is None else f"{done:.0f}/{total:.0f}"
    return f"{text} {unit}".rstrip()


def _in_words(fields: Fields) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in fields.items()
    )


def _headline(fields: Fields) -> Fields:
    """Return what is shown in a line: of a training's step the headline numbers, else all."""
    if "total" not in fields:
        return fields
    return {shown: fields[name] for name, shown in _HEADLINE.items() if name in fields}


class LineTask:
    """A task that writes a line every :data:`LINE_INTERVAL` seconds; arguments as of :meth:`Progress.task`."""

    def __init__(self, description: str, total: float | None, unit: str, done: float) -> None:
        self.describe(description)
        self.total, self.unit, self.done = total, unit, done
        self._done_before = done
        self._started = self._last_line = time.monotonic()
        self._fields: Fields = {}
        self._lines = 0

    def advance(self, amount: float = 1, **fields: str | float) -> None:
        """Count units as done, and write a line if the last is long ago."""
        self.done += amount
        self._fields.update(_headline(fields))
        now = time.monotonic()
        if now - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            self._lines += 1
            self._write(self._progress(now - self._started), now - self._started)

    def describe(self, description: str) -> None:
        """Change what the lines say is being done."""
        self.description = description

    def finish(self) -> None:
        """Write the closing line; a task of less than a second that wrote none stays silent."""
        elapsed = time.monotonic() - self._started
        if self._lines or elapsed >= 1:
            counted = f"{amount(self.done, None, self.unit)} in " if self.done or self.unit else ""
            self._write(f"{counted}{duration(elapsed)}", elapsed)

    def _progress(self, seconds: float) -> str:
        text, made = amount(self.done, self.total, self.unit), self.done - self._done_before
        if self.total and made > 0:
            left = seconds / made * max(self.total - self.done, 0)
            text += f" ({self.done / self.total:.0%}), {duration(left)} left"
        return text

    def _write(self, text: str, seconds: float) -> None:
        """Write a line, with the bytes a second where bytes are counted."""
        made = self.done - self._done_before
        if self.unit == "B" and made > 0 and seconds > 0:
            text += f", {amount(made / seconds, None, 'B')}/s"
        line = [f"{self.description}: {text}", _in_words(self._fields)]
        Output().message("  ".join(filter(None, line)))


class LineProgress:
    """Progress as plain lines on stderr: for log files, pipes and dumb terminals."""

    @contextmanager
    def task(
        self, description: str, *, total: float | None = None, unit: str = "", done: float = 0
    ) -> Iterator[Task]:
        """Run a task; its closing line is written when it ends without an error."""
        task = LineTask(description, total, unit, done)
        yield task
        task.finish()


class _BarTask:
    def __init__(self, shown: BarProgress, bars: RichProgress, task_id: TaskID) -> None:
        self._shown = shown
        self._bars = bars
        self._id = task_id
        self._fields: Fields = {}

    def advance(self, amount: float = 1, **fields: str | float) -> None:
        """Move the bar."""
        self._fields.update(_headline(fields))
        if parts := fields.keys() - _HEADLINE.keys() if "total" in fields else ():
            self._shown.table = parts_table({name: fields[name] for name in parts})
        self._bars.update(self._id, advance=amount, shown=_in_words(self._fields))

    def describe(self, description: str) -> None:
        """Change the text in front of the bar."""
        self._bars.update(self._id, description=printable(description))


class BarProgress:
    """Progress as bars with the time left, on a terminal; a task inside a task gets a bar while it runs."""

    def __init__(self) -> None:
        self.table: Table | None = None
        """Shown above the bars."""
        self._bars: RichProgress | None = None
        self._open = 0
        self._lock = Lock()

    @contextmanager
    def task(
        self, description: str, *, total: float | None = None, unit: str = "", done: float = 0
    ) -> Iterator[Task]:
        """Run a task under a bar of its own; the bar of the outermost task stays on screen."""
        with self._lock:
            if self._bars is None:
                self._bars = _make_bars()
                self._bars.get_renderables = self._renderables  # type: ignore[method-assign]
                self._bars.start()
            self._open += 1
            bars = self._bars
        task_id = bars.add_task(printable(description), total=total, unit=unit, shown="")
        bars.update(task_id, completed=done)
        try:
            yield _BarTask(self, bars, task_id)
        finally:
            with self._lock:
                self._open -= 1
                if self._open:
                    bars.remove_task(task_id)
                else:
                    bars.stop_task(task_id)
                    bars.stop()
                    self._bars = self.table = None

    def _renderables(self) -> Iterator[RenderableType]:
        if self.table is not None:
            yield self.table
        if self._bars is not None:
            yield self._bars.make_tasks_table(self._bars.tasks)


def _make_bars() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Column(ProgressColumn):
        """What a function says of a task."""

        def __init__(self, say: Callable[[Any], str], max_refresh: float | None = None) -> None:
            super().__init__()
            self.say, self.max_refresh = say, max_refresh

        def render(self, task: Any) -> Text:
            return Text(self.say(task))

    def done(task: Any) -> str:
        unit = task.fields["unit"]
        uncounted = task.total is None and not task.completed and not unit
        return "" if uncounted else amount(task.completed, task.total, unit)

    def left(task: Any) -> str:
        seconds = task.time_remaining
        return "" if seconds is None or task.finished else f"{duration(seconds)} left"

    def speed(task: Any) -> str:
        counted = task.fields["unit"] == "B" and task.speed
        return f"{amount(task.speed, None, 'B')}/s" if counted else ""

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        Column(done),
        Column(speed, 0.5),
        TimeElapsedColumn(),
        Column(left, 0.5),
        TextColumn("{task.fields[shown]}", markup=False),
        console=Console(stderr=True),
    )


class NotebookProgress:
    """Progress for notebooks, by tqdm: ``train(config, progress=NotebookProgress())``."""

    @contextmanager
    def task(
        self, description: str, *, total: float | None = None, unit: str = "", done: float = 0
    ) -> Iterator[Task]:
        """Run a task under a tqdm bar."""
        from tqdm.auto import tqdm

        unit, scale = unit or "it", unit == "B"
        with tqdm(desc=description, total=total, initial=done, unit=unit, unit_scale=scale) as bar:
            yield _TqdmTask(bar)


class _TqdmTask:
    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self.describe = bar.set_description

    def advance(self, amount: float = 1, **fields: str | float) -> None:
        """Move the bar."""
        self._bar.update(amount)
        if fields:
            self._bar.set_postfix(fields, refresh=False)


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
        table.add_row(*(word for cell in cells[row::height] for word in cell))
    machine = [(shown, _number(parts[k], ".4g")) for k, shown in _MACHINE.items() if k in parts]
    if machine:
        table.add_row(*(word for cell in machine for word in cell))
    return table


def _number(value: str | float, form: str) -> str:
    return format(value, form) if isinstance(value, float) else str(value)
