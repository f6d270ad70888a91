"""A decoder-only transformer: RoPE, RMSNorm, grouped-query attention, SwiGLU; layers stacked, scanned, rematerialised.

Settings of it are Llama 3 and SmolLM2, Qwen2.5 (biases), Qwen3 (norms of queries and keys) and Qwen3-MoE (experts).
In: token ids. Out: hidden states; the loss and the sampler apply the LM head. nnx stays inside this module:
`init_params` returns a graph definition and a plain pytree, and everything above works on those.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echo_jax.kernels.attention import packed_attention
from echo_jax.kernels.embedding import embed
from echo_jax.kernels.experts import mix
from echo_jax.kernels.paged_attention import paged_attention, pool_heads, write_pages
from echo_jax.models import lora
from echo_jax.models.lora import Lora
from echo_jax.models.rope import NO_SCALING, RopeScaling, frequencies, rotate
from echo_jax.system.sharding import MESH_AXIS_OF, sharding_of

# The matrices of a layer: logical axes of the inputs, and of the outputs.
LINEAR = {
    "query": (("embed",), ("heads", "head_dim")),
    "key": (("embed",), ("kv_heads", "head_dim")),
    "value": (("embed",), ("kv_heads", "head_dim")),
    "attention_out": (("heads", "head_dim"), ("embed",)),
    "gate": (("embed",), ("ffn",)),
    "up": (("embed",), ("ffn",)),
    "down": (("ffn",), ("embed",)),
}
ATTENTION = ("query", "key", "value", "attention_out")
# With `num_experts` these replace gate, up and down: the router, and the matrices of each expert.
ROUTER = {"router": (("embed",), ("experts",))}
EXPERT = {f"expert_{name}": LINEAR[name] for name in ("gate", "up", "down")}
MATRICES = LINEAR | ROUTER | EXPERT
BIASED = ("query", "key", "value")  # with `qkv_bias`

# Logical axes of each parameter by name; parameters of the stacked layers have "layers" in front.
PARAM_AXES = {
    "embedding": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "final_norm": ("norm",),
    "attention_norm": ("norm",),
    "ffn_norm": ("norm",),
    "query_norm": ("norm",),
    "key_norm": ("norm",),
    **{name: ins + outs for name, (ins, outs) in (LINEAR | ROUTER).items()},
    **{name: ("experts", *ins, *outs) for name, (ins, outs) in EXPERT.items()},
    **{f"{name}_bias": LINEAR[name][1] for name in BIASED},
    **{name + lora.A: (*ins, "rank") for name, (ins, _) in LINEAR.items()},
    **{name + lora.B: ("rank", *outs) for name, (_, outs) in LINEAR.items()},
}


# What each layer saves for the backward pass, which recomputes everything else.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,  # its input only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # also the results of its matmuls with weights
    "none": None,  # everything: nothing is recomputed
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
    rope_scaling: RopeScaling = NO_SCALING
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0  # 0: one FFN for all tokens
    experts_per_token: int = 0
    normalize_experts: bool = True
    param_dtype: str = "float32"  # except adapters, which are always float32
    lora: Lora = lora.NO_ADAPTERS

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names in MATRICES that a layer has."""
        return (*ATTENTION, *ROUTER, *EXPERT) if self.num_experts else tuple(LINEAR)

    def sizes(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter in one layer."""
        head_norm = {"query_norm": (self.head_dim,), "key_norm": (self.head_dim,)}
        size_of = {
            "vocab": self.vocab_size,
            "embed": self.embed_dim,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "ffn": self.ffn_dim,
            "experts": self.num_experts,
            "norm": self.embed_dim,
            "rank": self.lora.rank,
        }
        return head_norm.get(name) or tuple(size_of[axis] for axis in PARAM_AXES[name])


def init_pool(config: ModelConfig, pages: int, page: int, attention: str = "xla", shards: int = 1):
    """Returns a pool of KV pages for all layers: [L * N, P, 2G, K], see `paged_attention`.

    Args:
      attention: implementation of it, which may need more heads or a larger K than the model has.
      shards: devices over which the heads are spread.
    """
    heads, size = pool_heads(config.num_kv_heads, config.head_dim, config.compute_dtype, attention, shards)
    return jnp.zeros((config.num_layers * pages, page, 2 * heads, size), config.compute_dtype)


def rms_norm(x, scale, eps):
    """Normalises x [..., D] in f32, then multiplies it by scale (arXiv 1910.07467, eq. 4)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)


