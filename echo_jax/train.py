"""Trains an agent: a warm start on scripted demonstrations, then ECHO on its own rollouts.

    python -m echo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart --config.seed=1

Run again on the same workdir, it resumes. The workdir holds config.json, provenance.jsonl (commit, diff and versions,
one line a start), metrics.jsonl (one object a step), tensorboard/, rollouts/, checkpoints/ and, with a KL, reference/;
and DONE when the run is complete. Ctrl-C and SIGTERM save a checkpoint and stop.

Several processes (see peers.py) train one run, in a workdir that all of them see. Each samples its share of a step's
rollouts with an engine of its own, then all update together; process 0 writes what is written once. Exit statuses: 0
complete, 75 stopped by SIGTERM or because a process was lost (the same command again goes on), 69 the workdir is
another's, 130 stopped by Ctrl-C, 1 an error to mend.
"""

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from echo_jax import provenance
from echo_jax import runtime as runtime_lib
from echo_jax.cli import run_program
from echo_jax.config import check_workdir, claim_workdir
from echo_jax.metrics import read_metrics
from echo_jax.peers import AGAIN, TAKEN, Peers
from echo_jax.rollout import Collector, Interrupted
from echo_jax.runtime import Runtime
from echo_jax.trainer import Trainer, TrainError


class Taken(TrainError):
    """Another process trains in the workdir, or another owner does from time to time."""


@contextlib.contextmanager
def only_process_in(workdir: Path) -> Iterator[None]:
    """Holds the workdir's lock; raises `Taken` if another run has it. A killed process leaves none."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Taken(f"another process is training in {workdir}; stop it, or use another --workdir") from error
        yield


def claim_for(owner: str, workdir: Path) -> None:
    """Makes the workdir the owner's; raises `Taken` if it is another's. Of two that try at once one gets it."""
    path = workdir / "owner"
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(owner)
    if (found := path.read_text()) != owner:
        raise Taken(f"{workdir} belongs to the owner {found!r}, not to {owner!r}; if that one is gone, delete {path}")


@contextlib.contextmanager
def stop_on_signal(collector: Collector, peers: Peers) -> Iterator[list[int]]:
    """Turns the first SIGINT or SIGTERM, of this process or another of the run, into `collector.stop`; a second one
    ends the process as usual.

    Yields a list that then holds the signal's number.
    """
    received: list[int] = []

    def stop(number):
        received.append(number)
        collector.stop.set()

    def handle(number, _):
        stop(number)
        peers.stop(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.write(1, b"\nstopping: saving a checkpoint (once more to stop at once)\n")  # print is not reentrant

    peers.on_stop(stop)
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(config: ml_collections.ConfigDict, workdir: Path, *, owner: str = "", peers: Peers | None = None) -> int:
    """Runs or resumes a run; returns the exit status, see above.

    Raises:
      one of runtime.USER_ERRORS: what is wrong and what to do, before work is lost.
    """
    runtime = runtime_lib.build(config, peers)
    peers = runtime.peers
    if config.system.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.system.compilation_cache).absolute()))
    done = workdir / "DONE"
    with contextlib.ExitStack() as held:

        def claim() -> str:
            claim_workdir(config, workdir)
            if done.exists():
                return "done"
            try:
                held.enter_context(only_process_in(workdir))
                if owner:
                    claim_for(owner, workdir)
            except Taken as taken:
                print(f"error: {taken}", file=sys.stderr)
                return "taken"
            return "ours"

        whose = peers.first(claim)
        if whose == "taken":
            return TAKEN
        check_workdir(config, workdir)
        if whose == "ours":
            if status := _run(runtime, workdir):
                return status
            peers.first(lambda: done.write_text(f"{config.warm_start.num_steps + config.num_steps} steps\n"))
        if peers.is_first:
            print(summary(workdir))
    return 0


@contextlib.contextmanager
def _closing(trainer: Trainer, peers: Peers) -> Iterator[None]:
    """Closes the trainer, which waits for a save under way, and so for the other processes: they may not come to it
    where one of them failed."""
    try:
        yield
    except BaseException:
        if peers.count == 1:
            trainer.close()
        raise
    trainer.close()


def _run(runtime: Runtime, workdir: Path) -> int:
    """Trains to the end, or until it is stopped; returns the exit status."""
    peers = runtime.peers
    say = print if peers.is_first else lambda text: None
    with runtime.make_collector() as collector, stop_on_signal(collector, peers) as received:
        trainer = Trainer(runtime, collector, workdir)
        with _closing(trainer, peers):
            if peers.is_first:
                provenance.record(workdir)
            if trainer.step:
                say(f"resuming {workdir} from step {trainer.step} of {trainer.last_step}")
            try:
                trainer.run()
            except Interrupted:
                if trainer.recorded_step == trainer.step:  # else its metrics are not written: it is made again
                    trainer.save()
                stopped = f"stopped; run the same command again to resume from step {trainer.saved_step or 0}"
                say(f"{stopped} of {trainer.last_step}")
                signals = peers.gather(received[0] if received else 0, "stop")
                return 128 + signal.SIGINT if signal.SIGINT in signals else AGAIN
    return 0


def summary(workdir: Path) -> str:
    """Returns the first and the last evaluation of a run, from its metrics."""
    lines = [f"complete: {workdir}"]
    evaluations = [r for r in read_metrics(workdir / "metrics.jsonl") if r.get("eval/pass@1") is not None]
    for record in evaluations[:1] + evaluations[1:][-1:]:
        lines.append(
            f"  step {record['step']}: held-out solve rate {record['eval/solve_rate']:.3f} "
            f"± {record['eval/pass@1_stderr']:.3f}, observation CE {record['eval/observation_ce']:.3f} nats"
        )
    return "\n".join(lines)


def main(args: flags.FlagValues) -> int:
    with runtime_lib.start_peers(args.config, (*runtime_lib.USER_ERRORS, TrainError)) as peers:
        return train(args.config, Path(args.workdir), owner=args.owner, peers=peers)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file; override any field with --config.section.field=value."
    )
    flags.DEFINE_string("workdir", None, "Folder of the run; an unfinished run in it is resumed.")
    flags.DEFINE_string("owner", "", "Take the run only if no other owner has: for several that share one sweep.")
    run_program(main, (*runtime_lib.USER_ERRORS, TrainError))
