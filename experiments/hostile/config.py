"""A run of every family with a sandbox under a policy that attacks in nine of ten rollouts."""

from configs.tiny import get_config as tiny


def get_config():
    c = tiny()
    c.num_steps = 6
    c.task.mixture = {"lookup": 1.0, "shell": 2.0, "python": 1.0, "sqlite": 1.0, "rooms": 1.0}
    c.rollout.engine = "experiments.hostile.policy:HostileEngine"
    c.rollout.groups = 6
    c.rollout.group_size = 10  # one of ten is honest
    c.rollout.max_turns = 6
    c.rollout.max_tokens = 1536
    c.rollout.max_turn_tokens = 512
    c.rollout.tool_threads = 8
    c.pack.length = 1536
    c.sandbox.timeout_seconds = 2.0
    c.sandbox.score_seconds = 5.0
    c.loss.kl_weight = 0.0
    c.eval.episodes = 6
    return c
