"""Speed of the train step on one GPU: the project's own update, loss and packing, on random rollouts of an agent.

    python experiments/benchmarks/train_step_gpu.py [--output=FILE]

A line per model, row length and rematerialisation: tokens per second, the memory that the compiler plans, and MFU as
training logs it (`train/mfu`): real tokens, pairs within a segment, nothing for recomputation, over the data sheet's
peak. Then attention alone, which forms [T, T] scores on a GPU. `--models=tiny` runs anywhere.
"""

import datetime
import itertools
import os
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from gpu import machine
from tables import emit

from echo_jax.config import default_config
from echo_jax.kernels.attention import packed_attention
from echo_jax.learner.learner import Learner, build_learner
from echo_jax.models.flops import train_flops, utilisation
from echo_jax.models.transformer import init_params
from echo_jax.objective.batch import to_mesh
from echo_jax.objective.weights import weigh
from echo_jax.roles import Role
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.run.ahead_of_time import lower_train_step
from echo_jax.run.resident import GIB

OUTPUT = flags.DEFINE_string("output", None, "also write the tables to this file")
REPEATS = flags.DEFINE_integer("repeats", 2, "timed updates per row; the fastest counts")
MODELS = flags.DEFINE_list("models", ["qwen3_1.7b", "llama3_1b", "qwen3_0.6b"], "models to measure")
BLOCKS = flags.DEFINE_list("blocks", ["1024", "2048"], "tokens and vocabulary entries of a block of the LM head")

QWEN3 = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "num_layers": 28, "qk_norm": True, "vocab_size": 151_936}
SHAPES = {
    "qwen3_1.7b": QWEN3 | {"embed_dim": 2048, "ffn_dim": 6144},
    "qwen3_0.6b": QWEN3 | {"embed_dim": 1024, "ffn_dim": 3072},
    "llama3_1b": {
        "num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "num_layers": 16, "vocab_size": 128_256,
        "embed_dim": 2048, "ffn_dim": 8192,
    },
    "tiny": {"num_layers": 2, "vocab_size": 512},
}  # fmt: skip
# (model, tokens of a row, rows of a micro-batch, rollouts of an update, what the backward pass recomputes)
ROWS = (
    ("qwen3_1.7b", 4096, 4, 16, "full"),
    ("qwen3_1.7b", 4096, 2, 16, "dots"),
    ("llama3_1b", 4096, 4, 16, "full"),
    ("qwen3_0.6b", 16_384, 1, 4, "full"),
    ("qwen3_1.7b", 16_384, 1, 4, "full"),
    ("tiny", 256, 2, 8, "full"),
)


def make_learner(model: str, length: int, rows: int, rollouts: int, remat: str, devices=None) -> Learner:
    c = default_config()
    c.model.update(SHAPES[model])
    c.model.compute_dtype = "bfloat16"
    c.model.remat = remat
    c.rollout.groups, c.rollout.group_size = 1, rollouts
    c.rollout.max_tokens = c.pack.length = length
    c.pack.rows = rows
    c.loss.token_block, c.loss.vocab_block = map(int, BLOCKS.value)
    return build_learner(c, c.model.vocab_size, devices or jax.devices())


