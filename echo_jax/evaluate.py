"""Evaluates a run's latest checkpoint on held-out tasks and prints one JSON line.

    python -m echo_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart --episodes=256 --samples=1
    python -m echo_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart --trajectories=FILE

In: parameters. Out: the solve rate over sampled rollouts on tasks never trained on, and `eval/observation_ce`, the
cross-entropy of tool output on fixed transcripts that a script, not the policy, produced on held-out tasks. With
`--trajectories` (rollouts that a run saved, say another policy's) nothing is sampled: the cross-entropy of their tool
output per class and tool, with its action-shuffled control and the train/held-out gap (see world_model.py).
"""

import json
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags

from echo_jax import runtime as runtime_lib
from echo_jax import trajectory as trajectory_lib
from echo_jax.checkpoint import Checkpointer
from echo_jax.cli import run_program
from echo_jax.config import check_workdir
from echo_jax.engine.dense import DenseEngine
from echo_jax.policy import restore
from echo_jax.rollout import Collector, Job
from echo_jax.rollout_metrics import Summary, rollout_metrics, summaries
from echo_jax.runtime import Runtime
from echo_jax.trajectory import Trajectory
from echo_jax.world_model import Scorer, compare

FIRST_EVAL_ROLLOUT = 1 << 30  # sampling keys of evaluation: away from training's, the same at every evaluation
SHUFFLE_SEED = 21
TRANSCRIPT_SEED = 20  # of the scripts behind the fixed transcripts


class Evaluator:
    """Evaluates parameters of one run: make it once, use it at every evaluation."""

    def __init__(self, runtime: Runtime, collector: Collector, engine: DenseEngine, workdir: Path):
        self._runtime = runtime
        self._collector = collector
        self._engine = engine
        self._workdir = workdir
        self._score = Scorer(runtime)
        self._transcripts: list[Trajectory] | None = None

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
        runtime, peers = self._runtime, self._runtime.peers
        self._engine.set_params(params, version)
        jobs = [
            Job(runtime.heldout_tasks[task], group=task, rollout=FIRST_EVAL_ROLLOUT + task * samples + sample)
            for task in peers.share(range(episodes))
            for sample in range(samples)
        ]
        trajectories = self._collector.rollouts(jobs, self._engine, on_finish)
        rollouts = summaries(trajectories, runtime.renderer.observation_header, peers)
        metrics = rollout_metrics(rollouts, "eval") | pass_at_k(rollouts, samples)
        metrics["eval/observation_ce"] = self.observation_ce(params)
        return metrics

    def observation_ce(self, params) -> float:
        """Returns the mean cross-entropy, in nats a token, of the tool output in the fixed held-out transcripts."""
        if self._transcripts is None:
            self._transcripts = self._load_transcripts()
        return self._score(params, self._transcripts)["ce"]

    def _load_transcripts(self) -> list[Trajectory]:
        """Half right, half flawed demonstrations on held-out tasks: the same for every run of a config's tasks."""
        runtime, peers = self._runtime, self._runtime.peers
        path = self._workdir / "rollouts" / "heldout_transcripts.jsonl.gz"
        if not peers.first(path.exists):
            own = peers.share(range(runtime.config.eval.transcripts))
            jobs = [Job(runtime.heldout_tasks[i], group=i, rollout=FIRST_EVAL_ROLLOUT + i) for i in own]
            made = self._collector.scripted(jobs, [i % 2 == 0 for i in own], TRANSCRIPT_SEED)
            trajectory_lib.save_shares(path, made, vocab_size=runtime.vocab_size, peers=peers)
        return trajectory_lib.load(path, vocab_size=runtime.vocab_size)


def pass_at_k(rollouts: Sequence[Summary], samples: int) -> dict[str, float]:
    """Returns pass@1 and pass@`samples` with the standard error over tasks, by the unbiased estimator
    1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1); rollouts that were not scored are left out."""
    tasks: dict[int, list[bool]] = {}
    for rollout in rollouts:
        if rollout.scored:
            tasks.setdefault(rollout.group, []).append(rollout.reward >= 1.0)
    metrics = {}
    for k in sorted({1, samples}):
        rates = [1.0 - comb(len(s) - sum(s), k) / comb(len(s), k) for s in tasks.values() if len(s) >= k]
        if rates:
            metrics[f"eval/pass@{k}"] = float(np.mean(rates))
            metrics[f"eval/pass@{k}_stderr"] = (
                float(np.std(rates, ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else 0.0
            )
    return metrics


def main(args: flags.FlagValues) -> None:
    with runtime_lib.start_peers(args.config) as peers:
        result = evaluate(args, runtime_lib.build(args.config, peers))
        if peers.is_first:
            print(json.dumps(result))


def evaluate(args: flags.FlagValues, runtime: Runtime) -> dict:
    """Returns what the program prints."""
    config, workdir = runtime.config, Path(args.workdir)
    check_workdir(config, workdir)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        policy = restore(checkpointer, runtime)
    result = {"step": policy.step}
    if args.trajectories:
        trajectories = trajectory_lib.load(Path(args.trajectories), vocab_size=runtime.vocab_size)
        result |= {"trajectories": args.trajectories, "count": len(trajectories)}
        result |= compare(Scorer(runtime), policy.params, trajectories, SHUFFLE_SEED)
    else:
        episodes = args.episodes or config.eval.episodes
        with runtime.make_collector() as collector:
            evaluator = Evaluator(runtime, collector, runtime.make_engine(), workdir)
            metrics = evaluator(policy.params, policy.step, episodes=episodes, samples=args.samples)
        result |= {"episodes": episodes, "samples": args.samples} | metrics
    return result


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The run's config file, e.g. configs/quickstart.py.")
    flags.DEFINE_string("workdir", None, "Folder of the run to evaluate.")
    flags.DEFINE_integer("episodes", None, "Held-out tasks; default: eval.episodes of the config.", lower_bound=1)
    flags.DEFINE_integer("samples", 1, "Rollouts a task; above 1, pass@k is printed too.", lower_bound=1)
    flags.DEFINE_string("trajectories", None, "A file of saved rollouts to score, in place of sampling new ones.")
    run_program(main, runtime_lib.USER_ERRORS)
