"""Progress of a long phase: a live bar on a terminal, an occasional plain line elsewhere."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import rich.progress
from rich.console import Console
from rich.table import Column

from echo_jax.system.terminal import escaped


class LastingConsole(Console):
    """A console that falls silent when nobody reads any more, as after `| head`; rich's would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Progress:
    """Shows step, rate, time left and a few metrics.

        with Progress("warm start", total=200, start=0) as progress:
            progress.update(step, {"loss": 1.23})

    The rate counts only the steps since `start`, so a resumed phase does not look faster than it is.
    """

    def __init__(
        self,
        title: str,
        total: int,
        start: int = 0,
        *,
        every_seconds: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
          title: names the phase.
          total: the step at which the phase is complete.
          start: the step from which this process continues.
          every_seconds: without a terminal, the least time between two lines; the first and the last always show.
          console: where to print; stdout if None.
          clock: seconds, monotonic.
        """
        self._title, self._total, self._start = escaped(title), total, start
        self._every_seconds, self._clock = every_seconds, clock
        self._console = Console() if console is None else console
        self._step = start
        self._metrics: Mapping[str, Any] = {}
        self._unshown = False
        self._shown_at: float | None = None
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self._console.is_terminal:
            text = rich.progress.TextColumn(
                "{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            )
            title = rich.progress.TextColumn("{task.description}", markup=False)
            bar = rich.progress.BarColumn(bar_width=10)
            self._bar = rich.progress.Progress(
                title, bar, text, console=self._console, refresh_per_second=4, expand=True
            )
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._start, text=self._text())
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._unshown:
            self._print_line()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Reports that `step` of `total` steps are done. Without `metrics`, the previous ones stay."""
        self._step = step
        self._metrics = self._metrics if metrics is None else metrics
        self._unshown = True
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text())
        elif self._shown_at is None or self._clock() - self._shown_at >= self._every_seconds:
            self._print_line()

    def log(self, text: str) -> None:
        """Prints a separate line, above the bar if there is one."""
        self._console.print(escaped(text), markup=False, highlight=False, soft_wrap=True)

    def _print_line(self) -> None:
        self._unshown, self._shown_at = False, self._clock()
        self.log(f"{self._title}  {self._text()}")

    def _text(self) -> str:
        done, elapsed = self._step - self._start, self._clock() - self._began
        parts = [f"{self._step}/{self._total}"]
        if done > 0 and elapsed > 0:
            parts += [_rate(done / elapsed), f"eta {_duration((self._total - self._step) * elapsed / done)}"]
        return escaped("  ".join(parts + [f"{name} {_compact(value)}" for name, value in self._metrics.items()]))


def _rate(steps_per_second: float) -> str:
    return f"{steps_per_second:.1f} steps/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.1f} s/step"


def _duration(seconds: float) -> str:
    """Formats as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _compact(value: Any) -> str:
    """Formats with three significant digits; integers in full."""
    return str(value) if isinstance(value, int) else f"{float(value):.3g}"
