"""Checks the part of a config that describes the objective.

In: a config, of a run or as it is for one environment. Out: nothing, or a `ConfigError` that names field and value.
"""

import sys
from collections.abc import Collection, Mapping

import ml_collections

from echo_jax.config import default_config
from echo_jax.learner.learner import clips_set_by, policy_normalizer_of
from echo_jax.objective.advantages import find_estimator
from echo_jax.objective.policy_losses import find_policy_loss
from echo_jax.objective.selection import find_filter
from echo_jax.objective.weights import MODES
from echo_jax.roles import ENVIRONMENT_CLASSES
from echo_jax.run.ranges import check_float, check_integer, is_number, listed, require
from echo_jax.system import named
from echo_jax.system.errors import ConfigError

RL_MODES = [mode for mode in MODES if mode != "sft"]  # imitation has its own phase, the warm start


def check_loss(config: ml_collections.ConfigDict, own: Collection[str] | None = None) -> None:
    """Checks the fields of the objective of a run or of an environment, and finds the functions that they name.

    Args:
      own: fields that an environment sets itself; None for a run. What it has from the run may be for others.

    Raises:
      ConfigError: a value cannot work, or would have no effect.
    """
    loss = config.loss
    for change in loss.mode_changes:
        pair = isinstance(change, tuple) and len(change) == 2
        require(
            pair and isinstance(change[0], int) and 0 <= change[0] < config.num_steps and change[1] in RL_MODES,
            f"config.loss.mode_changes has {change!r}: each must be (RL step from 0 to {config.num_steps - 1}, mode), "
            f"the mode one of {', '.join(RL_MODES)}",
        )
    modes = _modes(loss)
    is_own = lambda name: own is None or f"loss.{name}" in own  # noqa: E731
    trains_observations = loss.observation_weight > 0 and any(loss.class_weights.values())
    require(
        "env_only" not in modes or trains_observations,
        f"config.loss: env_only trains only observations, but observation_weight = {loss.observation_weight} with "
        "these class_weights trains none; set them above 0",
    )
    filters = {name: loss[name] for name in ("min_valid_calls", "clean_parse") if loss[name] and is_own(name)}
    require(
        modes != {"grpo"} or not filters,
        f"config.loss sets {listed(filters)}, which has no effect in the mode grpo without an observation term: set "
        "loss.mode to echo or env_only, or remove it",
    )
    of_policy = {name: loss[name] for name in ("kl_weight", "entropy_weight", "filter_zero_variance")}
    of_policy |= {f"length_penalty.{name}": weight for name, weight in loss.length_penalty.items()}
    of_policy = {name: value for name, value in of_policy.items() if value and is_own(name)}
    require(
        not of_policy or modes != {"env_only"},
        f"config.loss sets {listed(of_policy)}, parts of the policy term, which the mode env_only lacks: remove these",
    )
    _check_observation(config)
    for name, weight in loss.class_weights.items():
        require(
            name in ENVIRONMENT_CLASSES,
            f"config.loss.class_weights.{name} = {weight}: choose from {', '.join(ENVIRONMENT_CLASSES)}",
        )
    require(
        bool(loss.observation_filter) or not loss.observation_filter_options,
        f"config.loss.observation_filter_options = {dict(loss.observation_filter_options)} has no effect without "
        "config.loss.observation_filter",
    )
    find_filter(loss.observation_filter, loss.observation_filter_options)
    _check_policy(loss)


def check_together(configs: Mapping[str, ml_collections.ConfigDict], config: ml_collections.ConfigDict) -> None:
    """Checks what the environments of a run must have in common, and fields of the run that some environment must use.

    Args:
      configs: by entry of the task mixture, see `of_environment`.
    """
    losses = {entry: own.loss for entry, own in configs.items()}
    normalizers = {entry: policy_normalizer_of(loss) for entry, loss in losses.items()}
    require(
        len(set(normalizers.values())) <= 1,
        "config.environments: one batch has one denominator of the policy term, but "
        + ", ".join(f"{entry} has policy_normalizer {normalizer}" for entry, normalizer in normalizers.items())
        + " (auto: as in the policy loss's paper); set config.loss.policy_normalizer",
    )
    require(
        not config.loss.kl_clamp or any(loss.kl_weight for loss in losses.values()),
        f"config.loss.kl_clamp = {config.loss.kl_clamp} has no effect without a KL: set kl_weight, or kl_clamp to 0",
    )
    require(
        config.loss.observation_temperature == "1" or any(own.rollout.temperature != 1 for own in configs.values()),
        "config.loss.observation_temperature = 'sampling' has no effect with rollout.temperature = 1: set another "
        "rollout.temperature, or observation_temperature to '1'",
    )
    target = config.loss.observation_target_ratio
    require(
        not target or any("echo" in _modes(loss) and loss.observation_weight > 0 for loss in losses.values()),
        f"config.loss.observation_target_ratio = {target} holds the ratio of two terms, but no step has both: set "
        "loss.mode to echo and observation_weight, where lambda starts, above 0",
    )


