"""Evaluates a run's latest checkpoint on held-out tasks and prints one JSON line.

    python -m echo_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart --episodes=256 --samples=1
    python -m echo_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart --trajectories=FILE

In: parameters. Out: the solve rate over sampled rollouts on tasks never trained on, and `eval/observation_ce`, the
cross-entropy of tool output in fixed transcripts that a script, not the policy, produced on held-out tasks. With
`--trajectories` (rollouts that a run saved, for example another policy's) it samples nothing. It then prints the
cross-entropy of their tool output per class and tool, its action-shuffled control and the train/held-out gap (see
learner/scoring.py).
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from echo_jax.run.build import build, start_peers
from echo_jax.run.evaluator import evaluate
from echo_jax.system.cli import run_program


def main(args: flags.FlagValues) -> None:
    with start_peers(args.config) as peers:
        result = evaluate(
            build(args.config, peers),
            Path(args.workdir),
            episodes=args.episodes,
            samples=args.samples,
            trajectories=args.trajectories,
        )
        if peers.is_first:
            print(json.dumps(result))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The run's config file, e.g. configs/quickstart.py.")
    flags.DEFINE_string("workdir", None, "Folder of the run to evaluate.")
    flags.DEFINE_integer(
        "episodes", None, "Number of held-out tasks; default: eval.episodes of the config.", lower_bound=1
    )
    flags.DEFINE_integer("samples", 1, "Rollouts per task; above 1, also prints pass@k.", lower_bound=1)
    flags.DEFINE_string("trajectories", None, "File of saved rollouts to score instead of sampling new ones.")
    run_program(main)
