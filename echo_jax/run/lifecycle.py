"""One start of a run, from claiming its workdir to DONE: signals, resuming, exit statuses.

In: a config and a workdir. Out: the exit status, one of those that train.py lists.
"""

import contextlib
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections

from echo_jax.learner.checkpoint import CheckpointError
from echo_jax.rollout.collector import Collector, Interrupted
from echo_jax.run.build import Parts, build
from echo_jax.run.evaluator import evaluation_line
from echo_jax.run.revisions import settle_revisions
from echo_jax.run.trainer import Trainer
from echo_jax.run.workdir import (
    Taken,
    check_workdir,
    claim_for,
    claim_workdir,
    finished_steps,
    only_process_in,
    record_config,
    starting_point,
)
from echo_jax.system import paths, provenance, user_code
from echo_jax.system.metrics import read_metrics
from echo_jax.system.peers import AGAIN, TAKEN, JointError, Peers
from echo_jax.system.terminal import escaped


@contextlib.contextmanager
def stop_on_signal(collector: Collector, peers: Peers) -> Iterator[list[int]]:
    """Turns the first SIGINT, SIGTERM or SIGHUP (the terminal was closed), to this process or another of the run, into
    `collector.stop`; a second one ends the process as usual.

    Yields a list; the signal's number is appended to it. A run under nohup goes on after SIGHUP.
    """
    received: list[int] = []
    # What ends with the terminal: the terminal itself, and a pipe to a program in it.
    lost = [fd for fd in (1, 2) if os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode)]

    def stop(number):
        received.append(number)
        collector.stop.set()

    def handle(number, _):
        stop(number)
        peers.stop(number)
        if number == signal.SIGHUP:  # a shell sends it once more; and whatever is printed from now on would raise
            signal.signal(number, signal.SIG_IGN)
            for fd in lost:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        else:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        with contextlib.suppress(OSError):  # nobody may be reading any more
            os.write(1, b"\nstopping: saving a checkpoint (repeat to stop at once)\n")  # print is not reentrant

    peers.on_stop(stop)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(config: ml_collections.ConfigDict, workdir: Path, *, owner: str = "", peers: Peers | None = None) -> int:
    """Starts or resumes a run; returns the exit status, see above.

    Raises:
      UserError, OSError: the message says what is wrong and what to do; no work is lost.
    """
    settle_revisions(config, workdir)
    parts = build(config, peers)
    peers = parts.peers
    if config.system.compilation_cache:
        cache = Path(paths.expanded(config.system.compilation_cache)).absolute()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if config.init_from and not (workdir / "config.json").exists():
        starting_point(config)  # before a wrong one is recorded
    done, steps = workdir / "DONE", config.warm_start.num_steps + config.num_steps
    with contextlib.ExitStack() as held:

        def claim() -> str:
            claim_workdir(config, workdir)
            if finished_steps(workdir) == steps:
                return "done"
            try:
                held.enter_context(only_process_in(workdir))
                if owner:
                    claim_for(owner, workdir)
            except Taken as taken:
                print(f"error: {escaped(taken)}", file=sys.stderr)
                return "taken"
            done.unlink(missing_ok=True)  # the run is extended
            record_config(config, workdir)
            return "ours"

        whose = peers.first(claim)
        if whose == "taken":
            return TAKEN
        check_workdir(config, workdir)
        if whose == "ours":
            if status := _run(parts, workdir):
                return status
            peers.first(lambda: done.write_text(f"{steps} steps\n", encoding="utf-8"))
        if peers.is_first:
            print(escaped(summary(workdir)))
    return 0


@contextlib.contextmanager
def _closing(trainer: Trainer, peers: Peers) -> Iterator[None]:
    """Closes the trainer. Closing waits for a save in progress and so for the other processes, which may never arrive
    after an error: then a trainer of several processes is left open."""
    try:
        yield
    except BaseException:
        if peers.count == 1:
            trainer.close()
        raise
    trainer.close()


def _run(parts: Parts, workdir: Path) -> int:
    """Trains to the end, or until it is stopped; returns the exit status."""
    peers = parts.peers

    def say(text: str) -> None:
        if peers.is_first:
            print(escaped(text), flush=True)

    errors = workdir / ("errors.log" if peers.is_first else f"errors_process_{peers.index}.log")
    with (
        user_code.log_to(errors),
        parts.make_collector() as collector,
        stop_on_signal(collector, peers) as received,
    ):
        trainer = Trainer(parts, collector, workdir)
        with _closing(trainer, peers):
            if peers.is_first:
                provenance.record(workdir)
            if trainer.starts_at:
                say(f"starting {workdir} at step {trainer.step} of {trainer.last_step}, from {parts.config.init_from}")
            elif trainer.step:
                say(f"resuming {workdir} from step {trainer.step} of {trainer.last_step}")
            try:
                trainer.run()
            except Interrupted:
                if trainer.recorded_step == trainer.step:  # else its metrics are not written yet: the step is repeated
                    trainer.save()
                stopped = f"stopped; run the same command again to resume from step {trainer.saved_step or 0}"
                say(f"{stopped} of {trainer.last_step}")
                signals = peers.gather(received[0] if received else 0, "stop")
                return 128 + signal.SIGINT if signal.SIGINT in signals else AGAIN
            except Exception as error:
                full = isinstance(error, OSError | CheckpointError) and not isinstance(error, BrokenPipeError)
                if not full and (peers.count == 1 or isinstance(error, JointError)):
                    trainer.save_before_failing()
                    step = trainer.saved_step
                    kept = f"step {step} of {trainer.last_step} is saved" if step else "no step was complete"
                    say(f"stopped by an error; {kept}")
                raise
    return 0


def summary(workdir: Path) -> str:
    """Returns a text with the first and the last evaluation of a run, from its metrics."""
    evaluations = [r for r in read_metrics(workdir / "metrics.jsonl") if r.get("eval/pass@1") is not None]
    ends = evaluations[:1] + evaluations[1:][-1:]
    return "\n".join([f"complete: {workdir}", *(f"  {evaluation_line(record)}" for record in ends)])
