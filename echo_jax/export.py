"""Writes a run's trained weights as a folder that transformers loads and servers serve.

    python -m echo_jax.export --workdir=runs/NAME --output=DIR
    python -m echo_jax.export --workdir=runs/NAME --step=STEP --output=DIR --adapter

In: a checkpoint of a run, by default the newest, and the config that its workdir recorded. Out: safetensors,
config.json, the tokenizer's files and generation_config.json. Adapters are merged into the weights or, with
`--adapter`, written separately in PEFT's layout. The folder appears once it is complete. One process, or several, can
export a run of several processes; the same holds for evaluation.
"""

from absl import flags

from echo_jax.config import may_add
from echo_jax.run.workdir import recorded_config
from echo_jax.system.cli import define_config_of_run, define_path, run_program
from echo_jax.system.terminal import escaped


def main(args: flags.FlagValues) -> None:
    # These take seconds to import, which --help and a misspelt flag need not wait for.
    from echo_jax.run.build import start_peers
    from echo_jax.run.exporter import export

    with start_peers(args.config) as peers:
        workdir, output = args.workdir, args.output
        message = export(
            args.config, workdir, output, dtype=args.dtype, adapter=args.adapter, step=args.step, peers=peers
        )
        if peers.is_first:
            print(escaped(message))


if __name__ == "__main__":
    define_config_of_run(recorded_config, may_add)
    define_path("workdir", "Folder of the run.")
    flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.", lower_bound=0)
    define_path("output", "Folder to create.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the written tensors.")
    flags.DEFINE_bool("adapter", False, "Write only the adapters, in PEFT's layout.")
    run_program(main, required=("workdir", "output"))
