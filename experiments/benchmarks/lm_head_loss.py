"""Time and memory of the LM-head loss and its two gradients, ours compared with the usual methods.

    python experiments/benchmarks/lm_head_loss.py [--output=experiments/benchmarks/lm_head_loss.md]
    JAX_PLATFORMS=cuda python experiments/benchmarks/lm_head_loss.py --tables=gpu --torch=TORCH_VENV/bin/python

On this machine: wall time as a ratio to full logits in the same run, and XLA's temporary memory. For TPUs, if the extra
`tpu` is installed: the memory that the real compiler plans ahead of time, for one chip and for meshes (no TPU needed),
and a roofline. On a GPU: wall time and memory, compared with Liger's and Apple's kernels (`lm_head_loss_torch.py`).
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # without a TPU there is no metadata server to query
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from gpu import machine
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tables import emit

from echo_jax.kernels.fused_logprobs import Axes, fused_logprobs
from echo_jax.models.flops import PEAK_FLOPS
from echo_jax.system.sharding import MESH_AXES

OUTPUT = flags.DEFINE_string("output", None, "also write the tables to this file")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls per row; the fastest counts")
TABLES = flags.DEFINE_list("tables", ["cpu", "tpu", "gpu"], "tables to make")
TORCH = flags.DEFINE_string("torch", sys.executable, "a Python with torch, liger-kernel and cut-cross-entropy")
TOPOLOGIES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x4"}
# Peak FLOP/s and HBM bytes/s of a chip, the latter from Google's system architecture pages (cloud.google.com/tpu/docs)
CHIPS = {
    "v5e": (PEAK_FLOPS["TPU v5 lite"], 819e9),
    "v5p": (PEAK_FLOPS["TPU v5p"], 2765e9),
    "v6e": (PEAK_FLOPS["TPU v6 lite"], 1640e9),
}
SHARES = (1.0, 0.6, 0.3)
CHUNK = 512  # tokens per chunk in the chunked rows


@dataclasses.dataclass(frozen=True)
class Size:
    tokens: int
    dim: int
    vocab: int
    dtype: str
    token_block: int  # small blocks skip more exactly, large ones keep a TPU's matrix unit busy


CPU = Size(4096, 512, 32_000, "float32", 256)
TPU = Size(8192, 4096, 151_936, "bfloat16", 1024)  # tokens of one data shard
GPU = [Size(8192, 4096, vocab, "bfloat16", 1024) for vocab in (151_936, 32_000)]
GPU_BLOCKS = ((2048, 8192), (4096, 16_384))  # of tokens and vocabulary; the other rows have 1024 and 2048

# A row maps (hidden, head, targets, active, cotangent [N]) to (loss, (d hidden, d head)).
Row = Callable[..., tuple]


def differentiated(logprob: Callable) -> Row:
    """Makes a row from a function that returns per-token log-probs, or a pair of them and an unused result."""

    def row(hidden, head, targets, active, cotangent):
        def loss(hidden, head):
            out = logprob(hidden, head, targets, active)
            value, extra = out if isinstance(out, tuple) else (out, 0.0)
            return jnp.sum(cotangent * active * value), jnp.sum(extra)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

    return row


def full_logits(dtype):
    def logprob(hidden, head, targets, active):
        logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=dtype)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0].astype(jnp.float32)

    return differentiated(logprob)


def token_chunks(hidden, head, targets, active):
    """Scans over chunks of tokens, rematerialised."""
    chunk = jax.checkpoint(
        lambda xs: fused_logprobs(xs[0], head, xs[1], implementation="reference").logprob  # logits of one chunk
    )
    split = lambda x: x.reshape(-1, CHUNK, *x.shape[1:])  # noqa: E731
    return jax.lax.map(chunk, (split(hidden), split(targets))).reshape(-1)


def gradient_in_forward(hidden, head, targets, active, cotangent):
    """Liger's method: computes each chunk's gradients while its logits exist; the head's accumulates in f32."""
    split = lambda x: x.reshape(-1, CHUNK, *x.shape[1:])  # noqa: E731

    def chunk(carry, xs):
        loss, d_head = carry
        h, t, g = xs
        logprobs = jax.nn.log_softmax(jnp.einsum("nd,vd->nv", h, head, preferred_element_type=jnp.float32))
        loss += jnp.sum(g * jnp.take_along_axis(logprobs, t[:, None], axis=-1)[:, 0])
        delta = ((jax.nn.one_hot(t, head.shape[0]) - jnp.exp(logprobs)) * g[:, None]).astype(h.dtype)
        d_head += jnp.einsum("nv,nd->vd", delta, h, preferred_element_type=jnp.float32)
        return (loss, d_head), jnp.einsum("nv,vd->nd", delta, head)

    start = jnp.float32(0.0), jnp.zeros(head.shape, jnp.float32)
    (loss, d_head), d_hidden = jax.lax.scan(chunk, start, (split(hidden), split(targets), split(cotangent * active)))
    return loss, (d_hidden.reshape(hidden.shape), d_head.astype(head.dtype))


