"""The shapes of an engine's programs and the size of its pool, fixed before a run's first token.

In: an engine's options, the model, and what its devices have left. Out: a `Layout`, or an error that names the numbers.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from echo_jax.kernels.paged_attention import IMPLEMENTATIONS, implementation_for, pool_heads
from echo_jax.models.transformer import ModelConfig

ADMISSIONS = ("reserved", "optimistic")
POOL_SHARE = 0.9  # of the memory that is left; programs need temporary memory too
GIB = 2**30


class Defaults(NamedTuple):
    """Shapes that suit a kind of device."""

    page: int
    pages_a_chunk: int
    chunks: int
    sessions_a_row: int


DEFAULTS = {
    "tpu": Defaults(64, 8, 8, 2),  # the kernel's page tables must fit its scalar memory
    "gpu": Defaults(16, 4, 64, 2),  # one call costs about the same for any number of chunks
    "cpu": Defaults(16, 2, 8, 8),  # each row and each chunk costs time
}


class PoolTooSmall(ValueError):
    """The pool does not hold one session of full length."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes that no time or load changes, so that they change no bit. Each replica of the model has its own pool and
    an equal part of the sessions, the rows and the chunks."""

    replicas: int
    sessions: int  # of one replica, the most that can be open at once
    rows: int  # of one replica: sessions that decode at once
    steps: int  # that a row decodes at most in one call
    chunks: int  # of one replica: sessions that a prefill call feeds at once
    chunk: int  # ids of one session that a prefill call feeds at most
    page: int  # tokens in a page
    pages: int  # in one replica's pool
    pages_a_session: int  # that a session of max_tokens needs

    @property
    def table(self) -> int:
        """Entries of a page table. They cover whole chunks: a kernel may look at the pages of a chunk's padding."""
        tokens = self.pages_a_session * self.page
        return -(-tokens // self.chunk) * self.chunk // self.page


def page_bytes(config: ModelConfig, page: int, tensor: int, attention: str = "xla") -> int:
    """Returns the memory of a page of `page` tokens in all layers, on one of `tensor` devices that share the heads; see
    `init_pool`."""
    heads, size = pool_heads(config.num_kv_heads, config.head_dim, config.compute_dtype, attention, tensor)
    numbers = config.num_layers * page * 2 * heads * size
    return numbers * jnp.dtype(config.compute_dtype).itemsize // tensor


def plan_layout(
    config: ModelConfig,
    mesh: Mesh,
    *,
    sessions: int,
    max_tokens: int,
    free_bytes: int | None = None,
    attention: str = "auto",
    admission: str = "reserved",
    rows: int = 0,
    page: int = 0,
    chunk: int = 0,
    chunks_per_call: int = 0,
    steps_per_call: int = 8,
    pool_tokens: int = 0,
    pool_gib: float = 0.0,
) -> Layout:
    """Returns the shapes for these options, which `PagedEngine` describes.

    Args:
      mesh: of the engine: replicas over `data`, each over `tensor`.
      sessions: that should be open at once, over all replicas.
      free_bytes: memory that a device has left for the pool; None: unknown, as on a CPU.

    Raises:
      PoolTooSmall: the pool is too small for one session.
      ValueError: an option cannot work.
    """
    for name, value, choices in (("attention", attention, IMPLEMENTATIONS), ("admission", admission, ADMISSIONS)):
        if value not in choices:
            raise ValueError(f"{name} = {value!r}: choose one of {', '.join(choices)}")
    counts = {"rows": rows, "page": page, "chunk": chunk, "chunks_per_call": chunks_per_call}
    for name, value in (counts | {"pool_tokens": pool_tokens, "pool_gib": pool_gib}).items():
        if value < 0:
            raise ValueError(f"{name} = {value} is negative")
    if steps_per_call < 1:
        raise ValueError(f"steps_per_call = {steps_per_call} must be at least 1")
    if pool_tokens and pool_gib:
        raise ValueError(f"pool_tokens = {pool_tokens} and pool_gib = {pool_gib:g} say the same: set one of them")
    attention = implementation_for(attention, mesh)
    defaults = DEFAULTS.get(mesh.devices.flat[0].platform, DEFAULTS["gpu"])
    page = page or defaults.page
    chunk = chunk or page * defaults.pages_a_chunk
    if chunk % page:
        raise ValueError(f"chunk = {chunk} is not a multiple of page = {page}")
    replicas, tensor = mesh.shape["data"], mesh.shape["tensor"]
    share = lambda count: -(-count // replicas)  # noqa: E731
    asked = share(sessions)
    a_session, size = -(-max_tokens // page), page_bytes(config, page, tensor, attention)
    wanted = asked * a_session
    if pool_tokens:
        pages, source = -(-share(pool_tokens) // page), f"pool_tokens = {pool_tokens}"
    elif pool_gib:
        pages, source = int(pool_gib * GIB) // size, f"pool_gib = {pool_gib:g}"
    elif free_bytes is None:
        pages, source = wanted, ""
    else:
        pages = min(wanted, max(0, int(POOL_SHARE * free_bytes)) // size)
        source = f"{POOL_SHARE:g} of the {free_bytes / GIB:.2f} GiB that a device has left"
    if pages < a_session:
        raise PoolTooSmall(
            f"{source} holds {pages * page} tokens in pages of {page} ({size} bytes a device each), but one session "
            f"may need max_tokens = {max_tokens}"
        )
    return Layout(
        replicas=replicas,
        sessions=asked if admission == "optimistic" else min(asked, pages // a_session),
        # These follow from the config alone: the memory that happens to be left must not change a bit.
        rows=min(asked, share(rows) or max(8, -(-asked // defaults.sessions_a_row))),
        steps=steps_per_call,
        chunks=min(asked, share(chunks_per_call or defaults.chunks)),
        chunk=chunk,
        page=page,
        pages=pages,
        pages_a_session=a_session,
    )
