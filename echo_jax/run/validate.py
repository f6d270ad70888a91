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

from echo_jax.config import OF_AN_ENVIRONMENT, OPEN_SECTIONS, default_config, environments, flat, of_environment
from echo_jax.kernels import attention
from echo_jax.learner import optimizer as optimizers
from echo_jax.models.rope import SCALINGS
from echo_jax.models.transformer import ATTENTION, LINEAR, REMAT
from echo_jax.objective.control import MEASURES
from echo_jax.objective.loss import IMPORTANCE_CORRECTIONS
from echo_jax.objective.policy_losses import KL_ESTIMATORS
from echo_jax.objective.weights import OBSERVATION_NORMALIZERS, POLICY_NORMALIZERS, SCHEDULES
from echo_jax.render import FORMATS
from echo_jax.render.calls import GRAMMARS
from echo_jax.rollout.engine import find_engine
from echo_jax.run.ranges import MOST_STEPS, check_float, check_integer, is_number, listed, require
from echo_jax.run.refill import check_lengths, has_policy_term
from echo_jax.run.validate_objective import RL_MODES, check_loss, check_together
from echo_jax.system.errors import ConfigError

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
    "loss.importance_correction": IMPORTANCE_CORRECTIONS,
    "loss.kl_estimator": KL_ESTIMATORS,
    "loss.observation_schedule": (*SCHEDULES, "piecewise"),
    "loss.observation_target_of": MEASURES,
    "loss.observation_temperature": ("1", "sampling"),
    "loss.observation_normalizer": OBSERVATION_NORMALIZERS,
    "optimizer.name": optimizers.OPTIMIZERS,
    "optimizer.schedule": optimizers.SCHEDULES,
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
    "optimizer.schedule_steps",
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
    "loss.kl_clamp",
    "loss.entropy_weight",
    "loss.length_penalty.output",
    "loss.length_penalty.input",
    "loss.length_penalty.turns",
    "loss.observation_schedule_end",
    "loss.observation_target_ratio",
    "loss.observation_epsilon",
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
SHARES_ABOVE_ZERO = ("loss.observation_clip", "loss.top_entropy", "loss.observation_target_gain")
WEIGHTS = ("task.mixture.", "loss.class_weights.", "loss.tool_weights.")


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks all values of a config.

    Raises:
      ConfigError: a value cannot work in any run, or would have no effect in this one.
    """
    fields = flat(config)
    _check_open_sections(config, fields)
    _check_ranges(fields)
    _check_sizes(config)
    _check_model(config)
    check_loss(config)
    _check_optimizer(config)
    _check_environments(config)
    _check_mini_batches(config)
    _check_refill(config)
    find_engine(config.rollout.engine, config.rollout.engine_options)


def _check_open_sections(config: ml_collections.ConfigDict, fields: Mapping[str, Any]) -> None:
    """Checks the names and kinds of entries that the default config does not declare."""
    known = default_config().task
    for name, section in config.task.items():
        is_section = isinstance(section, ml_collections.ConfigDict)
        require(
            is_section and (name in known or name in config.task.mixture),
            f"config.task.{name} is {'no entry of config.task.mixture' if is_section else 'not a section'}: check the "
            f"name; the mixture has {', '.join(config.task.mixture)}",
        )
    for name, tool in config.tools.items():
        require(
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
            require(
                is_number and 0 <= value <= sys.float_info.max,
                f"config.{name} = {value!r}: it must be finite and not negative",
            )
            check_float(name, float(value))
        elif not _is_ours(name, defaults):
            continue  # the function or class that declares it must check it
        elif isinstance(value, float):
            require(math.isfinite(value), f"config.{name} = {value}: it must be finite")
            check_float(name, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            least = 0 if name in MAY_BE_ZERO else 1
            require(value >= least, f"config.{name} = {value}: it must be at least {least}")
            check_integer(name, value)
    for name in NOT_NEGATIVE:
        require(fields[name] is None or fields[name] >= 0, f"config.{name} = {fields[name]}: it must not be negative")
    for name, allowed in CHOICES.items():
        require(fields[name] in allowed, f"config.{name} = {fields[name]!r}: choose one of {', '.join(allowed)}")
    for name in (*SHARES, *SHARES_ABOVE_ZERO):
        in_range = 0 <= fields[name] <= 1 and (fields[name] > 0 or name in SHARES)
        require(
            in_range,
            f"config.{name} = {fields[name]}: it must be {'at least' if name in SHARES else 'above'} 0 and at most 1",
        )
    for name in POSITIVE:
        require(fields[name] > 0, f"config.{name} = {fields[name]}: it must be above 0")
    for name in ("optimizer.b1", "optimizer.b2", "optimizer.momentum", "optimizer.end_share"):
        require(0 <= fields[name] < 1, f"config.{name} = {fields[name]}: it must be at least 0 and below 1")


def _check_environments(config: ml_collections.ConfigDict) -> None:
    """Checks what entries of the task mixture have values of their own for: each field alone, then as the run's."""
    known = flat(default_config())
    for entry, own in config.environments.items():
        is_section = isinstance(own, ml_collections.ConfigDict)
        require(
            is_section and config.task.mixture.get(entry, 0) > 0,
            f"config.environments.{entry} is {'no entry of config.task.mixture' if is_section else 'not a section'}: "
            f"check the name; the mixture has {', '.join(environments(config.task.mixture))}",
        )
        for name, value in flat(own).items():
            field = f"config.environments.{entry}.{name}"
            is_allowed = any(name == allowed or name.startswith(f"{allowed}.") for allowed in OF_AN_ENVIRONMENT)
            is_known = name in known or name.startswith(tuple(f"{section}." for section in OPEN_SECTIONS))
            require(
                is_allowed and is_known,
                f"{field} = {value!r}: an environment has values of its own only for {', '.join(OF_AN_ENVIRONMENT)}",
            )
            default = known.get(name, value)
            if default is None:  # the value of a placeholder, all of which are in `loss`
                kind = default_config().loss.get_type(name.removeprefix("loss."))
                is_of_kind = value is None or _is_of_kind(value, kind())
                require(is_of_kind, f"{field} = {value!r}: it must be a {kind.__name__}, or None")
                continue
            require(_is_of_kind(value, default), f"{field} = {value!r}: it must be like the default, {default!r}")
        size = flat(own).get("rollout.group_size")
        require(
            not config.rollout.replay or size is None,
            f"config.environments.{entry}.rollout.group_size = {size} has no effect with config.rollout.replay, whose "
            "file has its groups; remove it",
        )
        merged = of_environment(config, entry)
        try:
            _check_ranges(flat(merged))
            check_loss(merged, own=flat(own))
        except ConfigError as error:
            raise ConfigError(f"config.environments.{entry}: {error}") from error
    check_together({entry: of_environment(config, entry) for entry in environments(config.task.mixture)}, config)


