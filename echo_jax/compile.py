"""Compiles the programs of a run for a TPU topology, ahead of time and without a TPU, and reports whether they fit.

    python -m echo_jax.compile --config=configs/qwen3_8b.py --topology=v5e:16x16
    python -m echo_jax.compile --table=configs/qwen3_8b.py,configs/qwen3_14b.py --topology=v5p:4x4x4,v6e:16x16

Needs the TPU compiler, `pip install -e '.[tpu]'`. The programs are the train step, the transfer of the weights to the
sampler, and the sampler's own on a host. Prints one JSON line per config and topology; `--table` also prints a table of
several. The vocabulary is the tokenizer's, unless `model.vocab_size` is larger. Bytes are of a device: a chip, or on v4
and tpu7x half of one.

- `programs`: arguments, temporary memory, outputs that overwrite no argument, and seconds to compile of each.
- `resident`: what lies in memory at the same time during the update (the sampler gives its memory back), the transfer
  (train state and weights) and sampling (train state, weights, pool, and the temporary memory of the largest program).
- `fits`: the compiler refuses no program, the largest of these is at most `usable_bytes`, and the pool holds a session
  of full length. `train_fits`: the update alone does. `argument_bytes`, `temporary_bytes`, `peak_bytes`,
  `collectives` and `flops` (analytic, of a micro-batch of full rows) are of the train step. Not compiled are the
  forward passes that score transcripts and, where the loss asks for them, old or reference log-probs.
- `sampler`: a host's engine: its devices, the tokens in its pool, how many sessions of full length it could hold at
  most and how many a step asks of it (those without room wait), and an upper bound on its speed,
  `tokens_per_second_per_chip`: a decode step reads all weights once and the `live_tokens` of each of `rows`, at the
  full bandwidth of the memory. It counts no prefill, arithmetic, communication or waiting for tools. Its programs are
  compiled as if a host's chips were a slice of their own: of larger slices of v5e and v6e this compiler refuses to use
  some chips only, so whether a pod runs them must be tried there.
- `would_hold_a_session`: if the pool holds none, changes of which each alone would do.
"""

import json
import os
from pathlib import Path

import jax
from absl import flags

from echo_jax.config import ConfigError, may_add
from echo_jax.run.ahead_of_time import compile_run, load_config
from echo_jax.run.resident import table
from echo_jax.system.cli import define_config, run_program


def main(args: flags.FlagValues) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to query
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    if bool(args.table) == (args.config is not None):
        raise ConfigError("set either --config, or --table to a list of config files")
    configs = {path: load_config(path) for path in args.table} if args.table else {"": args.config}
    host = tuple(map(int, args.host)) + (1,) * (3 - len(args.host)) if args.host else ()
    results = []
    for path, config in configs.items():
        for topology in args.topology:
            results.append(
                {"config": Path(path).stem} | compile_run(config, topology, host=host, live_tokens=args.live_tokens)
            )
            print(json.dumps(results[-1]), flush=True)
    if args.table:
        print("\n".join(table(results)))


if __name__ == "__main__":
    define_config(may_add)
    flags.DEFINE_list("table", [], "Instead of --config: config files to compile and tabulate.")
    flags.DEFINE_list("topology", None, "Chip type and topology, such as v5e:16x16; may be a list.")
    flags.DEFINE_list("host", [], "Chips of a host along each axis, such as 2,4; without it 2,2.")
    flags.DEFINE_integer(
        "live_tokens",
        0,
        "Tokens that a decoding session holds, to bound the speed; 0: half of rollout.max_tokens.",
        0,
    )
    run_program(main, required=("topology",))