def tokamax_xla(hidden, head, targets, active, cotangent):
    """tokamax returns a sum: no token can be left out or weighted. Its TPU kernel compiles only on a TPU."""
    import tokamax  # not a dependency of this project

    def loss(hidden, head):
        return tokamax.linear_softmax_cross_entropy_loss(hidden, targets, head.T, implementation="xla")

    return jax.value_and_grad(loss, (0, 1))(hidden, head)


def ours(size: Size, *, entropy=False, skip=True, **options) -> Row:
    options = {"token_block": size.token_block, "entropy": entropy} | options

    def logprob(hidden, head, targets, active):
        scores = fused_logprobs(hidden, head, targets, active=active if skip else None, **options)
        return scores.logprob, scores.entropy

    return differentiated(logprob)


def rows(size: Size, blocks=()) -> Iterator[tuple[str, Row, float]]:
    """Yields (name, row, share of active tokens) for one device; `blocks`: other sizes of ours to add."""
    yield "full logits f32", full_logits(jnp.float32), 1.0
    yield "full logits bf16", full_logits(jnp.bfloat16), 1.0
    yield "token chunks, rematerialised", differentiated(token_chunks), 1.0
    yield "token chunks, gradient in forward", gradient_in_forward, 1.0
    if size is CPU and importlib.util.find_spec("tokamax") is not None:
        yield "tokamax, its XLA implementation", tokamax_xla, 1.0
    yield "ours, all tokens", ours(size, skip=False), 1.0
    for share in SHARES:
        yield f"ours, {share:.0%} active", ours(size), share
    yield "ours, 100% active, entropy", ours(size, entropy=True), 1.0
    for (tokens, vocab), share in itertools.product(blocks, SHARES):
        row = ours(size, token_block=tokens, vocab_block=vocab)
        yield f"ours, {share:.0%} active, blocks of {tokens} × {vocab}", row, share


def arguments(size: Size, share: float):
    keys = jax.random.split(jax.random.key(0), 5)
    return (
        jax.random.normal(keys[0], (size.tokens, size.dim)).astype(size.dtype),
        (jax.random.normal(keys[1], (size.vocab, size.dim)) / size.dim**0.5).astype(size.dtype),
        jax.random.randint(keys[2], size.tokens, 0, size.vocab),
        jax.random.uniform(keys[3], size.tokens) < share,
        jax.random.normal(keys[4], size.tokens),
    )


def seconds(compiled, inputs) -> float:
    times = []
    for _ in range(REPEATS.value + 1):  # the first warms up
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def cpu_table() -> Iterator[str]:
    yield f"## This machine: {CPU.tokens} tokens, D = {CPU.dim}, V = {CPU.vocab}, {CPU.dtype}\n"
    yield "| row | time / full logits | temp MiB |"
    yield "|---|---|---|"
    base = None
    for name, row, share in rows(CPU):
        inputs = arguments(CPU, share)
        compiled = jax.jit(row).lower(*inputs).compile()
        taken = seconds(compiled, inputs)
        base = base or taken
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        yield f"| {name} | {taken / base:.2f} | {memory:.0f} |"


def tpu_memory(row: Row, mesh: Mesh) -> tuple[float, float, float]:
    """Returns per chip: GiB of temporary memory, MiB of outputs beyond the gradients; and seconds to compile."""
    data = mesh.shape["data"] * mesh.shape["fsdp"]
    on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    tokens, batch = TPU.tokens * data, ("data", "fsdp")
    shapes = [
        ((tokens, TPU.dim), TPU.dtype, on(batch, None)),
        ((TPU.vocab, TPU.dim), TPU.dtype, on("tensor", "fsdp")),
        ((tokens,), jnp.int32, on(batch)),
        ((tokens,), bool, on(batch)),
        ((tokens,), jnp.float32, on(batch)),
    ]
    abstract = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in shapes]
    gradients = (shapes[0][2], shapes[1][2])
    # Rows return different scalars with the loss: replicate them all.
    loss_shape = jax.eval_shape(row, *abstract)[0]
    out = (jax.tree.map(lambda _: on(), loss_shape), gradients)
    start = time.perf_counter()
    memory = jax.jit(row, out_shardings=out).lower(*abstract).compile().memory_analysis()
    compile_seconds = time.perf_counter() - start
    temporary, outputs = memory.temp_size_in_bytes, memory.output_size_in_bytes
    gradient_bytes = 2 * (TPU.tokens * TPU.dim + TPU.vocab * TPU.dim / mesh.shape["tensor"] / mesh.shape["fsdp"])
    return temporary / 2**30, (outputs - gradient_bytes) / 2**20, compile_seconds