class Block(nnx.Module):
    """One layer. The caller passes `attend(q, k, v)`: over packed rows in training, over pages in sampling."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        residual_scale = (2 * config.num_layers) ** -0.5
        self.attention_norm = _ones(config, "attention_norm")
        self.ffn_norm = _ones(config, "ffn_norm")
        for name in config.matrices:
            last = name in ("attention_out", "down", "expert_down")
            scale = _fan_in(config, name) ** -0.5 * (residual_scale if last else 1.0)
            setattr(self, name, _normal(config, rngs, name, scale))
        if config.qkv_bias:
            for name in BIASED:
                bias = f"{name}_bias"
                setattr(self, bias, nnx.Param(jnp.zeros(config.sizes(bias), config.param_dtype)))
        if config.qk_norm:
            self.query_norm = _ones(config, "query_norm")
            self.key_norm = _ones(config, "key_norm")
        for name in config.lora.targets if config.lora.rank else ():
            a, b = config.sizes(name + lora.A), config.sizes(name + lora.B)
            setattr(self, name + lora.A, nnx.Param(lora.init_a(rngs.params(), a, _fan_in(config, name))))
            setattr(self, name + lora.B, nnx.Param(jnp.zeros(b)))

    def __call__(self, x, positions, attend, mesh: Mesh | None = None):
        """x [..., D], positions [...] -> x [..., D], and the second value that `attend` returns."""
        config = self.config
        h = rms_norm(x, self.attention_norm[...], config.norm_eps)
        q, k, v = (self._linear(h, name) for name in ("query", "key", "value"))
        if config.qk_norm:
            q = rms_norm(q, self.query_norm[...], config.norm_eps)
            k = rms_norm(k, self.key_norm[...], config.norm_eps)
        rope = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        y, extra = attend(rotate(q, positions, rope), rotate(k, positions, rope), v)
        x = x + self._linear(y, "attention_out")
        return x + self._ffn(rms_norm(x, self.ffn_norm[...], config.norm_eps), mesh), extra

    def _ffn(self, x, mesh: Mesh | None):
        config = self.config
        if config.num_experts:
            weights = (self._weight(name) for name in (*ROUTER, *EXPERT))
            return mix(x, *weights, per_token=config.experts_per_token, normalize=config.normalize_experts, mesh=mesh)
        return self._linear(jax.nn.silu(self._linear(x, "gate")) * self._linear(x, "up"), "down")

    def _weight(self, name: str):
        return getattr(self, name)[...].astype(self.config.compute_dtype)

    def _linear(self, x, name: str):
        """Multiplies x by a matrix, and adds its bias and its adapter's output, if it has them. Their heads may be one
        axis; see `as_used`."""
        weight, inputs = self._weight, len(LINEAR[name][0])
        y = jnp.tensordot(x, weight(name), inputs)
        if hasattr(self, f"{name}_bias"):
            y = y + weight(f"{name}_bias")
        if hasattr(self, name + lora.A):
            low = jnp.tensordot(x, weight(name + lora.A), inputs)
            y = y + self.config.lora.scale * jnp.tensordot(low, weight(name + lora.B), 1)
        shape = (*x.shape[: x.ndim - inputs], *self.config.sizes(name)[inputs:])
        if y.shape == shape:
            return y
        # Without the barrier XLA joins the reshape to the product, for which a TPU lays out the matrix anew.
        return jax.lax.optimization_barrier(y).reshape(shape)


def _fan_in(config: ModelConfig, name: str) -> int:
    ins, _ = MATRICES[name]
    return math.prod(config.sizes(name)[name in EXPERT :][: len(ins)])


def _normal(config: ModelConfig, rngs: nnx.Rngs, name: str, scale: float):
    return nnx.Param((scale * jax.random.normal(rngs.params(), config.sizes(name))).astype(config.param_dtype))


def _ones(config: ModelConfig, name: str):
    return nnx.Param(jnp.ones(config.sizes(name), config.param_dtype))


class Transformer(nnx.Module):
    """Hidden states of packed rows (`__call__`), or of some more tokens of sequences with a cache (`paged`)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _normal(config, rngs, "embedding", config.embed_dim**-0.5)
        if not config.tie_embeddings:
            self.lm_head = _normal(config, rngs, "lm_head", config.embed_dim**-0.5)
        self.final_norm = _ones(config, "final_norm")
        stack = nnx.split_rngs(splits=config.num_layers)(nnx.vmap(lambda rngs: Block(config, rngs)))
        self.layers = stack(rngs)

    def __call__(self, tokens, positions, segment_ids, mesh: Mesh | None = None):
        """tokens, positions, segment_ids int32 [B, T] -> hidden [B, T, D] in the compute dtype.

        `mesh`: where the arrays are, for kernels that need it; None: on one device.
        """

        def attend(q, k, v):
            y = packed_attention(q, k, v, segment_ids, implementation=self.config.attention, mesh=mesh)
            return y, None

        def layer(x, block):
            return block(x, positions, attend, mesh)[0]

        if (policy := REMAT[self.config.remat]) is not None:
            layer = nnx.remat(layer, policy=policy)
        run = nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self._finish(run(self._embed(tokens, mesh), self.layers))

    def paged(self, tokens, positions, pool, table, *, attention: str, mesh: Mesh | None = None):
        """Feeds some tokens of each sequence, whose keys and values lie in pages.

        Args:
          tokens, positions: int32 [B, C]; position -1: padding.
          pool: [L * N, P, 2G, K], the N pages of layer 0 first; see `init_pool`.
          table: int32 [B, M], the pages of each sequence, from 0 to N - 1.
          attention: implementation of `paged_attention`.

        Returns:
          hidden [B, C, D], and the pool with these tokens in it.
        """
        pages = pool.shape[0] // self.config.num_layers
        shards = 1 if mesh is None else mesh.shape[MESH_AXIS_OF["kv_heads"]]
        attend_pages = functools.partial(
            paged_attention, implementation=attention, mesh=mesh, kv_heads=self.config.num_kv_heads
        )

        def layer(carry, block, index):
            x, pool = carry

            def attend(q, k, v):
                own = table + index * pages
                new = write_pages(pool, k, v, own, positions, shards=shards)
                return attend_pages(q, new, own, positions), new

            return block(x, jnp.maximum(positions, 0), attend, mesh)

        run = nnx.scan(layer, in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
        x, pool = run((self._embed(tokens), pool), self.layers, jnp.arange(self.config.num_layers))
        return self._finish(x), pool

    def head(self):
        """The LM head [V, D], in the parameters' dtype: the embedding itself when tied."""
        return (self.embedding if self.config.tie_embeddings else self.lm_head)[...]

    def _embed(self, tokens, mesh: Mesh | None = None):
        return embed(self.embedding[...], tokens, self.config.compute_dtype, mesh)

    def _finish(self, x):
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)


