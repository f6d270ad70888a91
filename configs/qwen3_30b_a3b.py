"""Qwen3-30B-A3B (huggingface.co/Qwen/Qwen3-30B-A3B), a mixture of experts, with the setups of qwen3_8b.py.

python -m echo_jax.train --config=configs/qwen3_30b_a3b.py:/data/Qwen3-30B-A3B --workdir=runs/qwen3_30b_a3b
"""

from configs import qwen3_8b


def get_config(argument=""):
    c = qwen3_8b.get_config(argument)
    c.model.num_layers = 48
    c.model.embed_dim = 2048
    c.model.num_kv_heads = 4
    c.model.num_experts = 128
    c.model.experts_per_token = 8
    c.model.ffn_dim = 768
    return c
