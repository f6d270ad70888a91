"""Qwen3-8B (huggingface.co/Qwen/Qwen3-8B) with the paper's setup; give the folder of its weights after a colon.

python -m echo_jax.train --config=configs/qwen3_8b.py:/data/Qwen3-8B --workdir=runs/qwen3_8b
python -m echo_jax.compile --config=configs/qwen3_8b.py --topology=v5p:4x4x4
"""

from echo_jax.config import default_config


def get_config(weights=""):
    c = default_config()
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
    # The paper's setup (arXiv 2605.24517).
    c.num_steps = 500
    c.rollout.groups = 16
    c.rollout.group_size = 16
    c.rollout.grammar = "json"
    c.rollout.max_turns = 16
    c.rollout.max_tokens = 16_384
    c.rollout.max_turn_tokens = 2_048
    c.rollout.temperature = 0.8
    c.optimizer.learning_rate = 1e-6
    c.optimizer.clip_norm = 0.2
    c.warm_start.num_steps = 0
    # The pod.
    c.sandbox.output_bytes = 8_192
    c.pack.length = 16_384
    c.pack.rows = 0
    c.mesh.fsdp = 0
    c.loss.token_block = 1_024
    return c
