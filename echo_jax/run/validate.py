"""Checks the values of a config before any work starts.

In: a config. Out: nothing, or a `ConfigError` that names field, value and choices. Errors that only show when the parts
are made (a task that does not fit its budgets, a size that the mesh does not divide) are found there.
"""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

from echo_jax.config import OF_AN_ENVIRONMENT, OPEN_SECTIONS, default_config, flat, setting
from echo_jax.kernels import attention
from echo_jax.learner.learner import clips_set_by
from echo_jax.models.rope import SCALINGS
from echo_jax.models.transformer import ATTENTION, LINEAR, REMAT
from echo_jax.objective.advantages import find_estimator
from echo_jax.objective.policy_losses import KL_ESTIMATORS, find_policy_loss
from echo_jax.objective.selection import find_filter
from echo_jax.objective.weights import MODES, OBSERVATION_NORMALIZERS, POLICY_NORMALIZERS, SCHEDULES
from echo_jax.render import FORMATS
from echo_jax.render.calls import GRAMMARS
from echo_jax.roles import ENVIRONMENT_CLASSES
from echo_jax.rollout.engine import find_engine
from echo_jax.run.ranges import check_float, check_integer
from echo_jax.run.refill import check_lengths, has_policy_term
from echo_jax.system import named
from echo_jax.system.errors import ConfigError
from echo_jax.tasks.stream import environments

RL_MODES = [mode for mode in MODES if mode != "sft"]  # imitation has its own phase, the warm start

