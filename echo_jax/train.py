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
import dataclasses
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from echo_jax import provenance
from echo_jax import runtime as runtime_lib
from echo_jax import trajectory as trajectory_lib
from echo_jax.advantages import groups_of
from echo_jax.checkpoint import Checkpointer, check_free_space
from echo_jax.cli import run_program
from echo_jax.config import check_workdir, claim_workdir
from echo_jax.evaluate import Evaluator
from echo_jax.metrics import MetricsWriter, read_metrics
from echo_jax.models.transformer import init_params
from echo_jax.objective import MODES, TokenWeights, weigh
from echo_jax.peers import AGAIN, TAKEN, Peers
from echo_jax.profiler import Profiler
from echo_jax.progress import Progress
from echo_jax.rollout import Collector, Interrupted, Job
from echo_jax.rollout_metrics import rollout_metrics, summaries
from echo_jax.runtime import Runtime
from echo_jax.train_step import TrainState, init_state
from echo_jax.trajectory import Trajectory
from echo_jax.update import Update, UpdateError

SHOWN = ("loss/total", "observation/ce", "rollout/solve_rate", "eval/solve_rate", "eval/observation_ce")
DEMONSTRATION_SEED = 10  # purposes folded into the run's seed
DEMONSTRATION_ORDER_SEED = 11


class TrainError(RuntimeError):
    """The run cannot go on; what was saved before is intact."""


class Taken(TrainError):
    """Another process trains in the workdir, or another owner does from time to time."""


