"""Records some steps of a run with JAX's profiler; view them with `tensorboard --logdir` or xprof."""

from pathlib import Path

import jax


class Profiler:
    """Records steps `first` to `last`; none by default."""

    def __init__(self, directory: Path, first: int = 0, last: int = -1):
        self._directory, self._first, self._last = directory, first, last
        self._recording = False

    def before(self, step: int) -> None:
        if self._first <= step <= self._last and not self._recording:
            jax.profiler.start_trace(str(self._directory))
            self._recording = True

    def after(self, step: int) -> None:
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Ends and writes a recording in progress."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