# The fields with a fixed set of values.
CHOICES = {
    "rollout.grammar": GRAMMARS,
    "render.format": ("builtin", *FORMATS),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.remat": REMAT,
    "model.attention": attention.IMPLEMENTATIONS,
    "model.param_dtype": ("float32", "bfloat16"),
    "model.rope_scaling.kind": SCALINGS,
    "loss.mode": RL_MODES,
    "loss.policy_normalizer": ("auto", *POLICY_NORMALIZERS),
    "loss.old_logprobs": ("sampler", "recomputed"),
    "loss.kl_estimator": KL_ESTIMATORS,
    "loss.observation_schedule": SCHEDULES,
    "loss.observation_normalizer": OBSERVATION_NORMALIZERS,
}
# Fields that may be 0; all other integers are at least 1.
MAY_BE_ZERO = (
    "model.vocab_size",
    "model.num_experts",
    "model.experts_per_token",
    "lora.rank",
    "mesh.fsdp",
    "pack.rows",
    "seed",
    "num_steps",
    *(f"task.{name}.revision" for name, section in default_config().task.items() if "revision" in section),
    "task.rooms.map_seed",
    "rollout.tool_threads",
    "rollout.max_sandboxes",
    "rollout.save_every",
    "rollout.keep",
    "rollout.refill_tries",
    "warm_start.num_steps",
    "warm_start.demonstrations",
    "optimizer.warmup_steps",
    "loss.observation_schedule_steps",
    "loss.policy_constant",
    "loss.observation_constant",
    "loss.gradient_metrics_every",
    "eval.every",
)
NOT_NEGATIVE = (
    "checkpoint.minutes",
    "loss.observation_weight",
    "loss.clip_low",
    "loss.clip_high",
    "loss.importance_cap",
    "loss.kl_weight",
    "warm_start.observation_weight",
    "warm_start.learning_rate",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "model.rope_scaling.attention_factor",
)
POSITIVE = (
    "rollout.temperature",
    "rollout.max_seconds",
    "system.silence_seconds",
    "system.barrier_seconds",
    "sandbox.timeout_seconds",
    "sandbox.setup_seconds",
    "sandbox.score_seconds",
    "optimizer.clip_norm",
    "model.rope_theta",
    "model.rope_scaling.factor",
    "model.rope_scaling.low_frequency_factor",
    "model.rope_scaling.high_frequency_factor",
    "model.rope_scaling.beta_fast",
    "model.rope_scaling.beta_slow",
    "model.norm_eps",
    "lora.alpha",
)
SHARES = ("warm_start.success_rate", "loss.min_valid_calls")  # from 0 to 1
SHARES_ABOVE_ZERO = ("loss.observation_clip", "loss.top_entropy")
WEIGHTS = ("task.mixture.", "loss.class_weights.", "loss.tool_weights.")


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks all values of a config.

    Raises:
      ConfigError: a value cannot work in any run, or would have no effect in this one.
    """
    fields = flat(config)
    _check_open_sections(config, fields)
    _check_ranges(fields)
    _check_environments(config)
    _check_sizes(config)
    _check_model(config)
    _check_loss(config)
    _check_refill(config)
    find_engine(config.rollout.engine, config.rollout.engine_options)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_open_sections(config: ml_collections.ConfigDict, fields: Mapping[str, Any]) -> None:
    """Checks the names and kinds of entries that the default config does not declare."""
    known = default_config().task
    for name, section in config.task.items():
        is_section = isinstance(section, ml_collections.ConfigDict)
        _require(
            is_section and (name in known or name in config.task.mixture),
            f"config.task.{name} is {'no entry of config.task.mixture' if is_section else 'not a section'}: check the "
            f"name; the mixture has {', '.join(config.task.mixture)}",
        )
    for name, tool in config.tools.items():
        _require(
            isinstance(tool, str | ml_collections.ConfigDict),
            f'config.tools.{name} = {tool!r}: write "module:Class" or {{"tool": "module:Class", **keyword arguments}}',
        )
    for name, value in fields.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ConfigError(f"config.{name} = {value!r} cannot be recorded in config.json: {error}") from error


def _check_ranges(fields: Mapping[str, Any]) -> None:
    """Checks each field alone."""
    defaults = flat(default_config())
    for name, value in fields.items():
        if name.startswith(WEIGHTS):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            _require(
                is_number and 0 <= value <= sys.float_info.max,
                f"config.{name} = {value!r}: it must be finite and not negative",
            )
            check_float(name, float(value))
        elif not _is_ours(name, defaults):
            continue  # the function or class that declares it must check it
        elif isinstance(value, float):
            _require(math.isfinite(value), f"config.{name} = {value}: it must be finite")
            check_float(name, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            least = 0 if name in MAY_BE_ZERO else 1
            _require(value >= least, f"config.{name} = {value}: it must be at least {least}")
            check_integer(name, value)
    for name in NOT_NEGATIVE:
        _require(fields[name] is None or fields[name] >= 0, f"config.{name} = {fields[name]}: it must not be negative")
    for name, allowed in CHOICES.items():
        _require(fields[name] in allowed, f"config.{name} = {fields[name]!r}: choose one of {', '.join(allowed)}")
    for name in (*SHARES, *SHARES_ABOVE_ZERO):
        in_range = 0 <= fields[name] <= 1 and (fields[name] > 0 or name in SHARES)
        _require(
            in_range,
            f"config.{name} = {fields[name]}: it must be {'at least' if name in SHARES else 'above'} 0 and at most 1",
        )
    for name in POSITIVE:
        _require(fields[name] > 0, f"config.{name} = {fields[name]}: it must be above 0")
    for name in ("optimizer.b1", "optimizer.b2"):
        _require(0 <= fields[name] < 1, f"config.{name} = {fields[name]}: it must be at least 0 and below 1")


def _check_environments(config: ml_collections.ConfigDict) -> None:
    """Checks the fields that entries of the task mixture have values of their own for, each alone."""
    known = flat(default_config())
    for entry, own in config.environments.items():
        is_section = isinstance(own, ml_collections.ConfigDict)
        _require(
            is_section and (entry in config.task.mixture or entry in default_config().task),
            f"config.environments.{entry} is {'no entry of config.task.mixture' if is_section else 'not a section'}: "
            f"check the name; the mixture has {', '.join(config.task.mixture)}",
        )
        fields = flat(own)
        for name, value in fields.items():
            field = f"config.environments.{entry}.{name}"
            _require(
                name.startswith(tuple(f"{section}." for section in OF_AN_ENVIRONMENT)) or name in OF_AN_ENVIRONMENT,
                f"{field} = {value!r}: an environment has values of its own only for {', '.join(OF_AN_ENVIRONMENT)}",
            )
            default = known.get(name)
            if isinstance(default, float) and type(value) is int:
                fields[name] = float(value)
            elif default is not None:
                _require(
                    type(value) is type(default),
                    f"{field} = {value!r} has the type {type(value).__name__}; it must have {type(default).__name__}",
                )
        try:
            _check_ranges(flat(config) | fields)
        except ConfigError as error:
            raise ConfigError(f"config.environments.{entry}: {error}") from error
        _require(
            not config.rollout.replay or "rollout.group_size" not in fields,
            f"config.environments.{entry}.rollout.group_size = {fields.get('rollout.group_size')} has no effect with "
            "config.rollout.replay, whose file has its groups; remove it",
        )


def _check_refill(config: ml_collections.ConfigDict) -> None:
    """Checks that groups without variance can be replaced, if they are to be."""
    rollout, loss = config.rollout, config.loss
    said = f"config.rollout.refill_tries = {rollout.refill_tries}"
    if not rollout.refill_tries:
        return
    _require(not rollout.replay, f"{said} has no effect with config.rollout.replay, which samples nothing; set it to 0")
    steps = (0, *(step for step, _ in loss.mode_changes))
    acting = [e for e in environments(config.task.mixture) if any(has_policy_term(config, e, s) for s in steps)]
    _require(
        bool(acting),
        f"{said} has no effect: config.loss.mode = {loss.mode!r} has no policy term, for which alone groups need "
        "different rewards; set it to 0",
    )
    sizes = {entry: setting(config, entry, "rollout.group_size") for entry in environments(config.task.mixture)}
    if alone := [entry for entry in acting if sizes[entry] == 1]:
        raise ConfigError(
            f"{said}, but a group of {', '.join(alone)} has 1 rollout, so that it never has two different rewards: "
            "raise rollout.group_size, or set refill_tries to 0"
        )
    check_lengths(config, rollout.groups * max(sizes.values()))


def _is_ours(name: str, defaults: Mapping[str, Any]) -> bool:
    """Returns whether a field belongs to the default config, not to a user's function or family."""
    return name in defaults and not name.startswith(tuple(f"{section}." for section in OPEN_SECTIONS))


