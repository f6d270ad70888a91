"""Compiles the real train step for a TPU topology, ahead of time and without a TPU, and reports whether it fits.

    python -m echo_jax.compile --config=configs/qwen3_8b.py --topology=v5e:16x16
    python -m echo_jax.compile --table=configs/qwen3_8b.py,configs/qwen3_14b.py --topology=v5p:4x4x4,v6e:16x16

Needs the TPU compiler, `pip install -e '.[tpu]'`. Prints one JSON line per config and topology: bytes per chip
(arguments, temporary, peak, and the chip's memory), whether it fits, collectives by kind, analytic FLOPs of a
micro-batch of full rows, seconds to compile. `--table` also prints a table of several. The vocabulary is the
tokenizer's, unless `model.vocab_size` is larger.
"""

import json
import os
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from echo_jax.config import ConfigError
from echo_jax.run.ahead_of_time import compile_train_step, load_config, table
from echo_jax.system.cli import run_program


def main(args: flags.FlagValues) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to query
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    if bool(args.table) == (args.config is not None):
        raise ConfigError("set either --config, or --table to a list of config files")
    configs = {path: load_config(path) for path in args.table} if args.table else {"": args.config}
    results = []
    for path, config in configs.items():
        for topology in args.topology:
            results.append({"config": Path(path).stem} | compile_train_step(config, topology))
            print(json.dumps(results[-1]), flush=True)
    if args.table:
        print("\n".join(table(results)))


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file; override any field with --config.section.field=value."
    )
    flags.DEFINE_list("table", [], "Instead of --config: config files to compile and tabulate.")
    flags.DEFINE_list("topology", None, "Chip type and topology, such as v5e:16x16; may be a list.")
    run_program(main, required=("topology",))
