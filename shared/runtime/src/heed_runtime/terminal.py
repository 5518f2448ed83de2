"""What a command shows: the result on standard output, log and progress on standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from heed_runtime.files import plain, to_json
from heed_runtime.recipe import Row, Table

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LISTED = 100
"""Files that are named one by one."""

NOTICE = logging.WARNING - 5
"""The level of what is shown also when quiet, without the word `warning`."""
logging.addLevelName(NOTICE, "NOTICE")

OURS = "heed_"
"""Loggers whose names begin so are heard from INFO on, all others from WARNING on."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a verb returns: shown as tables or, with `--json`, as one JSON document."""

    title: str
    """One line above the tables."""
    tables: Sequence[Table] = ()
    text: str = ""
    """Free text between title and tables (a card, a layout); not in the JSON document."""
    data: Mapping[str, object] = field(default_factory=dict)
    """The JSON document. `files` is added to it."""
    files: Sequence[Path] = ()
    """Files and folders written; the last line on standard output names them."""
    exit_code: int = 0


class Progress:
    """Counts the steps of a long task; shows a bar on a terminal, plain lines elsewhere."""

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Say that `steps` more are done; `note` (such as the loss) is shown beside the bar."""

    def restart(self, label: str, total: int | None) -> None:
        """Begin counting again, under another label (the next epoch)."""


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """The two streams of a command. Cheap to make, holds no state.

    Args:
        quiet: No progress, only warnings and errors on standard error.
        json: The result is one JSON document instead of tables.
    """

    quiet: bool = False
    json: bool = False

    def show(self, result: Result) -> None:
        """Write the result to standard output, as tables or as one JSON document."""
        if self.json:
            data = dict(result.data)
            data["files"] = [str(path) for path in result.files]
            print(to_json(data), flush=True)
            return
        console = _console(sys.stdout)
        console.print(result.title, style="bold", highlight=False, markup=False)
        if result.text:
            console.print(result.text, highlight=False, markup=False)
        for table in result.tables:
            console.print(render(table))
        if result.files:
            console.print(
                f"wrote {named(result.files)}", highlight=False, markup=False, soft_wrap=True
            )

    def say(self, line: str) -> None:
        """One line of news on standard error, unless quiet."""
        if not self.quiet:
            self.warn(line)

    def warn(self, line: str) -> None:
        """One line on standard error, also when quiet."""
        _console(sys.stderr).print(line, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Progress]:
        """Show the progress of a task of `total` steps (None: unknown) with the time left.

        Example:
            >>> with Terminal(quiet=True).progress("predict", 2) as progress:
            ...     progress.advance()
        """
        if self.quiet:
            yield Progress()
        elif sys.stderr.isatty():
            with _Bar(label, total) as bar:
                yield bar
        else:
            lines = _Lines(label, total)
            yield lines
            lines.finish()


def named(files: Sequence[Path]) -> str:
    """The files by name; of more than `LISTED` the number and the folder."""
    if len(files) <= LISTED:
        return " ".join(str(path) for path in files)
    return f"{len(files)} files in {os.path.commonpath(files)}"


class _Bar(Progress):
    """A live bar with the time left."""

    def __init__(self, label: str, total: int | None) -> None:
        from rich import progress as rich_progress

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            console=_console(sys.stderr),
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total, note="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        if note:
            self._bar.update(self._task, note=note)
        self._bar.advance(self._task, steps)

    def restart(self, label: str, total: int | None) -> None:
        self._bar.reset(self._task, total=total, description=label, note="")


class _Lines(Progress):
    """A plain line at the first step, at the last, and every `every_s` seconds between."""

    def __init__(self, label: str, total: int | None, *, every_s: float = 10.0) -> None:
        self.every_s = every_s
        self._label, self._total = label, total
        self._done, self._shown_done, self._note = 0, 0, ""
        self._start = self._shown = time.monotonic()

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        self._done += steps
        self._note = note or self._note
        if self._done == self._total or time.monotonic() - self._shown >= self.every_s:
            self._show()

    def restart(self, label: str, total: int | None) -> None:
        self.finish()
        self.__init__(label, total, every_s=self.every_s)  # type: ignore[misc]

    def finish(self) -> None:
        """Show where it ended, if the last line did not."""
        if self._done != self._shown_done:
            self._show()

    def _show(self) -> None:
        self._shown, self._shown_done = time.monotonic(), self._done
        line = f"{self._label} {self._done}"
        if self._total:
            left_s = (self._shown - self._start) / self._done * (self._total - self._done)
            line += f"/{self._total}"
            if self._done < self._total:
                line += f", {left_s:.0f} s left"
        note = f", {self._note}" if self._note else ""
        _console(sys.stderr).print(line + note, highlight=False, markup=False, soft_wrap=True)


def render(table: Table) -> RenderableType:
    """The table for a terminal: numbers right, four significant digits, missing values as `-`."""
    from rich import box
    from rich.table import Table as RichTable

    columns = list(dict.fromkeys(key for row in table.rows for key in row))
    shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in table.rows)
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(_cell(row.get(column)) for column in columns))
    return shown


def rows_of(values: Mapping[str, object], *, key: str = "name", value: str = "value") -> list[Row]:
    """Make a two-column table of a mapping."""
    return [{key: name, value: _scalar(item)} for name, item in values.items()]


def _scalar(item: object) -> str | int | float | None:
    item = plain(item)
    return item if item is None or isinstance(item, str | int | float) else str(item)


def _cell(value: str | int | float | None) -> str:
    from rich.markup import escape

    value = plain(value)  # type: ignore[assignment]
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))


def _console(stream: object) -> Console:
    from rich.console import Console as RichConsole

    class Console(RichConsole):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1

    # A pipe has no width: rows must not be cut at a guessed one.
    width = None if stream.isatty() else 200  # type: ignore[attr-defined]
    return Console(file=stream, width=width)  # type: ignore[arg-type]


def is_heard(record: logging.LogRecord) -> bool:
    """Whether a record belongs in the log of this program: its own news, and any warning."""
    return record.levelno >= logging.WARNING or record.name.startswith(OURS)


class _Handler(logging.Handler):
    """Shows a log record as one line on standard error; what is no mere news only once."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(NOTICE if terminal.quiet else logging.INFO)
        self.addFilter(is_heard)
        self._terminal = terminal
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = self.format(record)
        if record.name == "py.warnings":  # file:line: Category: message, then the line of code
            text = re.sub(r"^.*?:\d+: \w+: ", "", text.splitlines()[0])
        if record.levelno >= NOTICE:
            if text in self._told:
                return
            self._told.add(text)
        self._terminal.warn(prefix + text)


@contextlib.contextmanager
def logging_to(terminal: Terminal) -> Iterator[None]:
    """Send the log of this program and the warnings of every library to standard error."""
    handler, root = _Handler(terminal), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(handler)