def _check_sizes(config: ml_collections.ConfigDict) -> None:
    """Checks fields that must fit together."""
    tokens, length = config.rollout.max_tokens, config.pack.length
    _require(tokens <= length, f"config.rollout.max_tokens = {tokens} does not fit config.pack.length = {length}")
    made, batch = config.warm_start.demonstrations, config.warm_start.batch
    _require(
        config.warm_start.num_steps == 0 or made >= batch,
        f"config.warm_start.demonstrations = {made} is fewer than one batch of config.warm_start.batch = {batch}",
    )
    model = config.model
    _require(
        model.head_dim % 2 == 0, f"config.model.head_dim = {model.head_dim}: rotary embedding needs an even number"
    )
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"config.model.num_heads = {model.num_heads} is not divisible by model.num_kv_heads = {model.num_kv_heads}",
    )
    steps = config.system.profile_steps
    _require(
        not steps or (len(steps) == 2 and all(isinstance(s, int) for s in steps) and 1 <= steps[0] <= steps[1]),
        f"config.system.profile_steps = {steps}: write (first, last) RL steps, from 1, or () for none",
    )


def _check_model(config: ml_collections.ConfigDict) -> None:
    """Checks the fields of the model and its adapters. An option without effect is an error: the run's name would be
    misleading."""
    defaults = default_config()
    targets = config.lora.targets
    known = ATTENTION if config.model.num_experts and config.lora.rank else LINEAR
    _require(
        bool(targets) and set(targets) <= set(known) and len(set(targets)) == len(targets),
        f"config.lora.targets = {targets}: choose some of {', '.join(known)}, each once",
    )
    unused = {name: config.lora[name] for name in ("alpha", "targets") if config.lora[name] != defaults.lora[name]}
    _require(
        bool(config.lora.rank) or not unused,
        f"config.lora sets {_listed(unused)}, but lora.rank = 0 means no adapters: set lora.rank, or remove these",
    )
    scaling = config.model.rope_scaling
    others = set(scaling) - {"kind", *SCALINGS[scaling.kind]}
    unused = {name: scaling[name] for name in others if scaling[name] != defaults.model.rope_scaling[name]}
    _require(
        not unused,
        f"config.model.rope_scaling sets {_listed(unused)}, which kind = {scaling.kind!r} does not use",
    )
    _require(
        scaling.kind == "none" or (scaling.factor > 1.0 and config.model.rope_theta > 1.0),
        f"config.model.rope_scaling.factor = {scaling.factor} and config.model.rope_theta = {config.model.rope_theta} "
        f"must both be above 1 with kind = {scaling.kind!r}",
    )
    for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
        _require(
            scaling[low] < scaling[high],
            f"config.model.rope_scaling.{low} = {scaling[low]} must be below {high} = {scaling[high]}",
        )
    experts, per_token = config.model.num_experts, config.model.experts_per_token
    if experts:
        _require(
            1 <= per_token <= experts,
            f"config.model.experts_per_token = {per_token}: it must be from 1 to num_experts = {experts}",
        )
    else:
        _require(
            not per_token and config.model.normalize_experts,
            f"config.model.experts_per_token = {per_token} and normalize_experts = {config.model.normalize_experts} "
            "have no effect with num_experts = 0: set num_experts, or leave them at 0 and True",
        )