def _check_mini_batches(config: ml_collections.ConfigDict) -> None:
    """Checks that every mini-batch of a step has a rollout, whichever environments its tasks come from."""
    sizes = [of_environment(config, entry).rollout.group_size for entry in environments(config.task.mixture)]
    fewest = config.rollout.groups * min(sizes, default=config.rollout.group_size)
    parts = config.optimizer.mini_batches
    require(
        parts <= fewest,
        f"config.optimizer.mini_batches = {parts} is more than the {fewest} rollouts of a step: use fewer",
    )


def _check_refill(config: ml_collections.ConfigDict) -> None:
    """Checks that groups without variance can be replaced, if they are to be."""
    rollout, loss = config.rollout, config.loss
    said = f"config.rollout.refill_tries = {rollout.refill_tries}"
    if not rollout.refill_tries:
        return
    require(not rollout.replay, f"{said} has no effect with config.rollout.replay, which samples nothing; set it to 0")
    steps = (0, *(step for step, _ in loss.mode_changes))
    acting = [e for e in environments(config.task.mixture) if any(has_policy_term(config, e, s) for s in steps)]
    require(
        bool(acting),
        f"{said} has no effect: config.loss.mode = {loss.mode!r} has no policy term, for which alone groups need "
        "different rewards; set it to 0",
    )
    sizes = {entry: of_environment(config, entry).rollout.group_size for entry in environments(config.task.mixture)}
    if alone := [entry for entry in acting if sizes[entry] == 1]:
        raise ConfigError(
            f"{said}, but a group of {', '.join(alone)} has 1 rollout, so that it never has two different rewards: "
            "raise rollout.group_size, or set refill_tries to 0"
        )
    check_lengths(config, rollout.groups * max(sizes.values()))


def _is_of_kind(value: Any, default: Any) -> bool:
    """Returns whether a value can take the place of a field's default."""
    if isinstance(default, float):
        return is_number(value)
    return type(value) is type(default)


def _is_ours(name: str, defaults: Mapping[str, Any]) -> bool:
    """Returns whether a field belongs to the default config, not to a user's function or family."""
    return name in defaults and not name.startswith(tuple(f"{section}." for section in OPEN_SECTIONS))


def _check_sizes(config: ml_collections.ConfigDict) -> None:
    """Checks fields that must fit together."""
    tokens, length = config.rollout.max_tokens, config.pack.length
    require(tokens <= length, f"config.rollout.max_tokens = {tokens} does not fit config.pack.length = {length}")
    made, batch = config.warm_start.demonstrations, config.warm_start.batch
    require(
        config.warm_start.num_steps == 0 or made >= batch,
        f"config.warm_start.demonstrations = {made} is fewer than one batch of config.warm_start.batch = {batch}",
    )
    model = config.model
    require(model.head_dim % 2 == 0, f"config.model.head_dim = {model.head_dim}: rotary embedding needs an even number")
    require(
        model.num_heads % model.num_kv_heads == 0,
        f"config.model.num_heads = {model.num_heads} is not divisible by model.num_kv_heads = {model.num_kv_heads}",
    )
    steps = config.system.profile_steps
    require(
        not steps or (len(steps) == 2 and all(isinstance(s, int) for s in steps) and 1 <= steps[0] <= steps[1]),
        f"config.system.profile_steps = {steps}: write (first, last) RL steps, from 1, or () for none",
    )


