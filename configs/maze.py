"""Mazes: walk to a goal in a text maze that is new in every task. This runs no subprocess, so it works everywhere.

python -m echo_jax.train --config=configs/maze.py --workdir=runs/maze
"""

from echo_jax.config import default_config


def get_config():
    c = default_config()
    c.task.mixture = {"maze": 1.0}
    c.task.maze.width = 4
    c.task.maze.height = 4
    c.rollout.max_turns = 16
    c.rollout.max_tokens = 512
    c.rollout.groups = 4
    c.pack.length = 512
    c.pack.rows = 4
    c.warm_start.success_rate = 0.6
    return c