def init_params(config: ModelConfig, seed: int, mesh: Mesh):
    """Returns (graph definition, parameters on the mesh): the same numbers on every mesh."""
    return _init(config, seed, mesh, lambda params: params)


def init_adapters(config: ModelConfig, seed: int, mesh: Mesh):
    """Returns only the adapters, as `init_params` would make them: for a model whose other weights are loaded."""
    return _init(config, seed, mesh, lambda params: lora.split(params)[0])[1]


def _init(config: ModelConfig, seed: int, mesh: Mesh, part):
    graphdef, abstract = abstract_params(config, mesh)

    def init():
        return part(nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=seed)), nnx.Param)))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, part(abstract))
    return graphdef, jax.jit(init, out_shardings=shardings)()


def abstract_params(config: ModelConfig, mesh: Mesh):
    """Returns (graph definition, pytree of ShapeDtypeStruct with shardings), without allocating arrays."""
    if config.vocab_size % mesh.shape["tensor"]:
        raise ValueError(f"vocab_size = {config.vocab_size} is not divisible by mesh.tensor = {mesh.shape['tensor']}")
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))
    graphdef, state = nnx.split(model)
    pure = nnx.to_pure_dict(state)

    def leaf(path, x):
        names = [entry.key for entry in path]
        axes = (("layers",) if "layers" in names else ()) + PARAM_AXES[names[-1]]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(mesh, axes))

    return graphdef, jax.tree_util.tree_map_with_path(leaf, pure)


def as_used(path, x: jax.ShapeDtypeStruct, config: ModelConfig) -> jax.ShapeDtypeStruct:
    """Returns how the sampler holds a parameter: in the compute dtype, except for the norms' scales; and if its last
    axes are heads, G, and their size, K, with G * K as one axis. A TPU lays out an array in tiles of its last two axes,
    and multiplies by tiles of [D, G * K] as they lie. For tiles of [G, K] it would copy all layers in each call.
    """
    axes, spec = PARAM_AXES[path[-1].key], x.sharding.spec
    dtype = x.dtype if axes == ("norm",) else jnp.dtype(config.compute_dtype)
    if axes[-1] != "head_dim":
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    merged = NamedSharding(x.sharding.mesh, PartitionSpec(*spec[:-1]))
    return jax.ShapeDtypeStruct((*x.shape[:-2], x.shape[-2] * x.shape[-1]), dtype, sharding=merged)


def bind(graphdef, params) -> Transformer:
    """Returns the model with these parameters; for use inside a jitted function."""
    return nnx.merge(graphdef, params)
