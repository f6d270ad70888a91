"""Plain XLA: an outer loop over vocabulary blocks, an inner loop over token blocks; backward recomputes the logits.

Each pass reads each block of the head once, and finishes and writes its gradient in place before the next block. So
nothing of size [tokens, vocab] exists, nor a second array of the head's size (except one cast of it, which XLA moves
out of the loop, if the head's dtype is not that of the matmuls). Inactive rows are skipped exactly: active rows come
first in the inner loop, which runs only over the blocks they fill. One compiled program serves any number of them.

The same code serves a head that is sharded over a mesh, inside `jax.shard_map` (see sharded.py). Then `Axes` names the
axes, and each shard walks its part of the vocabulary. Collectives are in the outer loop or outside both, never in the
inner loop, whose length differs from shard to shard.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # marks a missing logit; -inf would make 0 × inf = nan in the entropy's gradient


@dataclasses.dataclass(frozen=True)
class Axes:
    """The mesh axes that shard each dimension; none where it is whole."""

    tokens: tuple[str, ...] = ()  # rows of hidden
    vocab: str | None = None  # vocabulary of the head
    embed: str | None = None  # embedding of the head; one of `tokens` too
    gather_once: bool = False  # gather the head's embedding before the loops, not block by block


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of a call."""

    vocab_block: int
    token_block: int
    entropy: bool
    logit_softcap: float | None
    vocab_axis: int  # of the head: 0 for [V, D], 1 for [D, V]
    axes: Axes = Axes()


class Inputs(NamedTuple):
    """The arrays of a call, or one shard's part of them."""

    hidden: jax.Array  # [N, D]
    head: jax.Array  # [V, D] or [D, V]
    targets: jax.Array  # int32 [N]
    active: jax.Array  # bool [N]
    temperature: jax.Array  # f32 [N]


class Scores(NamedTuple):
    """One number per row, 0 where the row is not active."""

    logprob: jax.Array  # f32 [N]
    logsumexp: jax.Array  # f32 [N]
    entropy: jax.Array  # f32 [N], 0 if not requested
    correct: jax.Array  # bool [N]
    mean_logit: jax.Array  # f32 [N] under p, for the backward pass; 0 without entropy


def forward(inputs: Inputs, options: Options) -> Scores:
    """Scores one shard's rows against the whole vocabulary."""
    rows, head = Rows(inputs, options), _Head(inputs.head, inputs.hidden.dtype, options)
    start = (jnp.full(rows.length, MASKED), jnp.zeros(rows.length), jnp.full(rows.length, MASKED))
    start += (jnp.zeros(rows.length),) * options.entropy

    def over_vocab(v, carry):
        block = head.read(v)

        def over_tokens(t, carry):
            logits, is_target = rows.logits(t, block)
            top, total, target, *mean = (rows.take(x, t) for x in carry)
            new_top = jnp.maximum(top, logits.max(axis=1))
            scale = jnp.exp(top - new_top)
            p = jnp.exp(logits - new_top[:, None])
            target = jnp.maximum(target, jnp.max(jnp.where(is_target, logits, MASKED), axis=1))
            new = (new_top, total * scale + p.sum(axis=1), target)
            new += tuple(m * scale + jnp.sum(p * logits, axis=1) for m in mean)
            return tuple(rows.put(x, updated, t) for x, updated in zip(carry, new, strict=True))

        return jax.lax.fori_loop(0, rows.blocks, over_tokens, carry)

    top, total, target, *mean = jax.lax.fori_loop(0, head.blocks, over_vocab, start)
    if (axis := options.axes.vocab) is not None:
        highest = jax.lax.pmax(top, axis)
        scale = jnp.exp(top - highest)
        total, mean = jax.lax.psum((total * scale, [m * scale for m in mean]), axis)
        top, target = highest, jax.lax.pmax(target, axis)
    total = jnp.maximum(total, 1e-30)  # rows past the blocks in use have a sum of 0
    logsumexp = top + jnp.log(total)
    mean_logit = mean[0] / total if options.entropy else jnp.zeros_like(total)
    entropy = logsumexp - mean_logit if options.entropy else mean_logit
    return Scores(*map(rows.restore, (target - logsumexp, logsumexp, entropy, target >= top, mean_logit)))


