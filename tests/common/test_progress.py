"""Progress: shares and times from a plan and what was seen, on a clock of the test's own."""

from __future__ import annotations

import io
from contextlib import nullcontext
from typing import Any

import pytest

from wina_calib.common.bars import Bars, hearing
from wina_calib.common.progress import SILENT, Counted, Estimate, Forecast, Part, Within

PLAN = (Part("a", 4, 1.0), Part("b", 10, 9.0))


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(forecast: Forecast, name: str, steps: int, seconds: float, start: float, first: float = 0.0) -> float:
    """Take all steps of a phase; the time when they are done."""
    forecast.phase(name, steps, start)
    for step in range(steps):
        start += seconds + (first if step == 0 else 0.0)
        forecast.step(start)
    return start


def test_the_time_left_comes_from_the_measured_steps_and_the_plan() -> None:
    forecast = Forecast(PLAN)
    forecast.phase("a", 4, 0.0)
    forecast.step(8.0)  # 7 s of it are its own beginning
    assert forecast.seconds_left(8.0) is None
    forecast.step(9.0)
    assert forecast.seconds_left(9.0) == pytest.approx(2 + 9 * 4)
    assert forecast.seconds_left(9.5) == pytest.approx(1.5 + 9 * 4)
    assert forecast.share == pytest.approx(0.05)


def test_it_is_corrected_by_the_phase_under_way_and_ends_at_nothing() -> None:
    forecast = Forecast(PLAN)
    end = run(forecast, "a", 4, 1.0, 0.0)
    assert forecast.share == pytest.approx(0.1)
    forecast.phase("b", 10, end)
    assert forecast.seconds_left(end) == pytest.approx(36)
    for _ in range(5):
        end += 8.0  # planned were 3.6 s
        forecast.step(end)
    assert forecast.seconds_left(end) == pytest.approx(40)
    for _ in range(5):
        end += 8.0
        forecast.step(end)
    assert forecast.seconds_left(end) == 0
    assert forecast.share == 1


@pytest.mark.parametrize(("before", "after"), [(1.0, 5.0), (5.0, 1.0)])
def test_it_follows_when_other_programs_take_the_processor_or_give_it_back(before: float, after: float) -> None:
    forecast = Forecast(tuple(Part(name, 200, 1.0) for name in "abc"))
    end = run(forecast, "a", 200, before, 0.0)
    forecast.phase("b", 200, end)
    for step in range(130):
        end += before if step < 40 else after
        forecast.step(end)
    assert forecast.seconds_left(end) == pytest.approx(after * (70 + 200), rel=0.5)
    for _ in range(70):
        end += after
        forecast.step(end)
    forecast.phase("c", 200, end)
    assert forecast.seconds_left(end) == pytest.approx(after * 200, rel=0.25)


def test_one_kind_of_work_that_is_hit_harder_says_little_of_the_others() -> None:
    """Small products on two threads suffer far more than large ones when other programs take a processor."""
    forecast = Forecast(tuple(Part(name, 100, cost) for name, cost in (("a", 1.0), ("small", 0.5), ("b", 8.0))))
    end = run(forecast, "a", 100, 0.3, 0.0)
    end = run(forecast, "small", 100, 1.2, end)  # eight times as long as planned
    forecast.phase("b", 100, end)
    assert forecast.seconds_left(end) == pytest.approx(8 * 30, rel=0.05)


def test_what_is_not_in_the_plan_says_nothing_of_the_rest() -> None:
    forecast = Forecast(PLAN)
    end = run(forecast, "a", 4, 1.0, 0.0)
    end = run(forecast, "surprise", 5, 100.0, end)
    forecast.phase("b", 10, end)
    assert forecast.seconds_left(end) == pytest.approx(36)


def test_saved_work_counts_as_done_and_says_nothing_of_the_time() -> None:
    forecast = Forecast((*PLAN, Part("c", 2, 10.0)))
    forecast.phase("b", 5, 0.0)  # "a" is there, and half of "b"
    assert forecast.share == pytest.approx(5.5 / 20)
    forecast.step(3.0)
    forecast.step(6.0)
    assert forecast.seconds_left(6.0) == pytest.approx(3 * 3 + 10 * 6 / 1.8)
    assert forecast.share == pytest.approx((5.5 + 1.8) / 20)


