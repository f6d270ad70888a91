"""The forward pass as one Pallas kernel for TPU: an online logsumexp that never writes a logit to memory.

The grid walks token blocks and, for each, all vocabulary blocks; running maximum, sum, target and mean stay in VMEM.
Token blocks past the active rows do nothing. Opt-in: it compiles, and matches the reference in interpret mode, but has
not been timed on a TPU yet. The backward pass is that of xla.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from echo_jax.kernels.fused_logprobs.xla import MASKED, Inputs, Options, Rows, Scores

VMEM_BYTES = 64 << 20  # the default scope is too small for two blocks of a wide model, double-buffered
VOCAB_BLOCK = 512


def forward(inputs: Inputs, options: Options) -> Scores:
    """Like `xla.forward`, on one device and for a head [V, D]."""
    rows = Rows(inputs, options)
    vocab, dim = inputs.head.shape
    tokens, block = rows.length, min(VOCAB_BLOCK, -(-vocab // 128) * 128)
    column = lambda x: x.reshape(tokens, 1)  # noqa: E731
    row_block = lambda width: pl.BlockSpec((rows.block, width), lambda t, v, _: (t, 0))  # noqa: E731
    kernel = functools.partial(_kernel, vocab=vocab, softcap=options.logit_softcap, entropy=options.entropy)
    scores = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tokens // rows.block, pl.cdiv(vocab, block)),
            in_specs=[row_block(dim), pl.BlockSpec((block, dim), lambda t, v, _: (v, 0)), row_block(1), row_block(1)],
            out_specs=[row_block(1)] * 4,
            scratch_shapes=[pltpu.VMEM((rows.block, 1), jnp.float32)] * 4,
        ),
        out_shape=[jax.ShapeDtypeStruct((tokens, 1), jnp.float32)] * 4,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(
        rows.blocks.reshape(1),
        rows.arrange(inputs.hidden),
        inputs.head.astype(inputs.hidden.dtype),
        column(rows.targets),
        column(rows.temperature),
    )
    target, top, logsumexp, mean_logit = (x[:, 0] for x in scores)
    entropy = logsumexp - mean_logit if options.entropy else mean_logit
    return Scores(*map(rows.restore, (target - logsumexp, logsumexp, entropy, target >= top, mean_logit)))


def _kernel(blocks, hidden, head, targets, temperature, *refs, vocab, softcap, entropy):
    target_out, top_out, logsumexp_out, mean_out, top, total, target, mean = refs
    t, v, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(v == 0)
    def _():
        for ref, value in ((top, MASKED), (total, 0.0), (target, MASKED), (mean, 0.0)):
            ref[...] = jnp.full(ref.shape, value, jnp.float32)

    @pl.when(t < blocks[0])
    def _():
        logits = jax.lax.dot_general(
            hidden[...], head[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        columns = v * head.shape[0] + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        # The last block may extend past the vocabulary; values there are arbitrary, even nan.
        logits = jnp.where(columns < vocab, logits / temperature[...], MASKED)
        new_top = jnp.maximum(top[...], logits.max(axis=1, keepdims=True))
        scale = jnp.exp(top[...] - new_top)
        p = jnp.exp(logits - new_top)
        total[...] = total[...] * scale + p.sum(axis=1, keepdims=True)
        if entropy:
            mean[...] = mean[...] * scale + jnp.sum(p * logits, axis=1, keepdims=True)
        found = jnp.where(columns == targets[...], logits, MASKED).max(axis=1, keepdims=True)
        target[...] = jnp.maximum(target[...], found)
        top[...] = new_top

    @pl.when(v == last)
    def _():
        summed = jnp.maximum(total[...], 1e-30)
        target_out[...] = target[...]
        top_out[...] = top[...]
        logsumexp_out[...] = top[...] + jnp.log(summed)
        mean_out[...] = mean[...] / summed
