"""How well a policy acts on held-out tasks, and how well it predicts the tool output there.

In: parameters. Out: metrics under `eval/`.
"""

import datetime
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echo_jax.config import environments
from echo_jax.learner.checkpoint import Checkpointer
from echo_jax.learner.parameters import restore
from echo_jax.learner.scoring import Scorer, compare
from echo_jax.roles import Role
from echo_jax.rollout import trajectory as trajectory_lib
from echo_jax.rollout.collector import Job
from echo_jax.rollout.engine import Engine
from echo_jax.rollout.engine.interface import sleep
from echo_jax.rollout.summary import Summary, pass_rates, rollout_metrics, summaries
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.run.build import Parts
from echo_jax.run.joint_collector import JointCollector
from echo_jax.run.workdir import check_workdir, differences, may_change
from echo_jax.system import user_code
from echo_jax.system.terminal import escaped
from echo_jax.tasks.task import has_demonstrator

FIRST_EVAL_ROLLOUT = 1 << 30  # apart from training's sampling keys, and the same at every evaluation
SHUFFLE_SEED = 21
TRANSCRIPTS = "heldout_transcripts"
TRANSCRIPT_SEED = 20  # of the scripts behind the fixed transcripts


class Evaluator:
    """Evaluates parameters of one run; one object serves all its evaluations."""

    def __init__(
        self, parts: Parts, collector: JointCollector, engine: Engine, workdir: Path, transcripts: str = TRANSCRIPTS
    ):
        """Scores the transcripts in the file of this name among the workdir's rollouts; makes them if there are
        none."""
        self._parts = parts
        self._file = workdir / "rollouts" / f"{transcripts}.jsonl.gz"
        self._collector = collector
        self._engine = engine
        self._score = Scorer(parts.learner, parts.peers)
        self._transcripts: list[Trajectory] | None = None
        self._jobs_ahead: dict[tuple[int, int], list[Job]] = {}  # (episodes, samples) -> the jobs of `prepare`

    def prepare(self, *, episodes: int, samples: int = 1) -> None:
        """Starts the sandboxes that the next evaluation begins with. It waits for no other process."""
        jobs = self._jobs(episodes, samples)
        self._jobs_ahead = {(episodes, samples): jobs}
        self._collector.prepare(jobs, self._engine)

    def __call__(
        self,
        params,
        version: int,
        *,
        episodes: int,
        samples: int = 1,
        on_finish: Callable[[int], None] = lambda done: None,
    ) -> dict[str, float]:
        """Returns the `eval/` metrics of `samples` rollouts on each of `episodes` held-out tasks, which the processes
        share."""
        parts, peers = self._parts, self._parts.peers
        self._engine.set_params(params, version)
        jobs = self._jobs_ahead.pop((episodes, samples), None) or self._jobs(episodes, samples)
        trajectories = self._collector.rollouts(jobs, self._engine, on_finish)
        sleep(self._engine)
        rollouts = summaries(trajectories, parts.renderer.observation_header, peers)
        metrics = rollout_metrics(rollouts, "eval", environments(parts.config.task.mixture))
        metrics["eval/raised"] = self._collector.raised
        metrics |= pass_at_k(rollouts, samples)
        if (ce := self.observation_ce(params)) is not None:
            metrics["eval/observation_ce"] = ce
        return metrics

    def _jobs(self, episodes: int, samples: int) -> list[Job]:
        """Returns this process's share of an evaluation's rollouts."""
        parts = self._parts
        return [
            Job(
                parts.heldout_tasks[task],
                group=task,
                rollout=FIRST_EVAL_ROLLOUT + task * samples + sample,
                environment=environment,
                temperature=parts.temperatures.get(environment),
            )
            for task in parts.peers.share(range(episodes))
            for environment in [parts.environments[task]]
            for sample in range(samples)
        ]

    def observation_ce(self, params) -> float | None:
        """Returns the mean cross-entropy, in nats per token, of the tool output in the fixed held-out transcripts; None
        without transcripts."""
        if self._transcripts is None:
            self._transcripts = self._find_transcripts()
        return self._score(params, self._transcripts)["ce"] if self._transcripts else None

    def _find_transcripts(self) -> list[Trajectory]:
        """Returns the transcripts that the config names, or demonstrations on held-out tasks, half right and half
        flawed: the same for every run on a config's tasks."""
        parts, peers = self._parts, self._parts.peers
        if parts.transcripts:
            return parts.transcripts
        path = self._file
        if not peers.first(path.exists):
            tasks = {i: parts.heldout_tasks[i] for i in range(parts.config.eval.transcripts)}
            scripted = [i for i, task in tasks.items() if has_demonstrator(task)]
            if not scripted:
                return self._without("the held-out tasks have no demonstrators")
            mine = peers.share(scripted)
            jobs = [
                Job(tasks[i], group=i, rollout=FIRST_EVAL_ROLLOUT + i, environment=parts.environments[i]) for i in mine
            ]
            made = self._collector.scripted(jobs, [i % 2 == 0 for i in mine], TRANSCRIPT_SEED)
            trajectory_lib.save_shares(path, made, vocab_size=parts.learner.vocab_size, peers=peers)
        found = trajectory_lib.load(path, vocab_size=parts.learner.vocab_size)
        if not any(t.count(Role.OBSERVATION) for t in found):
            return self._without("the demonstrators of the held-out tasks call no tool that answers")
        return found

    def _without(self, reason: str) -> list[Trajectory]:
        if self._parts.peers.is_first:
            advice = "to get it, set config.eval.trajectories to a file of saved rollouts"
            print(f"eval/observation_ce is left out: {reason}; {advice}", file=sys.stderr)
        return []