def chip_mesh(topology: str, fsdp: int, tensor: int) -> Mesh:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    grid = np.asarray(devices[: fsdp * tensor]).reshape(1, fsdp, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def tpu_table() -> Iterator[str]:
    yield f"## TPU, ahead of time: {TPU.tokens} tokens per data shard, D = {TPU.dim}, V = {TPU.vocab}, {TPU.dtype}\n"
    if importlib.util.find_spec("libtpu") is None:
        yield "Not measured: this needs the TPU compiler, `pip install -e '.[tpu]'`."
        return
    yield "| row | chip | temp GiB | outputs beyond the gradients, MiB | compile s |"
    yield "|---|---|---|---|---|"
    for chip, topology in TOPOLOGIES.items():
        seen = set()
        for name, row, _ in rows(TPU):
            name = name.replace("100% active", "skipping")
            if "% active" in name or name in seen:
                continue  # the number of active tokens changes nothing here
            seen.add(name)
            yield from _tpu_row(name, chip, row, chip_mesh(topology, 1, 1))
        pallas = ours(TPU, entropy=True, implementation="pallas_tpu", token_block=512)
        yield from _tpu_row("ours, skipping, entropy, Pallas forward", chip, pallas, chip_mesh(topology, 1, 1))
        meshes = [("fsdp 4 × tensor 4", topology, 4, 4)] + [("fsdp 256", "v5e:16x16", 256, 1)] * (chip == "v5e")
        for label, where, fsdp, tensor in meshes:
            mesh = chip_mesh(where, fsdp, tensor)
            for gather_once in (False, True):
                row = ours(TPU, entropy=True, mesh=mesh, axes=Axes(("data", "fsdp"), "tensor", "fsdp", gather_once))
                how = "gathered once" if gather_once else "streamed"
                yield from _tpu_row(f"ours, skipping, entropy, {label}, {how}", chip, row, mesh)


def _tpu_row(name: str, chip: str, row: Row, mesh: Mesh) -> Iterator[str]:
    temp, beyond, compile_seconds = tpu_memory(row, mesh)
    yield f"| {name} | {chip} | {temp:.3f} | {beyond:.2f} | {compile_seconds:.0f} |"


def roofline_table() -> Iterator[str]:
    """Yields bounds in units of one T·D·V matmul at a chip's peak: pure arithmetic, with no compiler and no TPU."""
    yield f"## TPU, by arithmetic: {TPU.tokens} tokens, D = {TPU.dim}, V = {TPU.vocab}, all active\n"
    yield (
        "Matmul units, and the time to move the bytes through HBM in the same units; the larger is a lower bound on "
        "the time.\n"
    )
    yield "| way | matmul units | " + " | ".join(f"{chip}: HBM units" for chip in CHIPS) + " |"
    yield "|---|---|" + "---|" * len(CHIPS)
    matmul = 2 * TPU.tokens * TPU.dim * TPU.vocab
    hidden, head = 2 * TPU.tokens * TPU.dim, 2 * TPU.vocab * TPU.dim  # bytes, bf16
    logits = 2 * TPU.tokens * TPU.vocab
    chunks = TPU.tokens / CHUNK
    ways: dict[str, tuple[int, float]] = {
        # writes the logits; the softmax and its gradient read them; the gradient is written, and two matmuls read it
        "full logits bf16": (3, 6 * logits + 3 * head + 3 * hidden),
        # each chunk of tokens reads the head for each matmul, and reads and writes the head's gradient in f32
        "token chunks, rematerialised": (4, chunks * (3 + 2 * 2) * head + 4 * hidden),
        "token chunks, gradient in forward": (3, chunks * (2 + 2 * 2) * head + 3 * hidden),
    }
    for block in (2048, 4096, 8192):
        # each vocabulary block reads hidden once forward and once backward, and reads and writes d hidden in f32
        moved = -(-TPU.vocab // block) * (2 + 2 * 2) * hidden + 3 * head
        ways[f"ours, vocab_block {block}"] = (4, moved)
    for way, (units, moved) in ways.items():
        times = (moved / bandwidth / (matmul / peak) for peak, bandwidth in CHIPS.values())
        yield f"| {way} | {units} | " + " | ".join(f"{t:.2f}" for t in times) + " |"


def gpu_table() -> Iterator[str]:
    """Wall time and memory on this machine's GPU; torch's kernels run in separate processes."""
    yield "## GPU: 8192 tokens, D = 4096, bfloat16\n"
    if jax.default_backend() != "gpu":
        yield "Not measured: no GPU. The module's docstring has the command."
        return
    yield (
        f"`lm_head_loss.py --tables=gpu`, {datetime.date.today()}; {machine()}. Memory is beyond inputs and returned "
        "gradients.\n"
    )
    for size in GPU:
        hidden, head, *_ = arguments(size, 1.0)
        matmul = jax.jit(lambda h, w: jnp.einsum("nd,vd->nv", h, w)).lower(hidden, head).compile()
        unit = seconds(matmul, (hidden, head))
        flops = 2 * size.tokens * size.dim * size.vocab / unit
        yield f"\nV = {size.vocab}; one matmul with the head: {1e3 * unit:.2f} ms, {flops / 1e12:.0f} TFLOP/s\n"
        yield "| row | ms | matmul units | share of the matmul rate | MiB | error of d hidden |"
        yield "|---|---|---|---|---|---|"
        for name, row, share in rows(size, GPU_BLOCKS):
            inputs = arguments(size, share)
            compiled = jax.jit(row).lower(*inputs).compile()
            taken = seconds(compiled, inputs)
            needed = (4 if "ours" in name or "remat" in name else 3) * (share if "ours" in name else 1.0)
            memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
            error = gradient_error(compiled(*inputs)[1][0], inputs)
            yield (
                f"| {name} | {1e3 * taken:.1f} | {taken / unit:.2f} | {needed * unit / taken:.0%} | {memory:.0f} | "
                f"{error:.1e} |"
            )
        yield from _torch_rows(size, unit)


def gradient_error(d_hidden, inputs, checked: int = 256) -> float:
    """Returns the largest relative error of a few active rows of the gradient of hidden against f32."""
    hidden, head, targets, active, cotangent = inputs
    rows = jnp.flatnonzero(active)[:checked]

    def loss(h, w):
        logprob = jax.nn.log_softmax(jnp.einsum("nd,vd->nv", h, w, precision="highest"))
        return jnp.sum(cotangent[rows] * jnp.take_along_axis(logprob, targets[rows, None], axis=-1)[:, 0])

    wanted = jax.grad(loss)(hidden[rows].astype(jnp.float32), head.astype(jnp.float32))
    error = jnp.linalg.norm(d_hidden[rows].astype(jnp.float32) - wanted, axis=-1)
    return float(jnp.max(error / jnp.linalg.norm(wanted, axis=-1)))


def _torch_rows(size: Size, unit: float) -> Iterator[str]:
    script = Path(__file__).with_name("lm_head_loss_torch.py")
    flags = [f"--{name}={getattr(size, name)}" for name in ("tokens", "dim", "vocab")]
    flags += [f"--shares={','.join(map(str, SHARES))}", f"--repeats={REPEATS.value}"]
    ran = subprocess.run([TORCH.value, str(script), *flags], capture_output=True, text=True)
    if ran.returncode:
        yield f"\ntorch rows not measured: {ran.stderr.strip().splitlines()[-1]}"
        return
    for result in map(json.loads, ran.stdout.splitlines()):
        name = f"{result['name']}, {result['share']:.0%} active"
        if "failed" in result:
            yield f"| {name} | {result['failed'][:80]} | | | | |"
            continue
        taken = result["seconds"]
        yield (
            f"| {name} | {1e3 * taken:.1f} | {taken / unit:.2f} | | {result['bytes'] / 2**20:.0f} | "
            f"{result['error']:.1e} |"
        )
    yield f"\n{', '.join(f'{name} {version}' for name, version in result['versions'].items())}"


def report() -> Iterator[str]:
    versions = ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in ("jax", "jaxlib", "numpy"))
    libtpu = f", libtpu {importlib.metadata.version('libtpu')}" if importlib.util.find_spec("libtpu") else ""
    yield "# LM-head loss: value and both gradients\n"
    yield (
        f"`python experiments/benchmarks/lm_head_loss.py`, {datetime.date.today()}; {os.cpu_count()} CPU cores, "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}{libtpu}.\n"
    )
    tables = {"cpu": [cpu_table], "tpu": [tpu_table, roofline_table], "gpu": [gpu_table]}
    for table in [table for name in TABLES.value for table in tables[name]]:
        yield from table()
        yield ""


def main(_) -> None:
    if importlib.util.find_spec("tokamax") is None:
        print("tokamax is not installed: its row is missing.", file=sys.stderr)
    emit(report(), OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