def _check_loss(config: ml_collections.ConfigDict) -> None:
    """Checks the fields of the objective, and finds the functions that they name."""
    loss = config.loss
    for change in loss.mode_changes:
        pair = isinstance(change, tuple) and len(change) == 2
        _require(
            pair and isinstance(change[0], int) and 0 <= change[0] < config.num_steps and change[1] in RL_MODES,
            f"config.loss.mode_changes has {change!r}: each must be (RL step from 0 to {config.num_steps - 1}, mode), "
            f"the mode one of {', '.join(RL_MODES)}",
        )
    modes = {loss.mode, *(mode for _, mode in loss.mode_changes)}
    trains_observations = loss.observation_weight > 0 and any(loss.class_weights.values())
    _require(
        "env_only" not in modes or trains_observations,
        f"config.loss: env_only trains only observations, but observation_weight = {loss.observation_weight} with "
        "these class_weights trains none; set them above 0",
    )
    _require(
        "env_only" in modes or not (loss.min_valid_calls or loss.clean_parse),
        f"config.loss.min_valid_calls = {loss.min_valid_calls} and clean_parse = {loss.clean_parse} have no effect "
        "without the mode env_only, the only one that uses them",
    )
    _require(
        not loss.kl_weight or modes != {"env_only"},
        f"config.loss.kl_weight = {loss.kl_weight}: the KL is part of the policy term, which env_only lacks; set "
        "kl_weight to 0",
    )
    for name, weight in loss.class_weights.items():
        _require(
            name in ENVIRONMENT_CLASSES,
            f"config.loss.class_weights.{name} = {weight}: choose from {', '.join(ENVIRONMENT_CLASSES)}",
        )
    _require(
        bool(loss.observation_filter) or not loss.observation_filter_options,
        f"config.loss.observation_filter_options = {dict(loss.observation_filter_options)} has no effect without "
        "config.loss.observation_filter",
    )
    find_filter(loss.observation_filter, loss.observation_filter_options)
    _check_policy(loss)


def _check_policy(loss: ml_collections.ConfigDict) -> None:
    _require(
        loss.policy != "imitation",
        "config.loss.policy = 'imitation' is the loss of the warm start; choose another, such as 'grpo'",
    )
    bounds = {"dual_clip": loss.dual_clip} | dict(loss.policy_options)
    for name in ("clip_low", "clip_high", "dual_clip"):
        value = bounds.get(name, 0.0)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(
            is_number and value >= 0 and (name != "dual_clip" or value == 0 or value > 1),
            f"config.loss: {name} = {value!r}: it must be "
            + ("above 1, or 0 to turn it off" if name == "dual_clip" else "a number, not negative"),
        )
    policy = find_policy_loss(loss.policy)
    clips = clips_set_by(loss)
    if unused := {name: value for name, value in clips.items() if name not in policy.hyperparameters}:
        takes = ", ".join(policy.hyperparameters) or "no hyperparameter"
        raise ConfigError(
            f"config.loss sets {_listed(unused)}, but the policy loss {loss.policy!r} takes {takes}: remove these"
        )
    named.check_options(
        policy.surrogate, dict(policy.options) | dict(loss.policy_options), "loss.policy_options", given=1
    )
    if twice := [name for name in clips if name in loss.policy_options]:
        raise ConfigError(f"config.loss sets {', '.join(twice)} twice: as a field and in policy_options")
    if loss.advantage == "auto":
        _require(
            not loss.advantage_options,
            f"config.loss.advantage_options = {dict(loss.advantage_options)} has no effect with advantage = "
            "'auto': set config.loss.advantage to the estimator that takes these options",
        )
        find_estimator(policy.advantage, {})
    else:
        find_estimator(loss.advantage, loss.advantage_options)


def check_tools(config: ml_collections.ConfigDict, tools: Mapping[str, Any]) -> None:
    """Checks the fields that name tools, once the tools are made.

    Raises:
      ConfigError: a weight is for a tool that does not exist.
    """
    for name, weight in config.loss.tool_weights.items():
        _require(name in tools, f"config.loss.tool_weights.{name} = {weight}: choose from {', '.join(tools)}")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in sorted(values.items()))