def rollout(rng: np.random.Generator, learner: Learner, number: int) -> Trajectory:
    """Returns a random rollout: a prompt, then turns of sampled tokens and the tool's output, with markers between."""
    longest = learner.config.rollout.max_tokens
    length = int(rng.uniform(longest / 8, longest))
    roles = [Role.PROMPT] * min(300, length // 4)
    while len(roles) < length:
        for role, most in ((Role.SCAFFOLD, 12), (Role.ACTION, 250), (Role.SCAFFOLD, 12), (Role.OBSERVATION, 700)):
            roles += [role] * int(rng.integers(most // 4, most))
    role = np.asarray(roles[:length], np.int8)
    sampled = role == Role.ACTION
    return Trajectory(
        ids=rng.integers(0, learner.vocab_size, length, np.int32),
        role=role,
        tool=(role == Role.OBSERVATION).astype(np.int8),
        logprob=np.where(sampled, -np.log(learner.vocab_size), 0).astype(np.float32),
        entropy=np.where(sampled, np.log(learner.vocab_size), 0).astype(np.float32),
        version=np.where(sampled, 0, -1).astype(np.int32),
        task="benchmark", group=0, rollout=number, shared=0, reward=float(number % 2), scored=True,
        outcome="submitted", turns=1, attempts=(), limits_by="", tools=("bash",),
    )  # fmt: skip


def table() -> Iterator[str]:
    yield (
        "| model | parameters | row × rows | remat | tokens of an update | packed | s | tokens/s | TFLOP/s | MFU | "
        "peak GiB | compile s |"
    )
    yield "|" + "---|" * 12
    for model, length, rows, rollouts, remat in ROWS:
        if model not in MODELS.value:
            continue
        learner = make_learner(model, length, rows, rollouts, remat)
        size = sum(x.size for x in jax.tree.leaves(learner.abstract_params))
        name = f"| {model} | {size / 1e9:.2f}e9 | {length} × {rows} | {remat} |"
        try:
            yield f"{name} {measure(learner)} |"
        except jax.errors.JaxRuntimeError as error:  # out of memory: that is the result
            yield f"{name} {str(error).splitlines()[0][:160]} |" + " |" * 7


def measure(learner: Learner) -> str:
    start = time.perf_counter()
    compiled = lower_train_step(learner).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", peak)
    if peak > limit:
        return f"does not fit in {limit / GIB:.1f} GiB | | | | | | {peak / GIB:.1f} | {compile_seconds:.0f}"

    rng = np.random.default_rng(0)
    rollouts = [rollout(rng, learner, i) for i in range(learner.rollouts_per_step)]
    weights = weigh(rollouts, learner.advantages(rollouts), learner.objective(0))
    batch = to_mesh(learner.pack(rollouts, weights, at_most=len(rollouts)).batch, learner.mesh)
    _, params = init_params(learner.model_config, 0, learner.mesh)
    state = learner.init_state(params)
    del params
    times = []
    for _ in range(REPEATS.value + 1):  # the first warms up
        start = time.perf_counter()
        state, sums = jax.block_until_ready(compiled(state, {}, batch))
        times.append(time.perf_counter() - start)
    if not np.isfinite(sums["loss/total"]):
        raise FloatingPointError(f"loss {sums['loss/total']}")
    seconds, tokens, efficiency = min(times[1:]), float(sums["pack/tokens"]), sums["pack/efficiency"]
    done = train_flops(learner.model_config, tokens, float(sums["pack/pairs"])) / seconds
    share = utilisation(done, jax.devices())
    return (
        f"{tokens:.0f} | {float(efficiency.total / efficiency.count):.0%} | {seconds:.2f} | {tokens / seconds:.0f} | "
        f"{done / 1e12:.0f} | {'–' if share is None else f'{share:.1%}'} | {peak / GIB:.1f} | {compile_seconds:.0f}"
    )


def attention_table() -> Iterator[str]:
    """Yields the time of one layer's attention; cuDNN's, which echo_jax does not use, shows what there is to gain."""
    yield "\nAttention of one layer of qwen3_1.7b alone, forward and backward, one segment a row:\n"
    yield "| implementation | row × rows | ms | TFLOP/s | temp GiB |"
    yield "|---|---|---|---|---|"
    ways: dict[str, Callable] = {
        "xla, [T, T] scores": packed_attention,
        "cuDNN, mask [T, T]": cudnn_attention,
        "cuDNN, causal, no segments": lambda q, k, v, _: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        ),
    }
    heads, kv_heads, size = (SHAPES["qwen3_1.7b"][name] for name in ("num_heads", "num_kv_heads", "head_dim"))
    for length, rows in ((4096, 4), (16_384, 1)):
        rng = np.random.default_rng(0)
        arrays = [
            jnp.asarray(rng.normal(size=(rows, length, h, size)), "bfloat16") for h in (heads, kv_heads, kv_heads)
        ]
        arrays.append(jnp.ones((rows, length), jnp.int32))
        for name, way in ways.items():
            try:
                seconds, memory = timed(way, arrays)
            except (RuntimeError, ValueError) as error:  # its failure is the result
                yield f"| {name} | {length} × {rows} | {str(error).splitlines()[0][:160]} | | |"
                continue
            done = 12 * heads * size * rows * length * (length + 1) / 2 / seconds
            yield f"| {name} | {length} × {rows} | {1e3 * seconds:.2f} | {done / 1e12:.0f} | {memory / GIB:.2f} |"


def cudnn_attention(q, k, v, segment_ids):
    """Computes what `packed_attention` does; cuDNN reads the mask as one bias [T, T] for all heads."""
    at = jnp.arange(q.shape[1])
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (at[:, None] >= at[None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")


def timed(attend: Callable, arrays) -> tuple[float, int]:
    """Returns seconds of forward and backward, and bytes of temporary memory."""

    def loss(*arrays):
        return jnp.sum(attend(*arrays).astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arrays).compile()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - start)
    return min(times), compiled.memory_analysis().temp_size_in_bytes


def main(_) -> None:
    header = [
        "# The train step on one GPU\n",
        f"`python experiments/benchmarks/train_step_gpu.py`, {datetime.date.today()}; {machine()}.\n",
    ]
    attention = attention_table() if jax.default_backend() == "gpu" else ()
    emit(itertools.chain(header, table(), attention), OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
