"""Qwen3-14B (huggingface.co/Qwen/Qwen3-14B) with the setups of qwen3_8b.py.

python -m echo_jax.train --config=configs/qwen3_14b.py:/data/Qwen3-14B --workdir=runs/qwen3_14b
python -m echo_jax.compile --config=configs/qwen3_14b.py --topology=v5p:4x4x4
"""

from configs import qwen3_8b


def get_config(argument=""):
    c = qwen3_8b.get_config(argument)
    c.model.num_layers = 40
    c.model.embed_dim = 5120
    c.model.num_heads = 40
    c.model.ffn_dim = 17408
    return c
