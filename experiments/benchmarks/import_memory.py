"""Measures how much host memory an import of published weights takes, beyond the arrays that it makes.

    python experiments/benchmarks/import_memory.py

Writes random weights of Qwen3-1.7B's shapes in bf16 to a temporary folder (4 GB), imports them in a fresh process each
time, and prints a table. On a CPU the arrays are in host memory too, so they are subtracted: the difference is what the
import adds on any device. --gguf=FILE also measures a GGUF file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

QWEN3_1_7B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_hidden_layers": 28,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
MIB = 2**20
FILE_BYTES = 1 << 30


def model_config(path: Path, dtype: str):
    from echo_jax.models.pretrained import fields_of
    from echo_jax.models.rope import RopeScaling
    from echo_jax.models.transformer import ModelConfig

    fields = fields_of(path)
    scaling = RopeScaling(**fields.pop("rope_scaling"))
    numerics = {"compute_dtype": "float32", "remat": "full", "attention": "xla", "param_dtype": dtype}
    return ModelConfig(**fields, rope_scaling=scaling, **numerics)


def write(folder: Path) -> None:
    """Writes random weights in the published layout, one file at a time."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from echo_jax.models.families import model_fields, published_shape, tensor_names
    from echo_jax.models.rope import RopeScaling
    from echo_jax.models.sources import INDEX
    from echo_jax.models.transformer import ModelConfig

    (folder / "config.json").write_text(json.dumps(QWEN3_1_7B))
    fields = model_fields(QWEN3_1_7B)
    fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    config = ModelConfig(**fields, compute_dtype="float32", remat="full", attention="xla")
    rng = np.random.default_rng(0)
    tensors, where, number = {}, {}, 1

    def flush():
        save_file(tensors, folder / f"model-{number:05}.safetensors")
        where.update(dict.fromkeys(tensors, f"model-{number:05}.safetensors"))
        tensors.clear()

    for name, (parameter, _) in tensor_names(config).items():
        tensors[name] = rng.standard_normal(published_shape(config, parameter), np.float32).astype(ml_dtypes.bfloat16)
        if sum(x.nbytes for x in tensors.values()) > FILE_BYTES:
            flush()
            number += 1
    flush()
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def status(field: str) -> int:
    """Returns a field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(path: Path, dtype: str) -> dict:
    """Imports in this process; returns its memory and time."""
    import time

    import jax
    import numpy as np

    from echo_jax.models.pretrained import check_tensors, load_params
    from echo_jax.models.sources import open_source
    from echo_jax.system.sharding import make_mesh

    mesh = make_mesh(1, 1, 1)
    config = model_config(path, dtype)
    source = open_source(path)
    check_tensors(source, path, config)
    jax.jit(lambda: jax.numpy.zeros(8))().block_until_ready()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    params = jax.block_until_ready(load_params(source, config, mesh))
    seconds = time.perf_counter() - start
    arrays = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = max(int(np.prod(t.shape)) * jax.numpy.dtype(t.dtype).itemsize for t in source.tensors.values())
    return {
        "arrays": arrays,
        "largest": largest,
        "beyond": status("VmHWM") - before - arrays,
        "seconds": seconds,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="also import this GGUF file")
    parser.add_argument("--child", nargs=2, metavar=("PATH", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Path(args.child[0]), args.child[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        cases = [("Qwen3-1.7B shapes, bf16 safetensors", Path(folder), dtype) for dtype in ("bfloat16", "float32")]
        cases += [(f"{args.gguf.name}", args.gguf, "float32")] if args.gguf else []
        print("| weights | parameters | arrays MiB | largest tensor MiB | peak beyond the arrays MiB | seconds |")
        print("|---|---|---|---|---|---|")
        for name, path, dtype in cases:
            child = [sys.executable, __file__, "--child", str(path), dtype]
            r = json.loads(subprocess.run(child, stdout=subprocess.PIPE, check=True, text=True).stdout)
            sizes = " | ".join(f"{r[size] / MIB:.0f}" for size in ("arrays", "largest", "beyond"))
            print(f"| {name} | {dtype} | {sizes} | {r['seconds']:.0f} |", flush=True)
    print(f"\njax {r['jax']}, Python {r['python']}, {os.cpu_count()} CPU cores")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
