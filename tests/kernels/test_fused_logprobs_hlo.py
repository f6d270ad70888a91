"""The compiled sharded program: where its collectives are, and how large its arrays get."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from echo_jax.kernels.fused_logprobs import Axes, fused_logprobs
from echo_jax.system.hlo import collectives, largest_array
from echo_jax.system.sharding import make_mesh

TOKENS, DIM, VOCAB = 512, 64, 4096
VOCAB_BLOCK, TOKEN_BLOCK = 128, 32


def compiled_text(mesh, gather_once=False) -> str:
    axes = Axes(("data", "fsdp"), "tensor", "fsdp", gather_once)

    def loss(hidden, head, targets, active):
        scores = fused_logprobs(
            hidden, head, targets, active=active, entropy=True, vocab_block=VOCAB_BLOCK, token_block=TOKEN_BLOCK,
            mesh=mesh, axes=axes,
        )  # fmt: skip
        return jnp.sum(scores.logprob) + jnp.sum(scores.entropy)

    on = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    rows = ("data", "fsdp")
    arguments = (
        on((TOKENS, DIM), jnp.float32, rows, None),
        on((VOCAB, DIM), jnp.float32, "tensor", "fsdp"),
        on((TOKENS,), jnp.int32, rows),
        on((TOKENS,), bool, rows),
    )
    return jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 2, 2), (1, 8, 1)])
def test_no_collective_in_the_token_loop_and_no_head_sized_one_in_any_loop(shape):
    # When broken on purpose, by moving the vocabulary's psum into `over_tokens`, a collective shows at depth 2.
    found = collectives(compiled_text(make_mesh(*shape)))
    inside = [c for c in found if c.depth]
    assert inside  # the head is streamed: one gather per block
    assert all(c.depth == 1 for c in inside)
    assert max(c.elements for c in inside) <= VOCAB_BLOCK * DIM


def test_with_gather_once_the_loop_moves_only_the_gradient_of_a_block():
    found = collectives(compiled_text(make_mesh(1, 2, 4), gather_once=True))
    assert not [c for c in found if c.depth and c.kind == "all-gather"]
    assert [c for c in found if not c.depth and c.kind == "all-gather"]


def test_no_array_of_tokens_by_vocabulary_exists():
    text = compiled_text(make_mesh(1, 2, 4))
    local_logits = TOKENS // 2 * VOCAB // 4
    largest = max(largest_array(line.split("=")[1].split("(")[0])[1] for line in text.splitlines() if " = " in line)
    assert largest < local_logits


GIB = 2**30


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "fsdp", "tensor", "entropy", "limit"),
    [
        ("v5e:4x4", 1, 1, False, 0.15),
        ("v5e:4x4", 1, 1, True, 0.40),
        ("v5e:4x4", 4, 4, True, 0.45),
        ("v5e:16x16", 256, 1, True, 0.45),
    ],
)
def test_memory_planned_by_the_tpu_compiler(topology, fsdp, tensor, entropy, limit):
    """GiB of temporary memory per chip: 8,192 tokens per data shard, D = 4096, V = 151,936, bf16, active mask on."""
    tokens, dim, vocab = 8192, 4096, 151_936
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[: fsdp * tensor]
    mesh = make_mesh(1, fsdp, tensor, devices)
    where = {"mesh": mesh, "axes": Axes(("data", "fsdp"), "tensor", "fsdp")} if mesh.size > 1 else {}
    on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    rows, head = on(("data", "fsdp")), on("tensor", "fsdp")

    def loss(hidden, head, targets, active, cotangent):
        scores = fused_logprobs(hidden, head, targets, active=active, entropy=entropy, token_block=1024, **where)
        return jnp.sum(cotangent * scores.logprob), jnp.sum(scores.entropy)

    arguments = [
        jax.ShapeDtypeStruct((tokens * fsdp, dim), jnp.bfloat16, sharding=rows),
        jax.ShapeDtypeStruct((vocab, dim), jnp.bfloat16, sharding=head),
        *(jax.ShapeDtypeStruct((tokens * fsdp,), dtype, sharding=rows) for dtype in (jnp.int32, bool, jnp.float32)),
    ]
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), out_shardings=((on(), on()), (rows, head)))
    memory = step.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= limit * GIB
    gradients = 2 * (tokens * dim + vocab * dim // (fsdp * tensor))
    assert memory.output_size_in_bytes - gradients <= 2**20
