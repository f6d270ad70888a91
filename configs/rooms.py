"""Rooms: walk on a map that the agent never gets to see; the tools' output reveals the dynamics.

python -m echo_jax.train --config=configs/rooms.py --workdir=runs/rooms
"""

from echo_jax.config import default_config


def get_config():
    c = default_config()
    c.task.mixture = {"rooms": 1.0}
    c.num_steps = 60
    c.rollout.groups = 4
    c.rollout.max_turns = 8
    c.rollout.max_tokens = 128
    c.warm_start.num_steps = 80
    c.warm_start.demonstrations = 512
    c.warm_start.success_rate = 0.3
    c.warm_start.observation_weight = 0.02  # at 0.2 the warm start alone learns the map and leaves nothing to compare
    c.loss.observation_weight = 0.1
    c.optimizer.learning_rate = 3e-4
    return c
