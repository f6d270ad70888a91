import io
import re

import pytest
from rich.console import Console

from echo_jax.run.trainer import SHOWN
from echo_jax.system.progress import Progress


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=False)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_without_a_terminal_it_prints_the_first_the_last_and_a_line_every_ten_seconds():
    clock, console = Clock(), plain_console()
    with Progress("warm start", total=200, console=console, clock=clock) as progress:
        for step in range(1, 36):
            clock.now += 1
            progress.update(step, {"loss": 1 / step, "rows": step})
    assert lines(console) == [
        "warm start  1/200  1.0 steps/s  eta 3:19  loss 1  rows 1",
        "warm start  11/200  1.0 steps/s  eta 3:09  loss 0.0909  rows 11",
        "warm start  21/200  1.0 steps/s  eta 2:59  loss 0.0476  rows 21",
        "warm start  31/200  1.0 steps/s  eta 2:49  loss 0.0323  rows 31",
        "warm start  35/200  1.0 steps/s  eta 2:45  loss 0.0286  rows 35",
    ]


def test_last_line_is_printed_once_and_no_steps_print_nothing():
    clock, console = Clock(), plain_console()
    with Progress("eval", total=1, console=console, clock=clock) as progress:
        progress.update(1)
    assert lines(console) == ["eval  1/1"]
    with Progress("nothing", total=0, console=console, clock=clock):
        pass
    assert lines(console) == ["eval  1/1"]


def test_resumed_phase_shows_the_rate_of_this_process_only():
    clock, console = Clock(), plain_console()
    with Progress("rl", total=200, start=150, console=console, clock=clock) as progress:
        clock.now += 100
        progress.update(160)
    assert lines(console) == ["rl  160/200  10.0 s/step  eta 6:40"]


def test_last_state_is_shown_when_the_phase_fails():
    clock, console = Clock(), plain_console()

    def phase():
        with Progress("rl", total=9, console=console, clock=clock) as progress:
            progress.update(1)
            progress.update(2, {"loss": float("nan")})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        phase()
    assert lines(console) == ["rl  1/9", "rl  2/9  loss nan"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.123"), (3, "3"), (123456789, "123456789"), (1e-7, "1e-07"), (4567.8, "4.57e+03")]
)
def test_metrics_are_compact(value: float, text: str):
    console = plain_console()
    with Progress("p", total=2, console=console, clock=Clock()) as progress:
        progress.update(1, {"x": value})
    assert lines(console) == [f"p  1/2  x {text}"]


def test_terminal_bar_shows_the_same_and_logged_lines_stay_whole():
    clock = Clock()
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with Progress("warm [start]", total=200, start=50, console=console, clock=clock) as progress:
        clock.now += 10
        progress.update(100, {"loss": 1.234})
        progress.log("a [bold]line[/bold] of " + "x" * 150)
        progress.update(200, {"loss": 0.5})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()
    assert [line for line in shown if "xxx" in line] == ["a [bold]line[/bold] of " + "x" * 150]
    last = [line for line in shown if line.startswith("warm [start]")][-1]
    assert "━" in last
    assert "200/200  15.0 steps/s  eta 0:00  loss 0.5" in last
    assert all(len(line) <= 100 for line in shown if line.startswith("warm"))


def test_long_text_is_cut_at_the_terminals_width():
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    with Progress("rl", total=2, console=console, clock=Clock()) as progress:
        progress.update(1, {f"metric_{i}": i for i in range(20)})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()
    assert max(len(line) for line in shown) <= 60
    assert any("metric_0 0" in line and line.rstrip().endswith("…") for line in shown)


def test_at_80_columns_the_solve_rate_of_a_long_run_is_visible():
    clock = Clock()
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    metrics = dict(zip(SHOWN.values(), (0.375, 3.234, 0.1214), strict=True))
    with Progress("ECHO", total=10000, console=console, clock=clock) as progress:
        clock.now += 12.3 * 1000
        progress.update(1000, metrics)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()
    assert any("1000/10000  12.3 s/step  eta 30:45:00  solve rate 0.375" in line for line in shown)
