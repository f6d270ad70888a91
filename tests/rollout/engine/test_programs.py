"""The engine's programs compiled ahead of time for TPUs: they work in place, and move nothing of the pool's size."""

import jax
import numpy as np
import pytest

from configs import qwen3_8b
from echo_jax.learner.learner import build_learner
from echo_jax.models.transformer import abstract_params, used_dtype
from echo_jax.rollout.engine.layout import plan_layout
from echo_jax.rollout.engine.programs import make_programs, pool_sharding
from echo_jax.run.ahead_of_time import GIB, tpu_devices
from echo_jax.system import hlo
from echo_jax.system.sharding import make_mesh, replicated


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "chips", "most_gib"),
    # On v5p the compiler lays out the matrices of keys and values anew: with two heads a chip they are padded.
    [("v5e:2x4", 8, 0.25), ("v6e:2x4", 8, 0.25), ("v5p:2x2x1", 4, 0.45)],
)
def test_programs_for_a_host_of_tpus_work_in_place(topology, chips, most_gib):
    """Qwen3-8B with contexts of 16k tokens: the pool is updated where it is, and nothing of its size is moved."""
    devices = tpu_devices(topology)[:chips]
    learner = build_learner(qwen3_8b.get_config(), 151_936, devices)
    config, mesh = learner.model_config, make_mesh(1, 1, chips, devices)
    graphdef, abstract = abstract_params(config, mesh)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, used_dtype(path, x.dtype, config), sharding=x.sharding), abstract
    )
    layout = plan_layout(config, mesh, sessions=256, max_tokens=16_384, rows=64, pool_tokens=65_536)
    programs = make_programs(graphdef, config, mesh, layout, temperature=1.0, stop_ids=(0,))
    shape = jax.eval_shape(programs.new_pool)
    pool = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=pool_sharding(mesh))
    everywhere = replicated(mesh)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=everywhere)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    rows, chunks, chunk, pages = layout.rows, layout.chunks, layout.chunk, layout.table
    for lowered in (
        programs.decode.lower(params, pool, *(ints(rows) for _ in range(4)), ints(rows, pages), ints(1), key),
        programs.prefill.lower(params, pool, ints(chunks, chunk), ints(chunks, chunk), ints(chunks, pages)),
        programs.copy.lower(pool, ints(8), ints(8)),
    ):
        compiled = lowered.compile()
        memory, bytes_a_chip = compiled.memory_analysis(), pool.size * pool.dtype.itemsize // chips
        assert memory.alias_size_in_bytes >= bytes_a_chip
        assert memory.temp_size_in_bytes <= most_gib * GIB
        assert all(c.bytes < bytes_a_chip // 8 for c in hlo.collectives(compiled.as_text()))
