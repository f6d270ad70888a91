"""A run of a few seconds, for tests: every part of the quickstart at its smallest. It is too short to learn anything.

python -m echo_jax.train --config=configs/tiny.py --workdir=runs/tiny
"""

from echo_jax.config import default_config


def get_config():
    c = default_config()
    c.num_steps = 4
    c.model.num_layers = 2
    c.model.embed_dim = 32
    c.model.num_heads = 2
    c.model.num_kv_heads = 1
    c.model.head_dim = 16
    c.model.ffn_dim = 64
    c.rollout.groups = 2
    c.rollout.group_size = 2
    c.rollout.max_turns = 2
    c.rollout.max_tokens = 64
    c.rollout.max_turn_tokens = 12
    c.rollout.tool_threads = 2
    c.rollout.temperature = 0.8
    c.rollout.save_every = 1
    c.warm_start.num_steps = 30  # enough to call tools, so that RL has observations to train on
    c.warm_start.demonstrations = 8
    c.warm_start.success_rate = 1.0
    c.warm_start.batch = 8
    c.warm_start.learning_rate = 1e-2
    c.pack.length = 64
    c.pack.rows = 2
    c.loss.token_block = 64
    c.loss.kl_weight = 0.1
    c.eval.episodes = 4
    c.eval.transcripts = 4
    c.checkpoint.every = 10
    return c
