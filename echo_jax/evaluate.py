"""Evaluates a checkpoint of a run on held-out tasks and prints one JSON line, which evaluations.jsonl keeps.

    python -m echo_jax.evaluate --workdir=runs/quickstart --episodes=256 --samples=1
    python -m echo_jax.evaluate --workdir=runs/quickstart --step=150 --config.rollout.temperature=0.5
    python -m echo_jax.evaluate --workdir=runs/quickstart --trajectories=FILE

The config is the one that the workdir recorded, or a file given with `--config`. Overrides may change anything but what
the run's parameters are: the temperature, the task mixture, limits.

In: parameters. Out: the solve rate over sampled rollouts on tasks never trained on, and `eval/observation_ce`, the
cross-entropy of tool output in fixed transcripts that a script, not the policy, produced on held-out tasks. With
`--trajectories` (rollouts that a run saved, for example another policy's) it samples nothing. It then prints the
cross-entropy of their tool output per class and tool, its action-shuffled control and the train/held-out gap (see
learner/scoring.py).
"""

import json

from absl import flags

from echo_jax.config import may_add
from echo_jax.run.workdir import recorded_config
from echo_jax.system.cli import define_config_of_run, define_path, run_program


def main(args: flags.FlagValues) -> None:
    # These take seconds to import, which --help and a misspelt flag need not wait for.
    from echo_jax.run.build import build, start_peers
    from echo_jax.run.evaluator import evaluate
    from echo_jax.run.revisions import settle_revisions

    settle_revisions(args.config, args.workdir)
    with start_peers(args.config) as peers:
        result = evaluate(
            build(args.config, peers),
            args.workdir,
            step=args.step,
            episodes=args.episodes,
            samples=args.samples,
            trajectories=args.trajectories,
        )
        if peers.is_first:
            print(json.dumps(result))


if __name__ == "__main__":
    define_config_of_run(recorded_config, may_add)
    define_path("workdir", "Folder of the run to evaluate.")
    flags.DEFINE_integer(
        "episodes", None, "Number of held-out tasks; default: eval.episodes of the config.", lower_bound=1
    )
    flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.", lower_bound=0)
    flags.DEFINE_integer("samples", 1, "Rollouts per task; above 1, also prints pass@k.", lower_bound=1)
    define_path("trajectories", "File of saved rollouts to score instead of sampling new ones.")
    run_program(main, required=("workdir",))