def pass_at_k(rollouts: Sequence[Summary], samples: int) -> dict[str, float]:
    """Returns pass@1 and pass@`samples` with the standard error over tasks, see `pass_rates`; rollouts that were not
    scored are left out."""
    metrics = {}
    for k in sorted({1, samples}):
        if rates := pass_rates(rollouts, k):
            metrics[f"eval/pass@{k}"] = float(np.mean(rates))
            metrics[f"eval/pass@{k}_stderr"] = (
                float(np.std(rates, ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else 0.0
            )
    return metrics


def evaluation_line(record: Mapping[str, Any]) -> str:
    """Returns the main results of a step with an evaluation as one line. Rollouts that the solve rate leaves out are
    counted beside it."""
    rate = "no rollout could be scored"
    if "eval/pass@1" in record:
        rate = f"held-out solve rate {record['eval/solve_rate']:.3f} ± {record['eval/pass@1_stderr']:.3f}"
        if unscored := record.get("eval/rejected"):
            rate += f" ({unscored} of {record['eval/submitted']} rollouts unscored)"
    ce = record.get("eval/observation_ce")
    return f"step {record['step']}: {rate}" + (f", observation CE {ce:.3f} nats" if ce is not None else "")


def evaluate(
    parts: Parts,
    workdir: Path,
    *,
    step: int | None = None,
    episodes: int | None = None,
    samples: int = 1,
    trajectories: Path | None = None,
) -> dict[str, Any]:
    """Returns the results that `echo_jax.evaluate` prints for a checkpoint; `evaluations.jsonl` in the workdir keeps
    them, with the fields in which the config differs from the run's.

    Args:
      step: of the checkpoint; None: the newest.
      episodes: number of held-out tasks; None: eval.episodes of the config.
      samples: rollouts per task.
      trajectories: a file of saved rollouts to score instead of sampling.
    """
    config, quiet = parts.config, not parts.peers.is_first
    check_workdir(config, workdir, only_parameters=True)
    overrides = {name: ours for name, (_, ours) in differences(config, workdir).items()}
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        policy = restore(checkpointer, parts.learner, parts.source, step=step, quiet=quiet)
    result = {"step": policy.step}
    if trajectories:
        saved = trajectory_lib.load(trajectories, vocab_size=parts.learner.vocab_size)
        result |= {"trajectories": str(trajectories), "count": len(saved)}
        result |= compare(Scorer(parts.learner, parts.peers), policy.params, saved, SHUFFLE_SEED)
    else:
        episodes = episodes or config.eval.episodes
        with parts.make_collector() as collector, user_code.log_to(workdir / "errors.log"):
            joint, transcripts = JointCollector(collector, parts.peers), _transcripts_of(overrides)
            evaluator = Evaluator(parts, joint, parts.make_engine(), workdir, transcripts)
            metrics = evaluator(policy.params, policy.step, episodes=episodes, samples=samples)
        result |= {"episodes": episodes, "samples": samples} | metrics
        if joint.raised and parts.peers.is_first:
            headline = joint.first_raised.partition("\n")[0]
            said = f"exceptions in {joint.raised} rollouts, see {workdir / 'errors.log'}: {headline}"
            print(escaped(said), file=sys.stderr)
        if (unscored := metrics["eval/rejected"]) and parts.peers.is_first:
            cause = f": {collector.fault}" if collector.fault else ""
            count = f"{unscored} of {metrics['eval/submitted']}"
            said = f"{count} rollouts could not be scored and are in no solve rate{cause}"
            print(escaped(said), file=sys.stderr)
    if parts.peers.is_first:
        line = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "overrides": overrides}
        with (workdir / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | result) + "\n")
    return result


def _transcripts_of(overrides: Mapping[str, Any]) -> str:
    """Returns the name of the fixed transcripts' file: other tasks, tools or limits than the run's have another."""
    made_by = {
        name: value
        for name, value in overrides.items()
        if name.startswith(("task.", "tools.", "render.", "rollout.", "sandbox.", "eval.transcripts"))
        and name != "rollout.temperature"
        and not may_change(name)
    }
    if not made_by:
        return TRANSCRIPTS
    return f"{TRANSCRIPTS}_{hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]}"
