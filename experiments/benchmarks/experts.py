"""FLOPs and memory of one layer of experts as compiled for a TPU, compared with the FLOPs that the arithmetic needs.

    python experiments/benchmarks/experts.py --topology=v5e:4x4,v5p:2x2x1

Compiles forward, and forward with backward, of a layer of Qwen3-30B-A3B over a row of 16,384 tokens for one chip, ahead
of time and with no TPU (`pip install -e '.[tpu]'`), and prints a table. A grouped matmul computes only the chosen
experts; an expanded one computes every expert.
"""

import argparse
import importlib.metadata
import os
import platform

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from echo_jax.kernels.experts import mix
from echo_jax.run.ahead_of_time import tpu_devices

TOKENS, EMBED, FFN, EXPERTS, CHOSEN = 16_384, 2_048, 768, 128, 8
SIZES = {
    "x": (1, TOKENS, EMBED),
    "router": (EMBED, EXPERTS),
    "gate": (EXPERTS, EMBED, FFN),
    "up": (EXPERTS, EMBED, FFN),
    "down": (EXPERTS, FFN, EMBED),
}


def forward(*arrays):
    return mix(*arrays, per_token=CHOSEN, normalize=True)


def backward(*arrays):
    return jax.grad(lambda *a: jnp.sum(forward(*a).astype(jnp.float32) ** 2), argnums=tuple(range(len(SIZES))))(*arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4", help="one or several, separated by commas")
    args = parser.parse_args()
    needed = 2 * TOKENS * EMBED * (EXPERTS + 3 * CHOSEN * FFN)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{versions}, Python {platform.python_version()}\n")
    print("| topology | direction | needed TFLOP | compiled TFLOP | ratio | temporary GiB |\n|---|---|---|---|---|---|")
    for topology in args.topology.split(","):
        chip = jax.sharding.SingleDeviceSharding(tpu_devices(topology)[0])
        arrays = [jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=chip) for size in SIZES.values()]
        for name, function, passes in (("forward", forward, 1), ("forward and backward", backward, 3)):
            compiled = jax.jit(function).lower(*arrays).compile()
            done, least = compiled.cost_analysis()["flops"], passes * needed
            memory = compiled.memory_analysis().temp_size_in_bytes / 2**30
            print(
                f"| {topology} | {name} | {least / 1e12:.2f} | {done / 1e12:.2f} | {done / least:.2f} | {memory:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
