"""A decoder-only transformer: RoPE, RMSNorm, grouped-query attention, SwiGLU; layers stacked, scanned, rematerialised.

In: token ids. Out: hidden states; the LM head is applied by the loss and by the sampler. nnx stops at this module's
door: `init_params` gives a graph definition and a plain pytree, and everything above works on those.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from echo_jax.kernels.attention import cached_attention, packed_attention
from echo_jax.kernels.embedding import embed
from echo_jax.sharding import sharding_of

# Logical axes of each parameter by name; parameters of the stacked layers have "layers" in front.
PARAM_AXES = {
    "embedding": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "final_norm": ("norm",),
    "attention_norm": ("norm",),
    "query": ("embed", "heads", "head_dim"),
    "key": ("embed", "kv_heads", "head_dim"),
    "value": ("embed", "kv_heads", "head_dim"),
    "attention_out": ("heads", "head_dim", "embed"),
    "ffn_norm": ("norm",),
    "gate": ("embed", "ffn"),
    "up": ("embed", "ffn"),
    "down": ("ffn", "embed"),
}


# What the backward pass finds saved of each layer; the rest is computed again.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,  # its input only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # and what its matmuls with weights gave
    "none": None,  # all: nothing is computed again
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and numerics of a transformer; see config.py for the fields' meaning."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    compute_dtype: str
    remat: str  # key of REMAT
    attention: str  # of attention.IMPLEMENTATIONS


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers; slot s of a lane holds position s of its sequence."""

    k: jax.Array  # [L, B, S, G, K]
    v: jax.Array  # [L, B, S, G, K]


def init_cache(config: ModelConfig, lanes: int, slots: int) -> KVCache:
    shape = (config.num_layers, lanes, slots, config.num_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.compute_dtype)
    return KVCache(k=zeros, v=jnp.zeros_like(zeros))


