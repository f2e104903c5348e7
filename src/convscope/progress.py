"""Progress bars of calls that may take long: in a terminal, in Jupyter, or by a callback.

One thread per call draws the bar; the call itself only stores how much is done. So a call reports from any thread at no
cost, the clock runs on between two reports, and when the call ends, in whatever way, the thread has ended too.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from multiprocessing import parent_process
from typing import Literal, Protocol, TypeAlias

from convscope.errors import ConvscopeError

Progress: TypeAlias = Callable[[float, int], None]  # called with the amount done and the total
ProgressOption: TypeAlias = bool | Progress | None
Outcome: TypeAlias = Literal["done", "stopped"]

DELAY = 1.5  # seconds after which a bar appears by itself
INTERVAL = 0.25  # seconds between two drawings

_active: ContextVar[bool] = ContextVar("convscope_progress", default=False)  # inside a call that reports progress


def report_part(report: Progress, done: float, count: int, total: int, fraction: float) -> None:
    """Report that a fraction of the next `count` of `total` items is done, after `done` before."""
    report(done + fraction * count, total)


@contextmanager
def progress_bar(progress: ProgressOption, label: str) -> Iterator[Progress]:
    """Show the progress of the block; yield the function ``(done, total)`` to report it with, from any thread.

    Parameters
    ----------
    progress : bool, callable or None
        None shows a bar after 1.5 seconds, True at once, False none; a callable is called instead. Bars are shown in
        Jupyter, and on a terminal on standard error; elsewhere nothing is. By itself (None) a bar appears only for the
        outermost call, and only in the main thread of the main process.
    label : str
        What is done, in a word or two.

    Raises
    ------
    ConvscopeError
        If `progress` is of another type.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise ConvscopeError(
            f"progress is {progress!r}; expected True, False, None for a bar after {DELAY:g} seconds, or a function "
            "(done, total)"
        )
    token = _active.set(True)
    try:
        if callable(progress):
            yield progress
            return
        enabled = _is_outermost(token.old_value) if progress is None else progress
        make_display = _find_display() if enabled else None
        if make_display is None:
            yield _ignore
            return
        with _display_bar(make_display, _State(label), delay=0 if progress else DELAY) as report:
            yield report
    finally:
        _active.reset(token)


def _is_outermost(outer: object) -> bool:
    """Whether a call shows a bar by itself; `outer` is True inside another call."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return outer is not True and in_main_thread and parent_process() is None


def _ignore(done: float, total: int) -> None:
    """Report to nobody."""


@dataclass
class _State:
    """How far a call is. `total` is None before the first report; `outcome` is set when the call ends."""

    label: str
    done: float = 0
    total: int | None = None
    outcome: Outcome | None = None
    start: float = field(default_factory=time.monotonic)

    @property
    def fraction(self) -> float:
        """The fraction done, in [0, 1]."""
        if self.outcome == "done":
            return 1.0
        return min(1.0, self.done / self.total) if self.total else 0.0

    def times(self) -> str:
        """Describe the time since the start and, while the call runs, the time that is left."""
        elapsed = time.monotonic() - self.start
        if self.outcome is not None:
            return f"{'stopped after ' if self.outcome == 'stopped' else ''}{_duration(elapsed)}"
        if not self.fraction:
            return _duration(elapsed)
        return f"{_duration(elapsed)}, {_duration(elapsed * (1 / self.fraction - 1))} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02} h"
    return f"{minutes}:{rest:02} min" if minutes else f"{rest} s"


class _Display(Protocol):
    """A bar that is drawn by one thread, from when it is made to when it is closed."""

    def update(self) -> None:
        """Draw the state."""

    def close(self) -> None:
        """Leave one line with the last state."""


def _find_display() -> Callable[[_State], _Display] | None:
    """Return how to show a bar here: in Jupyter, on a terminal, or not at all."""
    if in_jupyter():
        return _JupyterDisplay
    return _TerminalDisplay if _on_terminal() else None


def in_jupyter() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def _display_bar(make_display: Callable[[_State], _Display], state: _State, delay: float) -> Iterator[Progress]:
    """Draw the state in a thread, from `delay` seconds on, until the block ends."""
    ended = threading.Event()

    def draw() -> None:
        if ended.wait(delay):
            return
        display = make_display(state)
        while not ended.wait(INTERVAL):
            display.update()
        display.close()

    def report(done: float, total: int) -> None:
        state.done, state.total = done, total

    # Jupyter finds the cell to write to in the context of the thread.
    thread = threading.Thread(target=copy_context().run, args=(draw,), name="convscope-progress", daemon=True)
    thread.start()
    outcome: Outcome = "stopped"
    try:
        yield report
        outcome = "done"
    finally:
        state.outcome = outcome
        ended.set()
        thread.join()


class _TerminalDisplay:
    """A bar of rich on standard error."""

    def __init__(self, state: _State) -> None:
        from rich import progress
        from rich.console import Console

        self._state = state
        self._bar = progress.Progress(
            progress.TextColumn("{task.description:14}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[times]}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(state.label, total=None, times="")
        self._bar.start()
        self.update()

    def update(self) -> None:
        state = self._state
        total = None if state.total is None and state.outcome is None else 1
        self._bar.update(self._task, completed=state.fraction, total=total, times=state.times(), refresh=True)

    def close(self) -> None:
        self.update()
        self._bar.stop()


class _JupyterDisplay:
    """A bar of HTML below a cell, without a widget; in the end one line of text stands there."""

    def __init__(self, state: _State) -> None:
        from IPython.display import display

        self._drawing = _Drawing(state)
        self._handle = display(self._drawing, display_id=True)  # type: ignore[no-untyped-call]

    def update(self) -> None:
        self._handle.update(self._drawing)

    def close(self) -> None:
        self.update()


@dataclass(frozen=True)
class _Drawing:
    """A state as Jupyter shows it."""

    state: _State

    def __repr__(self) -> str:
        return f"{self.state.label}: {self.state.fraction:.0%}, {self.state.times()}"

    def _repr_html_(self) -> str:
        label, times = html.escape(self.state.label), self.state.times()
        if self.state.outcome is not None:
            return f'<small style="opacity:.7">{label}: {times}</small>'
        value = f' value="{self.state.fraction:.3f}"' if self.state.total else ""  # without a value, the bar moves
        return (
            f'<small style="display:flex; gap:.8em; align-items:center">{label}'
            f'<progress max="1"{value} style="width:16em"></progress>{self.state.fraction:.0%} {times}</small>'
        )