def _modes(loss: ml_collections.ConfigDict) -> set[str]:
    return {loss.mode, *(mode for _, mode in loss.mode_changes)}


def _check_observation(config: ml_collections.ConfigDict) -> None:
    """Checks the fields of the observation term's schedule, controller and length."""
    loss, defaults = config.loss, default_config().loss
    schedule, points = loss.observation_schedule, loss.observation_schedule_points
    pairs = all(isinstance(p, tuple) and len(p) == 2 and all(is_number(x) and x >= 0 for x in p) for p in points)
    steps = [step for step, _ in points] if pairs else []
    require(
        pairs and all(isinstance(step, int) for step in steps) and len(set(steps)) == len(steps),
        f"config.loss.observation_schedule_points = {points}: each must be (RL step, share of lambda), every step once",
    )
    for step, share in points:
        check_integer("loss.observation_schedule_points", step)
        require(share <= sys.float_info.max, f"config.loss.observation_schedule_points has {share}: it must be finite")
        check_float("loss.observation_schedule_points", float(share))
    require(
        bool(points) == (schedule == "piecewise"),
        f"config.loss.observation_schedule = {schedule!r} with observation_schedule_points = {points}: the schedule "
        "piecewise needs points, and no other uses them",
    )
    unused = {"constant": ("observation_schedule_end",)}
    unused["piecewise"] = ("observation_schedule_end", "observation_schedule_steps")
    set_in_vain = {name: loss[name] for name in unused.get(schedule, ()) if loss[name] != defaults[name]}
    require(
        not set_in_vain,
        f"config.loss sets {listed(set_in_vain)}, which the schedule {schedule!r} does not use: remove these, or "
        "choose another loss.observation_schedule",
    )
    require(
        not loss.observation_epsilon or loss.observation_normalizer in ("observation", "selected"),
        f"config.loss.observation_epsilon = {loss.observation_epsilon} has no effect with observation_normalizer = "
        f"{loss.observation_normalizer!r}, which divides by no length: set it to 0",
    )
    names = ("observation_target_of", "observation_target_gain")
    set_in_vain = {name: loss[name] for name in names if loss[name] != defaults[name]}
    require(
        bool(loss.observation_target_ratio) or not set_in_vain,
        f"config.loss sets {listed(set_in_vain)}, but no observation_target_ratio to hold: set it, or remove these",
    )


def _check_policy(loss: ml_collections.ConfigDict) -> None:
    require(
        loss.policy != "imitation",
        "config.loss.policy = 'imitation' is the loss of the warm start; choose another, such as 'grpo'",
    )
    bounds = {"dual_clip": loss.dual_clip} | dict(loss.policy_options)
    for name in ("clip_low", "clip_high", "dual_clip"):
        value = bounds.get(name, 0.0)
        require(
            is_number(value) and value >= 0 and (name != "dual_clip" or value == 0 or value > 1),
            f"config.loss: {name} = {value!r}: it must be "
            + ("above 1, or 0 to turn it off" if name == "dual_clip" else "a number, not negative"),
        )
    defaults = default_config().loss
    require(
        loss.importance_correction == defaults.importance_correction
        or (loss.old_logprobs == "recomputed" and loss.importance_cap > 0),
        f"config.loss.importance_correction = {loss.importance_correction!r} has no effect with old_logprobs = "
        f"{loss.old_logprobs!r} and importance_cap = {loss.importance_cap}: set them to 'recomputed' and above 0",
    )
    policy = find_policy_loss(loss.policy)
    clips = clips_set_by(loss)
    if unused := {name: value for name, value in clips.items() if name not in policy.hyperparameters}:
        takes = ", ".join(policy.hyperparameters) or "no hyperparameter"
        raise ConfigError(
            f"config.loss sets {listed(unused)}, but the policy loss {loss.policy!r} takes {takes}: remove these"
        )
    named.check_options(
        policy.surrogate, dict(policy.options) | dict(loss.policy_options), "loss.policy_options", given=1
    )
    if twice := [name for name in clips if name in loss.policy_options]:
        raise ConfigError(f"config.loss sets {', '.join(twice)} twice: as a field and in policy_options")
    if loss.advantage == "auto":
        require(
            not loss.advantage_options,
            f"config.loss.advantage_options = {dict(loss.advantage_options)} has no effect with advantage = "
            "'auto': set config.loss.advantage to the estimator that takes these options",
        )
        find_estimator(policy.advantage, {})
    else:
        find_estimator(loss.advantage, loss.advantage_options)
