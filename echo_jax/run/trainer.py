"""One run: a warm start on scripted demonstrations, then ECHO on its own rollouts.

In: the parts of a run, and its workdir, which may hold an unfinished run. Out: the workdir's metrics, rollouts and
checkpoints. The caller, lifecycle.py, claims the workdir and handles signals.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import jax
import numpy as np

from echo_jax.config import environments
from echo_jax.learner import parameters
from echo_jax.learner.checkpoint import Checkpointer, check_free_space
from echo_jax.learner.step import TrainState
from echo_jax.learner.update import Update, UpdateError
from echo_jax.models import lora
from echo_jax.objective.advantages import groups_of
from echo_jax.objective.weights import MODES, TokenWeights, weigh
from echo_jax.rollout import trajectory as trajectory_lib
from echo_jax.rollout.collector import Collector, Interrupted, Job
from echo_jax.rollout.engine.interface import sleep
from echo_jax.rollout.summary import engine_metrics, rollout_metrics, summaries
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.run.build import Parts
from echo_jax.run.evaluator import Evaluator, evaluation_line
from echo_jax.run.joint_collector import JointCollector
from echo_jax.run.refill import Collected, Numbers, has_policy_term, refill_jobs, without_variance
from echo_jax.run.workdir import starting_point
from echo_jax.system.errors import UserError
from echo_jax.system.metrics import MetricsWriter
from echo_jax.system.peers import JointError
from echo_jax.system.profiler import Profiler
from echo_jax.system.progress import LastingConsole, Progress
from echo_jax.system.terminal import escaped

SHOWN = {"rollout/solve_rate": "solve rate", "observation/ce": "CE", "loss/total": "loss"}  # in the progress line
SHOWN_UNLESS_0 = {"rollout/rejected": "unscored", "rollout/broken": "broken"}
# Counts of the rollouts that an update gets; other metrics of rollouts are of the step's own tasks.
_OF_THE_UPDATE = tuple(f"rollout/{name}" for name in ("submitted", "accepted", "rejected", "broken"))
DEMONSTRATION_SEED = 10  # purposes folded into the run's seed
DEMONSTRATION_ORDER_SEED = 11


class TrainError(UserError, RuntimeError):
    """The run cannot continue; earlier checkpoints are intact."""


class Trainer:
    """One run. All its randomness is a function of (seed, step), so a checkpoint needs no random state."""

    def __init__(self, parts: Parts, collector: Collector, workdir: Path):
        self.parts = parts
        self.learner = parts.learner
        self.config = parts.config
        self.peers = parts.peers
        self.workdir = workdir
        self.collector = JointCollector(collector, self.peers)
        if self.peers.is_first:
            trajectory_lib.remove_shares(workdir / "rollouts")
        self.checkpointer = Checkpointer(workdir / "checkpoints", keep=self.config.checkpoint.keep)
        self.warm_steps = self.config.warm_start.num_steps
        self.last_step = self.warm_steps + self.config.num_steps
        self.step = 0
        self.starts_at = 0  # or the step of another run whose weights this one starts from
        self.observation_factor = 1.0  # on lambda, see objective/control.py
        self.state, self.frozen = self._restore_or_init()
        self.engine = parts.make_engine()  # its pool takes what the devices have left
        self.evaluator = Evaluator(parts, self.collector, self.engine, workdir)
        self.saved_step = self.checkpointer.latest_step()
        self.saved_time = time.monotonic()
        self.recorded_step = -1 if self.step == self.starts_at else self.step  # complete once its metrics are written
        self.profiler = Profiler(workdir / "profile", *self.config.system.profile_steps)
        first = self.step if self.step == self.starts_at else self.step + 1
        self.metrics = MetricsWriter(workdir, resume_step=first) if self.peers.is_first else None
        self.console = LastingConsole(quiet=not self.peers.is_first)
        self._reported: set[str] = set()  # places of exceptions that were printed
        self._jobs_ahead: dict[int, list[Job]] = {}  # step -> jobs that `_prepare` made for the one after it

    @property
    def params(self) -> dict:
        """All parameters of the policy."""
        return lora.join(self.state.params, self.frozen)

    def run(self) -> None:
        """Trains from the state of the workdir to the end of the run."""
        if self.step < self.warm_steps:
            self._warm_start()
        elif self.step == self.starts_at:
            self._record(self._evaluate())
            self.recorded_step = self.step
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
        """Imitates demonstrations, with cross-entropy on the tool output in them."""
        warm = self.config.warm_start
        learner = self.learner
        demonstrations = self._demonstrations()
        objective = learner.imitation_objective()
        stream = grain.MapDataset.source(demonstrations)
        stream = stream.seed(_fold(self.config.seed, DEMONSTRATION_ORDER_SEED)).shuffle().repeat()
        update = Update(learner, learner.imitation_options(), learner.warm_start_schedule(), frozen=self.frozen)
        at_most = learner.share(warm.batch)
        with Progress("warm start", total=self.warm_steps, start=self.step, console=self.console) as progress:
            while self.step < self.warm_steps:
                self.collector.check_stop()
                start = time.perf_counter()
                first = self.step * warm.batch
                indices = self.peers.share(range(first, first + warm.batch))
                # A demonstration drawn twice in a batch counts as two sequences, not as branches of one rollout.
                chosen = [dataclasses.replace(stream[i], rollout=i) for i in indices]
                weights = weigh(chosen, np.zeros(len(chosen)), objective)
                compare = _due(self.step, self.config.loss.gradient_metrics_every)
                metrics = self._updated(update, chosen, weights, at_most=at_most, compare_gradients=compare)
                metrics["time/step"] = time.perf_counter() - start
                if self.step == self.warm_steps:
                    progress.log("evaluating the warm start on held-out tasks")
                    metrics |= self._evaluate()
                self._finish_step(metrics, progress)

    def _reinforce(self) -> None:
        """ECHO: samples rollouts, then makes one update on both actions and observations."""
        rollout, optimizer, loss = self.config.rollout, self.config.optimizer, self.config.loss
        learner = self.learner
        update = Update(
            learner,
            learner.loss_options(),
            learner.schedule(),
            passes=optimizer.updates_per_batch,
            mini_batches=optimizer.mini_batches,
            recompute=loss.old_logprobs == "recomputed",
            reference=self._reference() if learner.has_kl else None,
            frozen=self.frozen,
            control=learner.control,
        )
        if self.step == self.warm_steps:  # RL starts with a fresh optimizer, also when it starts by resuming
            self.state = learner.init_state(self.state.params, self.step)
        done = self.step - self.warm_steps
        with Progress("ECHO", total=self.config.num_steps, start=done, console=self.console) as progress:
            while self.step < self.last_step:
                self.collector.check_stop()
                self.profiler.before(self.step - self.warm_steps + 1)
                start = time.perf_counter()
                collected = self._rollouts()
                trajectories = collected.trained
                metrics, tokens = self._rollout_metrics(collected)
                rollout_seconds = time.perf_counter() - start
                metrics["rollout/retried"] = self.collector.retried
                metrics["rollout/raised"] = self.collector.raised
                metrics |= self._collection_metrics()
                rl_step = self.step - self.warm_steps
                with self._keeping(collected.sampled):
                    self._prepare()
                    weights = learner.weigh(trajectories, rl_step, self.peers.join)
                    metrics["rollout/filtered"] = sum(self.peers.gather(nothing_trained(trajectories, weights)))
                    metrics["rollout/accepted"] -= metrics["rollout/filtered"]
                    metrics |= self._updated(
                        update,
                        trajectories,
                        weights,
                        at_most=learner.rollouts_at_once,
                        compare_gradients=_due(rl_step, loss.gradient_metrics_every),
                        order=(self.config.seed, rl_step),
                        pool=self.peers.join,
                    )
                metrics |= self._observation_weights(rl_step)
                metrics["time/rollout"] = rollout_seconds
                metrics["time/step"] = time.perf_counter() - start
                metrics["rollout/tokens_per_second"] = tokens / rollout_seconds
                if _due(self.step, rollout.save_every) or self.step == self.last_step:
                    self._save_rollouts(f"step_{self.step:06d}", trajectories)
                    self.peers.first(self._forget_old_rollouts)
                if self._evaluates_after(self.step):
                    metrics |= self._evaluate()
                self.profiler.after(self.step - self.warm_steps)
                self._finish_step(metrics, progress)

    # Parts of a step.

    def _updated(self, update: Update, trajectories: list[Trajectory], weights, **options) -> dict[str, float]:
        """Advances state and step by one update; returns its metrics."""
        options["observation_factor"] = self.observation_factor
        try:
            self.state, metrics, self.observation_factor = update(self.state, trajectories, weights, **options)
        except UpdateError as error:
            raise TrainError(
                f"step {self.step + 1}: {error}. This step was not saved; the last checkpoint is of step "
                f"{self.saved_step}. Try a smaller optimizer.learning_rate, in another --workdir"
            ) from error
        self.step += 1
        return metrics

    def _observation_weights(self, rl_step: int) -> dict[str, float]:
        """Returns the lambda that an RL step, from 0, trained with: the run's, and that of each environment with
        settings of its own."""
        found = {}
        for environment in self.learner.configs:
            objective = self.learner.objective(rl_step, environment)
            observed = "observation" in MODES[objective.mode]
            name = "loss/observation_weight" + (f"_env_{environment}" if environment else "")
            found[name] = objective.observation_weight * self.observation_factor if observed else 0.0
        return found

    def _reference(self):
        """Returns the parameters at the start of RL, the reference of the KL; the workdir keeps them."""
        with Checkpointer(self.workdir / "reference", keep=1) as saved:
            if self.step in (self.warm_steps, self.starts_at) and saved.latest_step() is None:
                self.checkpointer.wait()  # orbax tells saves apart by their step alone: one at a time
                saved.save(self.step, self.state.params, {})
            return saved.restore(self.learner.abstract_trained)[0]

    def _evaluates_after(self, step: int) -> bool:
        """Returns whether this step of RL ends with an evaluation."""
        return _due(step - self.warm_steps, self.config.eval.every) or step == self.last_step

    def _jobs(self, step: int) -> list[Job]:
        """Returns this process's share of the rollouts that the policy after `step` makes."""
        parts, learner, groups = self.parts, self.learner, self.config.rollout.groups
        first_task = self._first_task(step)
        first_rollout = step * learner.rollouts_per_step
        environment = [parts.environments[first_task + group] for group in range(groups)]
        rollouts = [(group, i) for group in range(groups) for i in range(learner.group_size(environment[group]))]
        share = self.peers.share(rollouts)
        tasks = {group: parts.train_tasks[first_task + group] for group in dict(share)}
        return [
            Job(
                tasks[group],
                group=group,
                rollout=first_rollout + group * learner.largest_group + i,
                environment=environment[group],
                temperature=parts.temperatures.get(environment[group]),
            )
            for group, i in share
        ]

    def _first_task(self, step: int) -> int:
        """Returns the index of the first task of the step after `step`."""
        return self.config.warm_start.demonstrations + (step - self.warm_steps) * self.config.rollout.groups

    def _prepare(self) -> None:
        """Starts the first sandboxes of what follows this step's update, while that runs. It waits for no other
        process."""
        after = self.step + 1
        with contextlib.suppress(UserError):  # out of making a task: raised when the task is needed
            if self._evaluates_after(after):
                self.evaluator.prepare(episodes=self.config.eval.episodes)
            elif not self.parts.replay:
                self._jobs_ahead = {after: self._jobs(after)}
                self.collector.prepare(self._jobs_ahead[after], self.engine)

    def _rollouts(self) -> Collected:
        if self.parts.replay:
            return Collected.of(self._replayed())
        with self.peers.failing_together():
            jobs = self._jobs_ahead.pop(self.step, None) or self._jobs(self.step)
        self.peers.gather(None, "tasks")  # before the devices work together
        self.engine.set_params(self.params, self.step)
        path = self._rollouts_file(self._finished_rollouts)
        found = self.peers.first(path.exists)
        finished = trajectory_lib.load(path, vocab_size=self.learner.vocab_size) if found else []
        try:
            collected = self._collect(jobs, finished)
            sleep(self.engine)  # the update needs its memory
        except Interrupted as interrupted:
            if any(self.peers.gather(len(interrupted.finished))):
                self._save_rollouts(self._finished_rollouts, interrupted.finished)
            raise
        self.peers.first(lambda: path.unlink(missing_ok=True))
        self._report_exceptions()
        return collected

    def _collect(self, jobs: list[Job], finished: list[Trajectory]) -> Collected:
        """Samples a step's rollouts; replaces groups without variance, as often as rollout.refill_tries says.

        Args:
          jobs: this process's share of the step's own.
          finished: rollouts of this step, of any try, from before the run stopped.
        """
        collected = Collected.of(self.collector.rollouts(jobs, self.engine, finished=finished))
        groups = self._refillable()
        for attempt in itertools.count(1):
            again = groups & without_variance(collected.trained, self.peers.join) if groups else set()
            if not again or attempt > self.config.rollout.refill_tries:
                return dataclasses.replace(collected, unfilled=len(again))
            try:
                with self._keeping(collected.sampled):
                    new = self._refill_jobs(jobs, again, attempt)
                    self.peers.gather(None, "tasks of refills")
                    made = self.collector.rollouts(new, self.engine, finished=finished, adds=True)
            except Interrupted as interrupted:
                raise Interrupted([*self._without_exceptions(collected.sampled), *interrupted.finished]) from None
            collected = collected.replacing(again, made)

    def _refillable(self) -> set[int]:
        """Returns the groups of this step in which equal rewards would leave nothing to learn how to act from."""
        rollout, step = self.config.rollout, self.step - self.warm_steps
        if not rollout.refill_tries:
            return set()
        acting = {e for e in environments(self.config.task.mixture) if has_policy_term(self.config, e, step)}
        first = self._first_task(self.step)
        return {group for group in range(rollout.groups) if self.parts.environments[first + group] in acting}

    def _refill_jobs(self, jobs: list[Job], groups: set[int], attempt: int) -> list[Job]:
        rollout, places = self.config.rollout, self.learner.rollouts_per_step
        return refill_jobs(
            jobs,
            groups,
            attempt,
            step=self.step - self.warm_steps,
            first_rollout=self.step * places,
            numbers=Numbers(rollout.refill_tries, rollout.groups, places),
            spare_task=self.parts.spare_task,
        )

    def _rollout_metrics(self, collected: Collected) -> tuple[dict[str, float], int]:
        """Returns metrics of a step's rollouts, and their number of tokens, all tries included.

        With refills, what says how the policy acts, the solve rate above all, is of the rollouts on the step's own
        tasks: those that are trained were chosen by their rewards. The counts _OF_THE_UPDATE are of the trained ones.
        """
        header, entries = self.parts.renderer.observation_header, environments(self.config.task.mixture)
        tries = [summaries(made, header, self.peers) for made in collected.tries]
        samples = self.learner.largest_group
        metrics = rollout_metrics(tries[0], "rollout", entries, samples=samples)
        if self.config.rollout.refill_tries:
            trained = rollout_metrics(summaries(collected.trained, header, self.peers), "rollout", entries)
            metrics |= {name: value for name, value in trained.items() if name.startswith(_OF_THE_UPDATE)}
            metrics |= collected.metrics(self.config.rollout.groups)
        return metrics, sum(summary.tokens for made in tries for summary in made)

    def _collection_metrics(self) -> dict[str, float]:
        """Returns metrics of where the time of this step's collection went, and of its engine."""
        if self.parts.replay:
            return {}
        spent = self.collector.seconds()
        busy = spent.engine / (spent.engine + spent.host)
        times = {"time/engine": spent.engine, "time/tools": spent.tools, "rollout/device_busy": busy}
        return times | engine_metrics(self.collector.counts())

    @property
    def _finished_rollouts(self) -> str:
        """The name of the file of this step's rollouts that were finished when the run stopped."""
        return f"interrupted_{self.step:06d}"

    @contextlib.contextmanager
    def _keeping(self, trajectories: list[Trajectory]) -> Iterator[None]:
        """Saves the step's rollouts if an error stops the step, for the next start to train on; none in which a task or
        tool raised an exception, which may be mended by then."""
        try:
            with self.peers.failing_together():
                yield
        except Interrupted:
            raise  # with the rollouts to save
        except Exception as error:
            joint = self.peers.count == 1 or isinstance(error, JointError)  # else others never arrive to save theirs
            if joint and not self.parts.replay:
                self._save_rollouts(self._finished_rollouts, self._without_exceptions(trajectories))
            raise

    def _without_exceptions(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Returns this step's rollouts but for those in which a task or tool raised an exception."""
        raised = set(self.collector.raised_here())
        return [t for t in trajectories if t.rollout not in raised]

    def _report_exceptions(self) -> None:
        """Prints a line for the first exception of a place in a task or tool; `errors.log` has all of them."""
        headline = self.collector.first_raised.partition("\n")[0]
        _, _, raised = headline.partition(" raised ")
        what = raised.partition("): ")[0]  # type and place
        if raised and what not in self._reported:
            self._reported.add(what)
            self._say(f"exceptions in {self.collector.raised} rollouts, see {self.workdir / 'errors.log'}: {headline}")

    def _say(self, text: str) -> None:
        self.console.print(escaped(text), markup=False, highlight=False, soft_wrap=True)

    def _replayed(self) -> list[Trajectory]:
        """Returns the groups of saved rollouts that this step trains on; the steps cycle through all groups."""
        groups = list(groups_of(self.parts.replay).values())
        first = (self.step - self.warm_steps) * self.config.rollout.groups
        chosen = [
            dataclasses.replace(self.parts.replay[i], group=k)
            for k in range(self.config.rollout.groups)
            for i in groups[(first + k) % len(groups)]
        ]
        rollouts = list(dict.fromkeys((t.group, t.rollout) for t in chosen))  # with all their branches
        share = set(self.peers.share(rollouts))
        return [t for t in chosen if (t.group, t.rollout) in share]

    def _demonstrations(self) -> list[Trajectory]:
        """Returns the rollouts that the warm start imitates: saved ones, or scripted ones, made once per run."""
        warm = self.config.warm_start
        if self.parts.imitated:
            return self.parts.imitated
        path = self._rollouts_file("demonstrations")
        if not self.peers.first(path.exists):
            seed = _fold(self.config.seed, DEMONSTRATION_SEED)
            solve = np.random.default_rng(seed).random(warm.demonstrations) < warm.success_rate
            indices = self.peers.share(range(warm.demonstrations))
            parts = self.parts
            jobs = [Job(parts.train_tasks[i], group=i, rollout=i, environment=parts.environments[i]) for i in indices]
            with Progress("demonstrations", total=len(jobs), console=self.console) as progress:
                made = self.collector.scripted(jobs, solve[indices].tolist(), seed, progress.update)
            self._save_rollouts("demonstrations", made)
        return trajectory_lib.load(path, vocab_size=self.learner.vocab_size)

    def _evaluate(self) -> dict[str, float]:
        start = time.perf_counter()
        metrics = self.evaluator(self.params, self.step, episodes=self.config.eval.episodes)
        self._report_exceptions()
        self._say(evaluation_line({"step": self.step} | metrics))
        return metrics | {"time/evaluate": time.perf_counter() - start}

    def _record(self, metrics: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.write(self.step, metrics)

    def _finish_step(self, metrics: dict[str, float], progress: Progress) -> None:
        self._record(metrics)
        self.recorded_step = self.step
        shown = {label: metrics[name] for name, label in SHOWN.items() if name in metrics}
        shown |= {label: metrics[name] for name, label in SHOWN_UNLESS_0.items() if metrics.get(name)}
        progress.update(progress_step(self.step, self.warm_steps), shown)
        due = _due(self.step, self.config.checkpoint.every) or self.step in (self.warm_steps, self.last_step)
        if due or self._minutes_are_over():
            self.save()

    def save(self) -> None:
        """Saves a checkpoint of this step, in the background, unless it exists. Before its first step a run needs none:
        it starts anew."""
        if self.saved_step != self.step and (self.step > self.starts_at or self.step == self.last_step):
            parameters.save(self.checkpointer, self.step, self.state, self.frozen, self.observation_factor)
            self.saved_step = self.step
            self.saved_time = time.monotonic()

    def save_before_failing(self) -> None:
        """Saves a checkpoint if this step is complete and no update failed half-way; waits until it is on disk."""
        whole = not any(x.is_deleted() for x in jax.tree.leaves(self.state))
        if whole and self.recorded_step == self.step:
            self.save()
        self.checkpointer.wait()

    def _minutes_are_over(self) -> bool:
        """Returns whether checkpoint.minutes have passed since the last save, by the clock of process 0."""
        minutes = self.config.checkpoint.minutes
        return minutes > 0 and self.peers.first(lambda: time.monotonic() - self.saved_time > 60 * minutes)

    def _save_rollouts(self, name: str, trajectories: list[Trajectory]) -> None:
        path = self._rollouts_file(name)
        trajectory_lib.save_shares(path, trajectories, vocab_size=self.learner.vocab_size, peers=self.peers)

    def _forget_old_rollouts(self) -> None:
        """Removes all but the newest rollout.keep files of whole steps."""
        if keep := self.config.rollout.keep:
            for path in sorted((self.workdir / "rollouts").glob("step_*.jsonl.gz"))[:-keep]:
                path.unlink()

    def _rollouts_file(self, name: str) -> Path:
        return self.workdir / "rollouts" / f"{name}.jsonl.gz"

    def _restore_or_init(self) -> tuple[TrainState, dict]:
        newest = self.checkpointer.latest_step()
        self.peers.same({f"the newest checkpoint of {self.workdir}": newest}, "all processes must see the same workdir")
        if newest is not None:
            restored = parameters.restore(
                self.checkpointer, self.learner, self.parts.source, quiet=not self.peers.is_first
            )
            self.step = restored.step
            self.observation_factor = restored.observation_factor
            return restored.state, restored.frozen
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.learner.abstract_state()))
        check_free_space(self.workdir, size, self.config.checkpoint.keep)
        if self.config.init_from:
            return self._start_from_another_run()
        trained, frozen = parameters.begin(self.learner, self.parts.source, quiet=not self.peers.is_first)
        return self.learner.init_state(trained), frozen

    def _start_from_another_run(self) -> tuple[TrainState, dict]:
        """Returns the state after the warm start, or after some RL, of the run that config.init_from names, with a
        fresh optimizer; its steps count as this run's."""
        workdir, step = starting_point(self.config)
        with Checkpointer(workdir / "checkpoints") as saved:
            found = parameters.restore(saved, self.learner, self.parts.source, step=step, quiet=not self.peers.is_first)
        self.step = self.starts_at = found.step
        return self.learner.init_state(found.state.params, self.step), found.frozen


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
