"""Progress bars: when they appear, where, and what they leave behind."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable

import pytest

import convscope
from convscope import progress
from convscope.progress import progress_bar


class Terminal:
    """What was written to a standard error that is a terminal."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._written = capsys, ""

    def getvalue(self) -> str:
        self._written += self._capsys.readouterr().err
        return self._written

    @property
    def text(self) -> str:
        """The text without control sequences, one line per drawing."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue()).replace("\r", "\n")


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setattr(progress, "DELAY", 0.2)
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return Terminal(capsys)


@pytest.fixture(autouse=True)
def no_thread_left() -> object:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "convscope-progress"]


def work(option: progress.ProgressOption, seconds: float = 0.5, label: str = "work") -> None:
    with progress_bar(option, label) as report:
        for done in range(5):
            report(done, 5)
            time.sleep(seconds / 5)


def test_short_calls_draw_nothing(terminal: Terminal) -> None:
    work(None, 0.05)
    assert terminal.getvalue() == ""


def test_long_calls_draw_a_bar_by_themselves(terminal: Terminal) -> None:
    work(None)
    assert re.search(r"work +━+╺?━* +60% ", terminal.text)
    assert "left" in terminal.text
    assert terminal.text.rstrip().endswith("100% 1 s") or terminal.text.rstrip().endswith("100% 0 s")


def test_true_draws_at_once(terminal: Terminal) -> None:
    work(True, 0.01)
    assert "work" in terminal.text


def test_false_draws_nothing(terminal: Terminal) -> None:
    work(False)
    assert terminal.getvalue() == ""


def test_nothing_is_drawn_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    work(True, 0.01)
    assert capsys.readouterr() == ("", "")


def test_a_callback_gets_every_report_and_no_bar_is_drawn(terminal: Terminal) -> None:
    calls: list[tuple[float, int]] = []
    work(lambda done, total: calls.append((done, total)))
    assert calls == [(i, 5) for i in range(5)]
    assert terminal.getvalue() == ""


def test_calls_inside_a_call_draw_nothing(terminal: Terminal) -> None:
    for outer in (None, False, lambda *_: None):
        with progress_bar(outer, "outer"):
            work(None, label="inner")
    assert "inner" not in terminal.text
    work(None, label="after")
    assert "after" in terminal.text


def test_calls_in_other_threads_draw_nothing_by_themselves(terminal: Terminal) -> None:
    thread = threading.Thread(target=work, args=(None,))
    thread.start()
    thread.join()
    assert terminal.getvalue() == ""


def test_reports_may_come_from_any_thread(terminal: Terminal) -> None:
    with progress_bar(True, "work") as report:
        thread = threading.Thread(target=report, args=(3, 4))
        thread.start()
        thread.join()
        time.sleep(0.1)
    assert "75%" in terminal.text


def test_the_clock_runs_before_the_first_report(terminal: Terminal) -> None:
    with progress_bar(None, "work"):
        time.sleep(0.6)
        assert "work" in terminal.text
        assert "%" not in terminal.text


def fail(error: type[BaseException]) -> None:
    with progress_bar(True, "work") as report:
        report(2, 5)
        time.sleep(0.1)
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_terminal_is_as_before(terminal: Terminal, error: type[BaseException]) -> None:
    stdout, stderr = sys.stdout, sys.stderr
    with pytest.raises(error):
        fail(error)
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert "40% stopped after 0 s" in terminal.text
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_labels_are_not_markup(terminal: Terminal) -> None:
    work(True, 0.05, label="[red]a[/]")
    assert "[red]a[/]" in terminal.text


def test_another_type_is_refused() -> None:
    with pytest.raises(convscope.ConvscopeError, match="progress is 'yes'; expected True, False, None"):
        work("yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00 min"), (225, "3:45 min"), (3661, "1:01:01 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text


def test_time_left_is_proportional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: 130.0)
    state = progress._State("work", done=1, total=4, start=100.0)
    assert state.times() == "30 s, 1:30 min left"
    state.outcome = "stopped"
    assert state.times() == "stopped after 30 s"


CALLS: dict[str, Callable[..., object]] = {
    "heatmaps": lambda model, images, **o: convscope.heatmaps(model, images, **o),
    "activations": lambda model, images, **o: convscope.activations(model, images, "conv_stem", **o),
    "predict": lambda model, images, **o: convscope.predict(model, images, **o),
    "patterns": lambda model, images, **o: convscope.patterns(model, "conv_stem", [0], size=32, steps=2, **o),
    "story": lambda model, images, **o: convscope.story(model, ["conv_stem"], units=2, num_displayed=1, **o),
    "compare": lambda model, images, **o: convscope.compare(
        model, images, methods=["grad-cam"], metrics=["deletion"], **o
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_public_calls_take_every_form_of_progress(name: str, terminal: Terminal) -> None:
    model, images = convscope.load("lite0"), convscope.samples.photographs()[:1]
    CALLS[name](model, images, progress=True)
    drawn = [line.split()[0] for line in terminal.text.splitlines() if "%" in line or "━" in line]
    assert set(drawn) == {name}  # one bar, also of calls that call others
    before = terminal.getvalue()
    CALLS[name](model, images, progress=False)
    assert terminal.getvalue() == before
    with pytest.raises(convscope.ConvscopeError, match="progress is 1;"):
        CALLS[name](model, images, progress=1)
