"""Runs a sweep: every run of a config file's `sweep()`, one after the other on this machine.

    python -m echo_jax.sweep --config=configs/ablations/observation_weight.py --workdir=DIR [--dry_run] [--only=REGEX]

The config file has `get_config(arg=None)` and `sweep()`, which yields one flat dictionary per run, for example
`{"loss.observation_weight": 0.05, "seed": 1}`. The workdir of that run is DIR/observation_weight=0.05,seed=1, its log
is log.txt there. Runs whose workdir holds DONE are skipped, others resume: after an interruption, give the same command
again. Further overrides (--config.num_steps=50) apply to all runs. The results are printed as a table and saved in
DIR/results.csv; --report prints the table at any time and starts nothing.

With `shared_warm_start = ("seed",)` in the config file, the runs that agree in these fields share one warm start: it is
a run of its own, DIR/warm_start,seed=1, without RL steps, from which they start. Their other overrides then apply to RL
only. With `()`, all runs share one.

Several machines can share one sweep if each has a different --owner=NAME: a run taken by another owner (status 69) is
left to it. --launcher=COMMAND starts each run instead of `python -m echo_jax.train`; the run is done if COMMAND exits
with status 0. If this machine does not see DIR, --logs=FOLDER holds the files written here, and --table=COMMAND prints
the table.
"""

import shlex

from absl import flags
from ml_collections import config_flags

from echo_jax.config import may_add
from echo_jax.run.sweeper import run_sweep
from echo_jax.system.cli import define_config, define_path, run_program


def main(args: flags.FlagValues) -> int:
    return run_sweep(
        config_flags.get_config_filename(args["config"]),
        args.workdir,
        common=config_flags.get_override_values(args["config"]),
        only=args.only,
        dry_run=args.dry_run,
        report=args.report,
        launcher=shlex.split(args.launcher) or None,
        owner=args.owner,
        logs=args.logs,
        table=shlex.split(args.table) or None,
    )


if __name__ == "__main__":
    define_config(may_add)
    define_path("workdir", "Folder for the runs' workdirs and for results.csv.")
    flags.DEFINE_bool("dry_run", False, "Print the command of every run and start none.")
    flags.DEFINE_bool("report", False, "Start no run; print the table and write results.csv from the existing results.")
    flags.DEFINE_string("launcher", "", "Command that starts a run instead of `python -m echo_jax.train`.")
    flags.DEFINE_string("owner", "", "Name of this machine; runs that another owner has taken are left alone.")
    define_path("logs", "Folder for the runs' logs and results.csv, if this machine does not see the workdirs.")
    flags.DEFINE_string("table", "", "Command that prints the table, if this machine does not see the workdirs.")
    flags.DEFINE_string("only", "", "Start only the runs whose name matches this regular expression.")
    run_program(main, outlives_output=True)
