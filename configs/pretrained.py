"""Any supported published model: give a folder of safetensors, or a .gguf file, after a colon.

python -m echo_jax.train --config=configs/pretrained.py:FOLDER --workdir=runs/NAME

The model's sizes are read from there, and its chat format is used. For Llama 3 models, set the format:
`--config.render.format=llama_3 --config.rollout.grammar=llama`. `--config.lora.rank=32
--config.model.param_dtype=bfloat16` trains only adapters. You still have to set the size of a rollout and of a step.
"""

from echo_jax.config import default_config
from echo_jax.models.pretrained import fields_of


def get_config(weights=""):
    c = default_config()
    c.model.weights = weights
    if weights:
        c.model.update(fields_of(weights))
    c.model.compute_dtype = "bfloat16"
    c.render.format = "qwen3" if c.model.qk_norm else "template"
    c.rollout.grammar = "json"
    c.task.mixture = {"shell": 1.0}
    c.rollout.max_turns = 8
    c.rollout.max_tokens = 2_048
    c.rollout.max_turn_tokens = 256
    c.sandbox.output_bytes = 1_024
    c.warm_start.num_steps = 0
    c.optimizer.learning_rate = 1e-6
    c.pack.length = 2_048
    c.pack.rows = 0
    return c