def _check_model(config: ml_collections.ConfigDict) -> None:
    """Checks the fields of the model and its adapters. An option without effect is an error: the run's name would be
    misleading."""
    defaults = default_config()
    targets = config.lora.targets
    known = ATTENTION if config.model.num_experts and config.lora.rank else LINEAR
    require(
        bool(targets) and all(name in [*known] for name in targets) and len(set(targets)) == len(targets),
        f"config.lora.targets = {targets}: choose some of {', '.join(known)}, each once",
    )
    unused = {name: config.lora[name] for name in ("alpha", "targets") if config.lora[name] != defaults.lora[name]}
    require(
        bool(config.lora.rank) or not unused,
        f"config.lora sets {listed(unused)}, but lora.rank = 0 means no adapters: set lora.rank, or remove these",
    )
    scaling = config.model.rope_scaling
    others = set(scaling) - {"kind", *SCALINGS[scaling.kind]}
    unused = {name: scaling[name] for name in others if scaling[name] != defaults.model.rope_scaling[name]}
    require(
        not unused,
        f"config.model.rope_scaling sets {listed(unused)}, which kind = {scaling.kind!r} does not use",
    )
    require(
        scaling.kind == "none" or (scaling.factor > 1.0 and config.model.rope_theta > 1.0),
        f"config.model.rope_scaling.factor = {scaling.factor} and config.model.rope_theta = {config.model.rope_theta} "
        f"must both be above 1 with kind = {scaling.kind!r}",
    )
    for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
        require(
            scaling[low] < scaling[high],
            f"config.model.rope_scaling.{low} = {scaling[low]} must be below {high} = {scaling[high]}",
        )
    experts, per_token = config.model.num_experts, config.model.experts_per_token
    if experts:
        require(
            1 <= per_token <= experts,
            f"config.model.experts_per_token = {per_token}: it must be from 1 to num_experts = {experts}",
        )
    else:
        require(
            not per_token and config.model.normalize_experts,
            f"config.model.experts_per_token = {per_token} and normalize_experts = {config.model.normalize_experts} "
            "have no effect with num_experts = 0: set num_experts, or leave them at 0 and True",
        )


def _check_optimizer(config: ml_collections.ConfigDict) -> None:
    """Checks the optimizer's name and schedule against the fields that only some of them use."""
    own, defaults = config.optimizer, default_config().optimizer
    uses = optimizers.USES[own.name]
    only_adapters = own.name == "muon" and config.lora.rank > 0
    sometimes = {name for names in optimizers.USES.values() for name in names}
    others = sometimes if only_adapters else sometimes - set(uses)
    unused = {name: own[name] for name in others if own[name] != defaults[name]}
    require(
        not unused,
        f"config.optimizer sets {listed(unused)}, which name = {own.name!r} does not use"
        + (" for adapters, all of which are matrices" if only_adapters else "")
        + ": remove these, or choose another optimizer",
    )
    unused = {name: own[name] for name in ("schedule_steps", "end_share") if own[name] != defaults[name]}
    require(
        own.schedule != "constant" or not unused,
        f"config.optimizer sets {listed(unused)}, but schedule = 'constant' never changes the rate: set schedule to "
        "linear or cosine, or remove these",
    )
    steps = own.schedule_steps or config.num_steps * own.updates_per_batch * own.mini_batches
    require(
        own.schedule == "constant" or steps > own.warmup_steps,
        f"config.optimizer.schedule = {own.schedule!r} ends after {steps} updates, but the warm-up takes the first "
        f"{own.warmup_steps}: lower optimizer.warmup_steps, or raise "
        + ("optimizer.schedule_steps" if own.schedule_steps else "num_steps"),
    )
    require(
        own.schedule == "constant" or steps <= MOST_STEPS,
        f"config.optimizer.schedule = {own.schedule!r} ends after {steps} updates, more than {MOST_STEPS}: set "
        "optimizer.schedule_steps, or schedule to 'constant'",
    )


def check_tools(config: ml_collections.ConfigDict, tools: Mapping[str, Any]) -> None:
    """Checks the fields that name tools, once the tools are made.

    Raises:
      ConfigError: a weight is for a tool that does not exist.
    """
    for name, weight in flat(config).items():
        section, _, tool = name.rpartition(".")
        require(
            not section.endswith("loss.tool_weights") or tool in tools,
            f"config.{name} = {weight}: choose from {', '.join(tools)}",
        )
