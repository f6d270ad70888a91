"""`tiny` with every part that can be brought from outside the package."""

from configs import tiny


def get_config():
    c = tiny.get_config()
    c.warm_start.num_steps = 0
    c.task.counting = {"family": "mine:CountFamily", "most": 3}
    c.task.mixture = {"counting": 1.0}
    c.tools = {"count": {"tool": "mine:Count", "unit": "words"}}
    c.rollout.engine = "mine:Replay"
    c.rollout.engine_options = {"conversations": (("count oak oak", "submit 2"), ("submit 1",))}
    c.loss.old_logprobs = "recomputed"
    c.loss.policy = "mine:gated"
    c.loss.policy_options = {"sharpness": 2.0}
    c.loss.advantage = "mine:ranks"
    c.loss.advantage_options = {"spread": 0.5}
    c.loss.observation_filter = "mine:not_the_first"
    c.loss.observation_filter_options = {"skipped": 1}
    c.loss.tool_weights = {"count": 0.5}
    return c
