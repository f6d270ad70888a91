"""Qwen3-8B (huggingface.co/Qwen/Qwen3-8B) with the setup of ECHO's paper, or that of its release. After a colon comes
the folder of the weights, then, if it is not the paper's, the setup: a name in echo_jax/presets.py.

python -m echo_jax.train --config=configs/qwen3_8b.py:/data/Qwen3-8B --workdir=runs/qwen3_8b
python -m echo_jax.train --config=configs/qwen3_8b.py:/data/Qwen3-8B:released --workdir=runs/qwen3_8b_released
python -m echo_jax.compile --config=configs/qwen3_8b.py --topology=v5p:4x4x4
"""

from echo_jax import presets
from echo_jax.config import default_config


def get_config(argument=""):
    weights, preset = presets.parse(argument)
    c = default_config()
    presets.PRESETS[preset](c)
    c.model.weights = weights
    c.model.vocab_size = 151_936
    c.model.num_layers = 36
    c.model.embed_dim = 4096
    c.model.num_heads = 32
    c.model.num_kv_heads = 8
    c.model.head_dim = 128
    c.model.ffn_dim = 12288
    c.model.rope_theta = 1_000_000.0
    c.model.tie_embeddings = False
    c.model.qk_norm = True
    c.model.compute_dtype = "bfloat16"
    c.model.attention = "splash"
    c.render.format = "qwen3"
    c.task.mixture = {"shell": 1.0}
    c.rollout.grammar = "json"
    # The pod.
    c.sandbox.output_bytes = 8_192
    c.pack.length = 16_384
    c.pack.rows = 0
    c.mesh.fsdp = 0
    c.loss.token_block = 1_024
    return c