def rms_norm(x, scale, eps):
    """x [..., D] normalised in f32, times 1 + scale (scale starts at zero)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * (1.0 + scale)).astype(x.dtype)


def rotate(x, positions, theta):
    """Rotary position embedding, halves convention (arXiv 2104.09864). x [..., H, K], positions [...]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """One layer. `attend(q, k, v)` is given by the caller: packed rows in training, a cache in decoding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        d, h, g, k, f = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_dim
        residual_scale = (2 * config.num_layers) ** -0.5
        self.attention_norm = nnx.Param(jnp.zeros(d))
        self.query = _normal(rngs, (d, h, k), d**-0.5)
        self.key = _normal(rngs, (d, g, k), d**-0.5)
        self.value = _normal(rngs, (d, g, k), d**-0.5)
        self.attention_out = _normal(rngs, (h, k, d), (h * k) ** -0.5 * residual_scale)
        self.ffn_norm = nnx.Param(jnp.zeros(d))
        self.gate = _normal(rngs, (d, f), d**-0.5)
        self.up = _normal(rngs, (d, f), d**-0.5)
        self.down = _normal(rngs, (f, d), f**-0.5 * residual_scale)

    def __call__(self, x, positions, attend):
        """x [..., D], positions [...] -> x [..., D], and whatever `attend` returns beside its output."""
        config = self.config
        h = rms_norm(x, self.attention_norm[...], config.norm_eps)
        q = rotate(jnp.einsum("...d,dhk->...hk", h, self._weight(self.query)), positions, config.rope_theta)
        k = rotate(jnp.einsum("...d,dgk->...gk", h, self._weight(self.key)), positions, config.rope_theta)
        v = jnp.einsum("...d,dgk->...gk", h, self._weight(self.value))
        y, extra = attend(q, k, v)
        x = x + jnp.einsum("...hk,hkd->...d", y, self._weight(self.attention_out))
        h = rms_norm(x, self.ffn_norm[...], config.norm_eps)
        gate = jax.nn.silu(jnp.einsum("...d,df->...f", h, self._weight(self.gate)))
        up = jnp.einsum("...d,df->...f", h, self._weight(self.up))
        return x + jnp.einsum("...f,fd->...d", gate * up, self._weight(self.down)), extra

    def _weight(self, param):
        return param[...].astype(self.config.compute_dtype)


def _normal(rngs, shape, scale):
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


class Transformer(nnx.Module):
    """Hidden states of packed rows (`__call__`) or of one more token a lane (`decode`)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _normal(rngs, (config.vocab_size, config.embed_dim), config.embed_dim**-0.5)
        if not config.tie_embeddings:
            self.lm_head = _normal(rngs, (config.vocab_size, config.embed_dim), config.embed_dim**-0.5)
        self.final_norm = nnx.Param(jnp.zeros(config.embed_dim))
        stack = nnx.split_rngs(splits=config.num_layers)(nnx.vmap(lambda rngs: Block(config, rngs)))
        self.layers = stack(rngs)

    def __call__(self, tokens, positions, segment_ids, mesh: Mesh | None = None):
        """tokens, positions, segment_ids int32 [B, T] -> hidden [B, T, D] in the compute dtype.

        `mesh`: where they lie, for the kernels that must be told; None: on one device.
        """

        def attend(q, k, v):
            y = packed_attention(q, k, v, segment_ids, implementation=self.config.attention, mesh=mesh)
            return y, None

        def layer(x, block):
            return block(x, positions, attend)[0]

        if (policy := REMAT[self.config.remat]) is not None:
            layer = nnx.remat(layer, policy=policy)
        run = nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self._finish(run(self._embed(tokens, mesh), self.layers))

    def decode(self, tokens, positions, cache: KVCache):
        """Feeds one token a lane. tokens, positions int32 [B] -> hidden [B, D], and the cache with this token in it.

        A position past the cache's slots writes nothing (an idle lane).
        """
        lanes = jnp.arange(tokens.shape[0])

        def layer(carry, block, index):
            x, cache = carry

            def attend(q, k, v):
                new_k = cache.k.at[index, lanes, positions].set(k.astype(cache.k.dtype), mode="drop")
                new_v = cache.v.at[index, lanes, positions].set(v.astype(cache.v.dtype), mode="drop")
                return cached_attention(q, new_k[index], new_v[index], positions), KVCache(k=new_k, v=new_v)

            return block(x, positions, attend)

        run = nnx.scan(layer, in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
        x, cache = run((self._embed(tokens), cache), self.layers, jnp.arange(self.config.num_layers))
        return self._finish(x), cache

    def head(self):
        """The LM head [V, D], in the parameters' dtype: the embedding itself when tied."""
        return (self.embedding if self.config.tie_embeddings else self.lm_head)[...]

    def _embed(self, tokens, mesh: Mesh | None = None):
        return embed(self.embedding[...], tokens, self.config.compute_dtype, mesh)

    def _finish(self, x):
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)


def init_params(config: ModelConfig, seed: int, mesh: Mesh):
    """Returns (graph definition, parameters on the mesh): the same numbers on every mesh."""
    graphdef, abstract = abstract_params(config, mesh)

    def init():
        return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=seed)), nnx.Param))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return graphdef, jax.jit(init, out_shardings=shardings)()


def abstract_params(config: ModelConfig, mesh: Mesh):
    """Returns (graph definition, pytree of ShapeDtypeStruct with shardings), with no memory used."""
    if config.vocab_size % mesh.shape["tensor"]:
        raise ValueError(
            f"a vocabulary of {config.vocab_size} is not divisible by mesh.tensor = {mesh.shape['tensor']}"
        )
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))
    graphdef, state = nnx.split(model)
    pure = nnx.to_pure_dict(state)

    def leaf(path, x):
        names = [entry.key for entry in path]
        axes = (("layers",) if "layers" in names else ()) + PARAM_AXES[names[-1]]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(mesh, axes))

    return graphdef, jax.tree_util.tree_map_with_path(leaf, pure)


def used_dtype(path, dtype, config: ModelConfig):
    """Returns what the model casts a parameter to where it uses it: the compute dtype, but for the norms' scales."""
    return dtype if PARAM_AXES[path[-1].key] == ("norm",) else jnp.dtype(config.compute_dtype)


def bind(graphdef, params) -> Transformer:
    """Returns the model over these parameters; for use inside a jitted function."""
    return nnx.merge(graphdef, params)
