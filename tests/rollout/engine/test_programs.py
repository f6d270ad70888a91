"""The engine's programs compiled ahead of time for TPUs: they work in place, and move nothing of the pool's size."""

import pytest

from configs import qwen3_8b, smollm2_135m
from echo_jax.learner.learner import build_learner
from echo_jax.rollout.engine.layout import page_bytes, plan_layout
from echo_jax.rollout.engine.placement import Placement
from echo_jax.run.ahead_of_time import lower_engine, tpu_devices
from echo_jax.run.resident import GIB
from echo_jax.system import hlo

MOST_GIB = 0.25  # of temporary memory on a chip


def qwen3():
    return qwen3_8b.get_config()


def smollm2():
    config = smollm2_135m.get_config()
    config.mesh.fsdp = config.pack.rows = 0
    return config


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("config", "topology", "host", "tensor", "pool_tokens"),
    [
        pytest.param(qwen3(), "v5e:16x16", (), 4, 262_144, id="v5e:16x16"),
        pytest.param(qwen3(), "v5p:2x2x1", (), 4, 524_288, id="v5p:2x2x1"),
        pytest.param(qwen3(), "v5e:2x4", (2, 4, 1), 8, 524_288, id="v5e:2x4, one host"),
        pytest.param(qwen3(), "v6e:2x4", (2, 4, 1), 8, 524_288, id="v6e:2x4, one host"),
        # A replica of the model on each chip.
        pytest.param(smollm2(), "v5e:2x4", (2, 4, 1), 1, 8 * 131_072, id="v5e:2x4, replicas"),
    ],
)
def test_programs_for_a_host_of_tpus_work_in_place(config, topology, host, tensor, pool_tokens):
    """The pool is updated where it is, and nothing as large as the pages of a layer is copied, gathered or moved. Nor
    are all layers' matrices of queries, keys and values laid out anew, which took .35 GiB on v5e:16x16."""
    learner = build_learner(config, config.model.vocab_size, tpu_devices(topology, host))
    placement = Placement(learner.mesh, learner.model_config, process=0)
    assert placement.local.shape["tensor"] == tensor
    sizes = {"sessions": 256, "max_tokens": config.rollout.max_tokens, "rows": 64, "pool_tokens": pool_tokens}
    layout = plan_layout(learner.model_config, placement.local, **sizes)
    pool = layout.pages * page_bytes(learner.model_config, layout.page, tensor, "ragged")
    for lowered in lower_engine(learner, placement, layout).values():
        compiled = lowered.compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory.alias_size_in_bytes >= pool
        assert memory.temp_size_in_bytes <= MOST_GIB * GIB < pool
        assert all(c.bytes < pool // config.model.num_layers for c in hlo.collectives(text))
        assert f"[{config.model.num_layers * layout.pages},{layout.page}," in text
        assert f"[{layout.pages},{layout.page}," not in text