def backward(inputs: Inputs, scores: Scores, cotangents: Scores, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of hidden and head for cotangents of logprob, logsumexp and entropy.

    With respect to tempered logits z, δ = p [(g_lse - g_logp) - g_ent (z - E_p z)] + onehot g_logp; then it goes
    through temperature and softcap. dX and each block's dW accumulate in f32.
    """
    rows, head = Rows(inputs, options), _Head(inputs.head, inputs.hidden.dtype, options)
    given = cotangents.logprob, cotangents.logsumexp, cotangents.entropy
    g_logprob, g_logsumexp, g_entropy = (jnp.where(rows.in_use, rows.arrange(g), 0.0) for g in given)
    logsumexp, mean_logit = rows.arrange(scores.logsumexp), rows.arrange(scores.mean_logit)

    def over_vocab(v, carry):
        d_hidden, d_head = carry
        block = head.read(v)

        def over_tokens(t, carry):
            d_hidden, d_weight = carry
            column = lambda x: rows.take(x, t)[:, None]  # noqa: E731
            logits, is_target = rows.logits(t, block)
            p = jnp.exp(logits - column(logsumexp))
            slope = column(g_logsumexp) - column(g_logprob)
            if options.entropy:
                slope = slope - column(g_entropy) * (logits - column(mean_logit))
            delta = p * slope + jnp.where(is_target, column(g_logprob), 0.0)
            if (cap := options.logit_softcap) is not None:
                delta = delta * (1.0 - jnp.square(logits * column(rows.temperature) / cap))
            # This mask also removes the softcap's slope, which is -inf at a masked logit.
            delta = jnp.where(block.fresh, delta / column(rows.temperature), 0.0).astype(block.weight.dtype)
            d_rows = jnp.einsum("nv,vd->nd", delta, block.weight, preferred_element_type=jnp.float32)
            d_hidden = rows.put(d_hidden, rows.take(d_hidden, t) + d_rows, t)
            d_block = jnp.einsum("nv,nd->vd", delta, rows.hidden(t), preferred_element_type=jnp.float32)
            return d_hidden, d_weight + d_block

        zeros = jnp.zeros(block.weight.shape, jnp.float32)
        d_hidden, d_weight = jax.lax.fori_loop(0, rows.blocks, over_tokens, (d_hidden, zeros))
        return d_hidden, head.add(d_head, d_weight, v)

    zeros = jnp.zeros((rows.length, inputs.hidden.shape[1]), jnp.float32), jnp.zeros_like(inputs.head)
    d_hidden, d_head = jax.lax.fori_loop(0, head.blocks, over_vocab, zeros)
    axes = options.axes
    if axes.vocab is not None:
        d_hidden = jax.lax.psum(d_hidden, axes.vocab)
    if summed := tuple(axis for axis in axes.tokens if axis != axes.embed):
        d_head = jax.lax.psum(d_head, summed)
    return rows.restore(d_hidden.astype(inputs.hidden.dtype)), d_head


class Rows:
    """The rows in the order of the inner loop: active ones first, in blocks.

    Copies of the first active row fill the last block. Nothing uses their results and their cotangents are 0, but the
    values must stay finite: 0 × inf is nan, and would be added to the head's gradient. Inactive rows cannot serve, as
    they may hold anything.
    """

    def __init__(self, inputs: Inputs, options: Options):
        n = inputs.hidden.shape[0]
        self._inputs, self._options = inputs, options
        self.block = min(options.token_block, n)
        self.length = -(-n // self.block) * self.block
        order = jnp.argsort(~inputs.active, stable=True).astype(jnp.int32)
        self._place = jnp.argsort(order)
        count = jnp.sum(inputs.active, dtype=jnp.int32)
        self.in_use = jnp.arange(self.length) < count
        self._order = jnp.where(self.in_use, jnp.pad(order, (0, self.length - n)), order[0])
        self.blocks = (count + self.block - 1) // self.block
        self.temperature = self.arrange(inputs.temperature)
        self.targets = self.arrange(inputs.targets)
        if options.axes.vocab is not None:  # counted from the first vocabulary entry of this shard
            shard = inputs.head.shape[options.vocab_axis]
            self.targets -= jax.lax.axis_index(options.axes.vocab) * shard

    def arrange(self, x):
        return x[self._order]

    def restore(self, x):
        """Inverts `arrange`, with zeros on inactive rows."""
        active = self._inputs.active.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(active, x[self._place], jnp.zeros((), x.dtype))

    def take(self, x, t):
        return jax.lax.dynamic_slice_in_dim(x, t * self.block, self.block)

    def put(self, x, new, t):
        return jax.lax.dynamic_update_slice_in_dim(x, new, t * self.block, 0)

    def hidden(self, t):
        """Gathers one block: a sorted copy of all rows would be a second array of the size of hidden."""
        return self._inputs.hidden[self.take(self._order, t)]

    def logits(self, t, block: "_Block"):
        """Returns the tempered logits f32 [tokens, vocab] of two blocks, `MASKED` where not fresh; and whether each
        column is its row's target, fresh or not."""
        logits = jnp.einsum("nd,vd->nv", self.hidden(t), block.weight, preferred_element_type=jnp.float32)
        if (cap := self._options.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        logits = jnp.where(block.fresh, logits / self.take(self.temperature, t)[:, None], MASKED)
        return logits, self.take(self.targets, t)[:, None] == block.columns[None, :]


class _Block(NamedTuple):
    weight: jax.Array  # [block, D]
    columns: jax.Array  # int32 [block] its vocabulary entries, counted within this shard
    fresh: jax.Array  # bool [1, block] whether no earlier block held the entry


class _Head:
    """This shard's part of the head, in blocks of its vocabulary, cast to the dtype of the matmuls.

    If the block size does not divide the vocabulary, the last block overlaps the one before it. The repeated entries
    are not `fresh`, and are ignored.
    """

    def __init__(self, head, dtype, options: Options):
        self._vocab_axis, self._embed, self._dtype = options.vocab_axis, options.axes.embed, dtype
        self._streamed = self._embed is not None and not options.axes.gather_once
        if self._embed is not None and options.axes.gather_once:
            head = head.astype(dtype)
            head = jax.lax.all_gather(head, self._embed, axis=1 - self._vocab_axis, tiled=True)
        self._head = head
        self._size = head.shape[self._vocab_axis]
        self._block = min(options.vocab_block, self._size)
        self.blocks = -(-self._size // self._block)

    def read(self, v) -> _Block:
        first = self._first(v)
        weight = jax.lax.dynamic_slice_in_dim(self._head, first, self._block, axis=self._vocab_axis)
        weight = (weight.T if self._vocab_axis else weight).astype(self._dtype)
        if self._streamed:
            weight = jax.lax.all_gather(weight, self._embed, axis=1, tiled=True)
        columns = first + jnp.arange(self._block)
        return _Block(weight, columns, (columns >= v * self._block)[None, :])

    def add(self, d_head, d_weight, v):
        """Adds the gradient of block v, f32 [block, D], to this shard's part of the head's gradient."""
        if self._embed is not None:
            d_weight = jax.lax.psum_scatter(d_weight, self._embed, scatter_dimension=1, tiled=True)
        d_weight = d_weight.T if self._vocab_axis else d_weight
        first = self._first(v)
        before = jax.lax.dynamic_slice_in_dim(d_head, first, self._block, axis=self._vocab_axis)
        new = (before + d_weight).astype(d_head.dtype)
        return jax.lax.dynamic_update_slice_in_dim(d_head, new, first, self._vocab_axis)

    def _first(self, v):
        return jnp.minimum(v * self._block, self._size - self._block)
