"""What a progress display counts and shows, and how often."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from raindecode.progress import Meter, ProgressDisplay


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ---- counting ---------------------------------------------------------------------------------------------------------
def test_reports_are_summed_over_requests(clock: Clock) -> None:
    meter = Meter(3, clock)
    for index, tokens, iterations in ((0, 1, 2), (1, 4, 1), (0, 3, 5), (0, 3, 6), (1, 5, 2)):
        meter.report(index, tokens, iterations)
    assert (meter.tokens, meter.iterations, meter.done) == (8, 8, 0)
    meter.finish(0)
    meter.finish(2)  # it failed before its first report
    assert (meter.tokens, meter.iterations, meter.done) == (8, 8, 2)
    assert list(meter._under_way) == [1]


def test_speed_is_that_of_the_last_seconds(clock: Clock) -> None:
    meter = Meter(1, clock)
    assert meter.tokens_per_second() == 0.0
    for second in range(1, 61):  # 10 tokens a second, then 2
        clock.now += 1
        meter.report(0, 10 * second if second <= 30 else 300 + 2 * (second - 30), 0)
        speed = meter.tokens_per_second()
        assert speed == pytest.approx(10 if second <= 30 else max(2, 10 - 8 * (second - 30) / 15))
    assert len(meter._samples) < 20


def test_time_left_counts_what_is_under_way(clock: Clock) -> None:
    meter = Meter(5, clock)
    meter.report(0, 8, 0)
    assert meter.seconds_left() is None
    meter.finish(0)
    meter.report(1, 4, 0)
    clock.now += 6  # 12 tokens in 6 seconds; 4 x 8 - 4 are left
    assert meter.seconds_left() == pytest.approx(14.0)
    meter.report(2, 100, 0)  # longer than expected
    assert meter.seconds_left() == 0.0


def test_summary(clock: Clock) -> None:
    meter = Meter(1000, clock)
    meter.report(0, 1500, 40)
    clock.now += 5
    assert meter.summary(searching=False) == "answers 0/1,000, 1,500 tokens (300/s)"
    meter.finish(0)
    assert meter.summary(searching=True) == "answers 1/1,000, 1,500 tokens (300/s), 40 iterations, 1:23:15 left"
    meter.done = 1000
    assert "left" not in meter.summary(searching=True)
    slow = Meter(2, clock)
    slow.report(0, 7, 3)
    clock.now += 10
    assert slow.summary(searching=False) == "answers 0/2, 7 tokens (0.7/s)"


def test_verdicts_have_no_tokens(clock: Clock) -> None:
    display = ProgressDisplay(10, searching=False, clock=clock, what="verdicts")
    assert display.meter.summary(searching=False) == "verdicts 0/10"
    clock.now += 6
    for index in range(4):
        display.finished(index)
    assert display.meter.summary(searching=False) == "verdicts 4/10, 0:09 left"


# ---- showing ----------------------------------------------------------------------------------------------------------
def test_lines_come_now_and_then_and_never_twice(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(4, searching=True, clock=clock) as display:
        report = display.reporter(0)
        assert report is not None
        for step in range(1, 1001):
            clock.now += 0.025
            report(step, step // 2)
        display.finished(0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "answers 0/4, 400 tokens (40/s), 200 iterations",
        "answers 0/4, 800 tokens (40/s), 400 iterations",
        "answers 1/4, 1,000 tokens (40/s), 500 iterations, 1:15 left",
    ]


def test_a_bar_is_touched_ten_times_a_second_at_most(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Progress(console=Console(file=io.StringIO()), auto_refresh=False)
    display = ProgressDisplay(4, searching=False, bar=bar, clock=clock)
    touched: list[Any] = []
    monkeypatch.setattr(bar, "update", lambda *_, **shown: touched.append(shown))
    report = display.reporter(2)
    assert report is not None
    for step in range(1, 2001):
        clock.now += 0.001
        report(step, 0)
    assert 18 <= len(touched) <= 20
    assert touched[-1]["description"].endswith("tokens (1,000/s)")
    assert touched[-1]["completed"] == 0


@pytest.mark.parametrize(
    ("wanted", "total", "searching", "terminal", "shown"),
    [
        (None, 2, False, False, "nothing"),
        (None, 2, False, True, "bar"),
        (None, 1, False, True, "nothing"),
        (None, 1, True, True, "bar"),
        (True, 1, False, False, "lines"),
        (True, 1, False, True, "bar"),
        (False, 9, True, True, "nothing"),
    ],
)
def test_what_is_shown_where(
    monkeypatch: pytest.MonkeyPatch, wanted: bool | None, total: int, searching: bool, terminal: bool, shown: str
) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with ProgressDisplay.choose(wanted, total, searching=searching) as display:
        assert (display.reporter(0) is None) == (shown == "nothing")
        display.finished(0)
    assert bool(stderr.getvalue()) == (shown != "nothing")
    assert stderr.getvalue().startswith("answers 1/1") == (shown == "lines")
    assert stderr.getvalue().count("answers") <= 1 or shown == "bar"


def test_a_log_that_cannot_be_written_ends_no_request(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError("no space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with ProgressDisplay(2, searching=False, clock=clock) as display:
        report = display.reporter(0)
        assert report is not None
        clock.now += 60
        report(1, 0)
        assert display.reporter(1) is None


def test_no_standard_error_is_no_display(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressDisplay.choose(True, 3, searching=False) as display:
        assert display.reporter(0) is None
    assert capsys.readouterr().out == ""
