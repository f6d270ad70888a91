"""Qwen3-32B (huggingface.co/Qwen/Qwen3-32B) with the setups of qwen3_8b.py.

python -m echo_jax.train --config=configs/qwen3_32b.py:/data/Qwen3-32B --workdir=runs/qwen3_32b
python -m echo_jax.compile --config=configs/qwen3_32b.py --topology=v5p:4x4x4
"""

from configs import qwen3_8b


def get_config(argument=""):
    c = qwen3_8b.get_config(argument)
    c.model.num_layers = 64
    c.model.embed_dim = 5120
    c.model.num_heads = 64
    c.model.ffn_dim = 25600
    return c