class Trainer:
    """One run. Everything random in it is a function of (seed, step), so a checkpoint needs no random state."""

    def __init__(self, runtime: Runtime, collector: Collector, workdir: Path):
        self.runtime = runtime
        self.config = runtime.config
        self.peers = runtime.peers
        self.workdir = workdir
        self.collector = collector
        self.engine = runtime.make_engine()
        self.evaluator = Evaluator(runtime, collector, self.engine, workdir)
        if self._writes:
            trajectory_lib.remove_shares(workdir / "rollouts")
        self.checkpointer = Checkpointer(workdir / "checkpoints", keep=self.config.checkpoint.keep)
        self.warm_steps = self.config.warm_start.num_steps
        self.last_step = self.warm_steps + self.config.num_steps
        self.step = 0
        self.state = self._restore_or_init()
        self.saved_step = self.checkpointer.latest_step()
        self.recorded_step = self.step  # a step is complete once its metrics are written
        self.profiler = Profiler(workdir / "profile", *self.config.system.profile_steps)
        self.metrics = MetricsWriter(workdir, resume_step=self.step + 1 if self.step else 0) if self._writes else None
        self.console = Console(quiet=not self._writes)

    @property
    def _writes(self) -> bool:
        return self.peers.is_first

    def run(self) -> None:
        """Goes from wherever the workdir stands to the end of the run."""
        if self.step < self.warm_steps:
            self._warm_start()
        elif self.step == 0:
            self._record(self._evaluate())
        if self.step < self.last_step:
            self._reinforce()
        self.save()

    def close(self) -> None:
        self.profiler.close()
        self.checkpointer.close()
        if self.metrics:
            self.metrics.close()

    # Phases.

    def _warm_start(self) -> None:
        """Imitates scripted demonstrations, with cross-entropy on what the tools answered them."""
        warm = self.config.warm_start
        runtime = self.runtime
        demonstrations = self._demonstrations()
        objective = runtime.imitation_objective()
        stream = grain.MapDataset.source(demonstrations)
        stream = stream.seed(_fold(self.config.seed, DEMONSTRATION_ORDER_SEED)).shuffle().repeat()
        update = Update(runtime, runtime.imitation_options(), warm.learning_rate)
        at_most = runtime.share(warm.batch)
        with Progress("warm start", total=self.warm_steps, start=self.step, console=self.console) as progress:
            while self.step < self.warm_steps:
                self.collector.check_stop()
                start = time.perf_counter()
                first = self.step * warm.batch
                own = self._share(range(first, first + warm.batch))
                # A demonstration that comes twice in a batch is two sequences, not branches of one rollout.
                chosen = [dataclasses.replace(stream[i], rollout=i) for i in own]
                weights = weigh(chosen, np.zeros(len(chosen)), objective)
                metrics = self._updated(update, chosen, weights, at_most=at_most)
                metrics["time/step"] = time.perf_counter() - start
                if self.step == self.warm_steps:
                    progress.log("evaluating the warm start on held-out tasks")
                    metrics |= self._evaluate()
                self._finish_step(metrics, progress)

    def _reinforce(self) -> None:
        """ECHO: sample rollouts, then one update on actions and observations alike."""
        rollout, optimizer, loss = self.config.rollout, self.config.optimizer, self.config.loss
        runtime = self.runtime
        update = Update(
            runtime,
            runtime.loss_options(),
            optimizer.learning_rate,
            passes=optimizer.updates_per_batch,
            recompute=loss.old_logprobs == "recomputed",
            reference=self._reference() if loss.kl_weight else None,
        )
        if self.step == self.warm_steps:  # the phase begins with a fresh optimizer, also when it begins by resuming
            fresh = runtime.make_optimizer(optimizer.learning_rate)
            self.state = init_state(self.state.params, fresh, runtime.mesh, self.step)
        done = self.step - self.warm_steps
        with Progress("ECHO", total=self.config.num_steps, start=done, console=self.console) as progress:
            while self.step < self.last_step:
                self.collector.check_stop()
                self.profiler.before(self.step - self.warm_steps + 1)
                start = time.perf_counter()
                trajectories = self._rollouts()
                everyone = summaries(trajectories, runtime.renderer.observation_header, self.peers)
                rollout_seconds = time.perf_counter() - start
                metrics = rollout_metrics(everyone, "rollout")
                metrics["rollout/retried"] = sum(self.peers.gather(self.collector.retried))
                objective, pool = runtime.objective(self.step - self.warm_steps), self.peers.join
                weights = weigh(trajectories, runtime.advantages(trajectories, pool), objective, pool)
                metrics["rollout/filtered"] = sum(self.peers.gather(nothing_trained(trajectories, weights)))
                metrics["rollout/accepted"] -= metrics["rollout/filtered"]
                metrics |= self._updated(
                    update,
                    trajectories,
                    weights,
                    at_most=runtime.rollouts_at_once,
                    compare_gradients=_due(self.step - self.warm_steps, loss.gradient_metrics_every),
                )
                observed = "observation" in MODES[objective.mode]
                metrics["loss/observation_weight"] = objective.observation_weight if observed else 0.0
                metrics["time/rollout"] = rollout_seconds
                metrics["time/step"] = time.perf_counter() - start
                metrics["rollout/tokens_per_second"] = sum(r.tokens for r in everyone) / rollout_seconds
                if _due(self.step, rollout.save_every) or self.step == self.last_step:
                    self._save_rollouts(f"step_{self.step:06d}", trajectories)
                if _due(self.step - self.warm_steps, self.config.eval.every) or self.step == self.last_step:
                    metrics |= self._evaluate()
                self.profiler.after(self.step - self.warm_steps)
                self._finish_step(metrics, progress)

    # Parts of a step.

    def _share(self, everything: range) -> range:
        """Returns what of it this process does."""
        return everything[self.peers.index :: self.peers.count]

    def _updated(self, update: Update, trajectories: list[Trajectory], weights, **options) -> dict[str, float]:
        """Advances state and step by an update; returns its metrics."""
        try:
            self.state, metrics = update(self.state, trajectories, weights, **options)
        except UpdateError as error:
            raise TrainError(
                f"step {self.step + 1}: {error}. Nothing of it was saved; the last checkpoint is of step "
                f"{self.saved_step}. Try a smaller optimizer.learning_rate, in another --workdir"
            ) from error
        self.step += 1
        return metrics

    def _reference(self):
        """Returns the parameters that RL began with, which the KL is taken to; the workdir keeps them."""
        with Checkpointer(self.workdir / "reference", keep=1) as saved:
            if self.step == self.warm_steps and saved.latest_step() is None:
                self.checkpointer.wait()  # orbax knows saves of one step apart by nothing else: one at a time
                saved.save(self.step, self.state.params, {})
            return saved.restore(self.runtime.abstract_params)[0]

    def _rollouts(self) -> list[Trajectory]:
        if self.runtime.replay:
            return self._replayed()
        rollout = self.config.rollout
        first_task = self.config.warm_start.demonstrations + (self.step - self.warm_steps) * rollout.groups
        first_rollout = self.step * self.runtime.rollouts_per_step
        group_of = {i: i // rollout.group_size for i in self._share(range(self.runtime.rollouts_per_step))}
        tasks = {group: self.runtime.train_tasks[first_task + group] for group in set(group_of.values())}
        jobs = [Job(tasks[group], group=group, rollout=first_rollout + i) for i, group in group_of.items()]
        self.engine.set_params(self.state.params, self.step)
        name = f"interrupted_{self.step:06d}"  # what was made of this step's rollouts when the run was stopped
        path = self._rollouts_file(name)
        kept = self.peers.first(path.exists)
        finished = trajectory_lib.load(path, vocab_size=self.runtime.vocab_size) if kept else []
        try:
            trajectories = self.collector.rollouts(jobs, self.engine, finished=finished)
        except Interrupted as interrupted:
            if any(self.peers.gather(len(interrupted.finished))):
                self._save_rollouts(name, interrupted.finished)
            raise
        self.peers.first(lambda: path.unlink(missing_ok=True))
        return trajectories

    def _replayed(self) -> list[Trajectory]:
        """Returns the groups of saved rollouts that this step trains on, in turn."""
        groups = list(groups_of(self.runtime.replay).values())
        first = (self.step - self.warm_steps) * self.config.rollout.groups
        chosen = [
            dataclasses.replace(self.runtime.replay[i], group=k)
            for k in range(self.config.rollout.groups)
            for i in groups[(first + k) % len(groups)]
        ]
        rollouts = list(dict.fromkeys((t.group, t.rollout) for t in chosen))  # with all their branches
        own = set(rollouts[self.peers.index :: self.peers.count])
        return [t for t in chosen if (t.group, t.rollout) in own]

    def _demonstrations(self) -> list[Trajectory]:
        """Returns what the warm start imitates: rollouts that were saved, or scripted ones, made once a run."""
        warm = self.config.warm_start
        if self.runtime.imitated:
            return self.runtime.imitated
        path = self._rollouts_file("demonstrations")
        if not self.peers.first(path.exists):
            seed = _fold(self.config.seed, DEMONSTRATION_SEED)
            solve = np.random.default_rng(seed).random(warm.demonstrations) < warm.success_rate
            own = self._share(range(warm.demonstrations))
            jobs = [Job(self.runtime.train_tasks[i], group=i, rollout=i) for i in own]
            with Progress("demonstrations", total=len(jobs), console=self.console) as progress:
                made = self.collector.scripted(jobs, solve[own].tolist(), seed, progress.update)
            self._save_rollouts("demonstrations", made)
        return trajectory_lib.load(path, vocab_size=self.runtime.vocab_size)

    def _evaluate(self) -> dict[str, float]:
        start = time.perf_counter()
        metrics = self.evaluator(self.state.params, self.step, episodes=self.config.eval.episodes)
        return metrics | {"time/evaluate": time.perf_counter() - start}

    def _record(self, metrics: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.write(self.step, metrics)

    def _finish_step(self, metrics: dict[str, float], progress: Progress) -> None:
        self._record(metrics)
        self.recorded_step = self.step
        progress.update(progress_step(self.step, self.warm_steps), {k: metrics[k] for k in SHOWN if k in metrics})
        if _due(self.step, self.config.checkpoint.every) or self.step in (self.warm_steps, self.last_step):
            self.save()

    def save(self) -> None:
        """Saves a checkpoint of this step, in the background, unless there is one."""
        if self.saved_step != self.step:
            self.checkpointer.save(self.step, self.state, {"step": self.step})
            self.saved_step = self.step

    def _save_rollouts(self, name: str, trajectories: list[Trajectory]) -> None:
        path = self._rollouts_file(name)
        trajectory_lib.save_shares(path, trajectories, vocab_size=self.runtime.vocab_size, peers=self.peers)

    def _rollouts_file(self, name: str) -> Path:
        return self.workdir / "rollouts" / f"{name}.jsonl.gz"

    def _restore_or_init(self) -> TrainState:
        abstract = self.runtime.abstract_state()
        newest = self.checkpointer.latest_step()
        self.peers.same({f"the newest checkpoint of {self.workdir}": newest}, "all must see one and the same workdir")
        if newest is not None:
            state, saved = self.checkpointer.restore(abstract)
            self.step = saved["step"]
            return state
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
        check_free_space(self.workdir, size, self.config.checkpoint.keep)
        _, params = init_params(self.runtime.model_config, self.config.seed, self.runtime.mesh)
        return init_state(params, self.runtime.make_optimizer(0.0), self.runtime.mesh)


def nothing_trained(trajectories: Sequence[Trajectory], weights: Sequence[TokenWeights]) -> int:
    """Returns how many scored rollouts have no token that any term trains."""
    return sum(t.scored and not w.active.any() for t, w in zip(trajectories, weights, strict=True))


def progress_step(step: int, warm_steps: int) -> int:
    """Returns the step within its phase."""
    return step if step <= warm_steps else step - warm_steps


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _fold(seed: int, purpose: int) -> int:
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0])


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


def _run(runtime: Runtime, workdir: Path) -> int:
    """Trains to the end, or until it is stopped; returns the exit status."""
    peers = runtime.peers
    say = print if peers.is_first else lambda text: None
    with runtime.make_collector() as collector, stop_on_signal(collector, peers) as received:
        trainer = Trainer(runtime, collector, workdir)
        with contextlib.closing(trainer):
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
