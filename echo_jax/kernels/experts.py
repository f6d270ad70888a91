"""A mixture of experts that drops no token: each goes to its chosen experts, however many others go there too.

Tokens stay on their device, sorted by expert; one grouped matmul serves all experts (`jax.lax.ragged_dot`). The weights
are gathered, like every other matrix. A token's output depends on that token alone, so packing changes nothing.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from echo_jax.system.sharding import MESH_AXIS_OF, free_axes


def mix(x, router, gate, up, down, *, per_token: int, normalize: bool, mesh: Mesh | AbstractMesh | None = None):
    """Returns each token's sum over its `per_token` likeliest experts, each a SwiGLU (arXiv 2505.09388, 2).

    Args:
      x: [B, ..., D].
      router: [D, E].
      gate, up: [E, D, F].
      down: [E, F, D].
      normalize: whether to rescale the probabilities of the chosen experts so that they sum to 1.
      mesh: where the arrays are. None: on one device.

    Returns:
      Like x. The router's softmax and the sum over experts are in f32; partial sums over `tensor` are added in x's
      dtype.
    """
    if mesh is None:
        return _mix(x, router, gate, up, down, per_token, normalize)
    rows, embed, ffn = (MESH_AXIS_OF[name] for name in ("batch", "embed", "ffn"))
    free = free_axes(mesh)
    rows = tuple(axis for axis in rows if axis in free)

    def local(x, router, gate, up, down):
        whole = lambda w, axis: jax.lax.all_gather(w, embed, axis=axis, tiled=True)  # noqa: E731
        y = _mix(x, whole(router, 0), whole(gate, 1), whole(up, 1), whole(down, 2), per_token, normalize)
        return jax.lax.psum(y, ffn)

    tokens, wide = PartitionSpec(rows, *[None] * (x.ndim - 1)), PartitionSpec(None, embed, ffn)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, PartitionSpec(embed, None), wide, wide, PartitionSpec(None, ffn, embed)),
        out_specs=tokens,
        axis_names=free,
    )(x, router, gate, up, down)


def _mix(x, router, gate, up, down, per_token: int, normalize: bool):
    tokens = x.reshape(-1, x.shape[-1])
    probability, chosen = jax.lax.top_k(jax.nn.softmax((tokens @ router).astype(jnp.float32)), per_token)
    if normalize:
        probability = probability / probability.sum(-1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # of (token, place), token by token
    sizes = jnp.bincount(chosen.reshape(-1), length=len(gate)).astype(jnp.int32)
    to_experts = tokens[order // per_token]
    dot = lambda x, w: jax.lax.ragged_dot(x, w, sizes)  # noqa: E731
    made = dot(jax.nn.silu(dot(to_experts, gate)) * dot(to_experts, up), down)
    made = made[jnp.argsort(order)].reshape(*chosen.shape, -1).astype(jnp.float32)
    return (made * probability[..., None]).sum(1).reshape(x.shape).astype(x.dtype)
