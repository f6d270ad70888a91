"""ECHO's setup as published, field by field: the text of the paper, and the config that its authors released.

In: a config of a model. Out: the same config with one of the two setups. They differ; the README has a table.
"""

import ml_collections


def paper(c: ml_collections.ConfigDict) -> None:
    """The text of the paper (arXiv 2605.24517)."""
    _common(c)
    c.loss.clip_low = 0.2
    c.loss.clip_high = 0.28  # section 4
    # Equation 3. It counts the tool's exit code as an observation, which is in the class of boilerplate here.
    c.loss.class_weights = {"body": 1.0, "boilerplate": 1.0, "truncation": 0.0, "feedback": 0.0, "warning": 0.0}
    c.loss.observation_temperature = "1"
    c.optimizer.b2 = 0.95  # of its setup, as all of `_common`
    c.optimizer.warmup_steps = 0  # none is mentioned


def released(c: ml_collections.ConfigDict) -> None:
    """The authors' config and code, where they differ from the paper's text."""
    _common(c)
    c.loss.clip_low = 0.2
    c.loss.clip_high = 0.2
    c.loss.advantage = "group"
    c.loss.advantage_options = {"ddof": 1}  # torch's std
    # The code trains whatever the environment wrote but lines that start as a warning does.
    c.loss.class_weights = {"body": 1.0, "boilerplate": 1.0, "truncation": 1.0, "feedback": 1.0, "warning": 0.0}
    c.loss.observation_temperature = "sampling"  # the logits that the policy term has divided are used again
    c.loss.observation_epsilon = 1e-3
    c.optimizer.b2 = 0.999  # of its config, as the next
    c.optimizer.warmup_steps = 20


PRESETS = {"paper": paper, "released": released}


def parse(argument: str) -> tuple[str, str]:
    """Returns (folder of weights, preset) of what follows the colon of --config: "FOLDER", "FOLDER:PRESET" or
    ":PRESET"; without a preset, the paper's."""
    folder, colon, preset = argument.rpartition(":")
    return (folder, preset) if colon and preset in PRESETS else (argument, "paper")


def _common(c: ml_collections.ConfigDict) -> None:
    """What the paper's setup and the released config agree on."""
    c.num_steps = 500
    c.rollout.groups = 16
    c.rollout.group_size = 16
    c.rollout.max_turns = 16
    c.rollout.max_tokens = 16_384
    c.rollout.max_turn_tokens = 2_048
    c.rollout.temperature = 0.8  # and 0.6 to evaluate: evaluate --config.rollout.temperature=0.6
    c.loss.mode = "echo"
    c.loss.policy = "grpo"
    c.loss.policy_normalizer = "sequence"  # section 4 and the release; equation 2 writes one mean over all tokens
    c.loss.observation_weight = 0.05
    c.loss.observation_normalizer = "observation"  # equation 3
    c.loss.kl_weight = 0.0
    c.optimizer.learning_rate = 1e-6
    c.optimizer.b1 = 0.9
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 0.2
    c.warm_start.num_steps = 0