def test_a_phase_that_time_ends_is_no_longer_than_that() -> None:
    forecast = Forecast((Part("a", 4, 1.0), Part("b", 100, 100.0, at_most=50.0), Part("c", 4, 1.0)))
    end = run(forecast, "a", 4, 2.0, 0.0)
    forecast.phase("b", 100, end)
    assert forecast.seconds_left(end) == pytest.approx(50 + 8)
    for _ in range(4):
        end += 5.0
        forecast.step(end)
    assert forecast.seconds_left(end) == pytest.approx(30 + 5, abs=4)
    forecast.phase("c", 4, 58.0)
    assert forecast.seconds_left(58.0) < 40


def test_without_a_plan_each_phase_is_all_that_is_known() -> None:
    forecast = Forecast(())
    run(forecast, "x", 2, 1.0, 0.0)
    assert forecast.share == 1
    forecast.phase("y", 4, 2.0)
    assert forecast.share == 0
    forecast.step(4.0)
    assert forecast.share == 0.25


def test_a_function_hears_counts_of_each_phase() -> None:
    heard: list[tuple[int, int]] = []
    with hearing(lambda done, total: heard.append((done, total))) as report:
        assert isinstance(report, Counted)
        for name, steps in (("a", 2), ("b", 1)):
            report.phase(name, steps)
            for _ in range(steps):
                report.step("")
    assert heard == [(1, 2), (2, 2), (1, 1)]
    with hearing(None) as report:
        assert report is SILENT
    with hearing(False) as report:
        assert report is SILENT
    with hearing(True) as report:
        assert isinstance(report, Bars)


def test_work_within_other_work_is_one_phase_of_it() -> None:
    heard: list[tuple[int, int]] = []
    inner = Within(Counted(lambda done, total: heard.append((done, total))), "calibrate")
    inner.planned(Estimate(parts=PLAN))
    for part in PLAN:
        inner.phase(part.name, part.steps)
        for _ in range(part.steps):
            inner.step("")
    assert heard == [(done, Within.STEPS) for done in range(1, Within.STEPS + 1)]


def test_a_file_gets_a_line_every_thirty_seconds_and_the_whole_time_once() -> None:
    stream, clock = io.StringIO(), Clock()
    with Bars(stream, clock) as bars:
        bars.planned(Estimate(parts=(Part("a", 100, 1.0),), notes=("little text",)))
        bars.phase("a", 100)
        for step in range(100):
            clock.now += 2.0
            bars.step(f"layer {step + 1}")
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["note: little text", "about 3.3 min in all, by the first steps"]
    assert lines[2] == "30 s, 15% done, 2.8 min left; a: layer 15"
    assert len(lines) == 2 + 6


def test_the_whole_is_not_announced_where_it_is_short() -> None:
    stream, clock = io.StringIO(), Clock()
    with Bars(stream, clock) as bars:
        bars.phase("a", 10)
        for _ in range(10):
            clock.now += 1.0
            bars.step("")
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("fails", (False, True))
def test_on_a_terminal_one_bar_ends_when_the_work_ends(fails: bool) -> None:
    stream, clock = Terminal(), Clock()
    with pytest.raises(ValueError) if fails else nullcontext(), Bars(stream, clock) as bars:
        bars.planned(Estimate(parts=(*PLAN, Part("never begun", 1, 1.0))))
        for part in PLAN:
            bars.phase(part.name, part.steps)
            clock.now += 60.0
            for _ in range(part.steps):
                bars.step("")
        if fails:
            raise ValueError
    last = stream.getvalue().replace("\r", "\n").strip().splitlines()[-1]
    assert ("100%" in last and "done in 2.0 min" in last) is not fails


@pytest.mark.parametrize(
    ("known", "line"),
    [
        ({"memory_bytes": 3_000_000}, "plan: 2,048 tokens, about 3.0 MB of memory\n"),
        (
            {"memory_bytes": 3_000_000, "passes": 4.0, "flops": 2e12, "disk_bytes": 5_000, "kept_bytes": 3_000},
            "plan: 2,048 tokens, work worth 4 forward passes over them (2.0 TFLOP), about 3.0 MB of memory, 5.0 kB on disk, of "
            "which 3.0 kB stay\n",
        ),
    ],
)
def test_a_plan_leaves_out_what_is_not_known(known: dict[str, Any], line: str) -> None:
    stream = io.StringIO()
    with Bars(stream) as bars:
        bars.planned(Estimate(parts=PLAN, tokens=2048, **known))
    assert stream.getvalue() == line
