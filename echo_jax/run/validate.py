"""The checks of a config: everything that can be wrong with its values, found before any work starts.

In: a config. Out: nothing, or a `ConfigError` that names field, value and choices.
"""

import ml_collections

from echo_jax import config as config_lib
from echo_jax.config import ConfigError
from echo_jax.kernels import attention
from echo_jax.models.rope import SCALINGS
from echo_jax.models.transformer import ATTENTION, LINEAR, REMAT
from echo_jax.objective.advantages import ADVANTAGES
from echo_jax.objective.policy_losses import CLIPPED, KL_ESTIMATORS, POLICY_LOSSES
from echo_jax.objective.selection import SelectionError, load_filter
from echo_jax.objective.weights import MODES, OBSERVATION_NORMALIZERS, POLICY_NORMALIZERS, SCHEDULES
from echo_jax.render import FORMATS
from echo_jax.render.calls import GRAMMARS
from echo_jax.roles import ENVIRONMENT_CLASSES
from echo_jax.tools import TOOL_IDS

RL_MODES = [mode for mode in MODES if mode != "sft"]  # imitation has a phase of its own, the warm start
DUAL_CLIPPED = [name for name, loss in POLICY_LOSSES.items() if loss.surrogate in CLIPPED]
CHOICES = {
    "rollout.grammar": GRAMMARS,
    "render.format": ("builtin", *FORMATS),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.remat": REMAT,
    "model.attention": attention.IMPLEMENTATIONS,
    "model.param_dtype": ("float32", "bfloat16"),
    "model.rope_scaling.kind": SCALINGS,
    "loss.mode": RL_MODES,
    "loss.policy": [name for name in POLICY_LOSSES if name != "imitation"],
    "loss.advantage": ("auto", *ADVANTAGES),
    "loss.policy_normalizer": ("auto", *POLICY_NORMALIZERS),
    "loss.old_logprobs": ("sampler", "recomputed"),
    "loss.kl_estimator": KL_ESTIMATORS,
    "loss.observation_schedule": SCHEDULES,
    "loss.observation_normalizer": OBSERVATION_NORMALIZERS,
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises `ConfigError`, naming field, value and choices, for what no run could use."""
    config_lib.validate(config, CHOICES)
    loss = config.loss

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    for change in loss.mode_changes:
        pair = isinstance(change, tuple) and len(change) == 2
        require(
            pair and isinstance(change[0], int) and 0 <= change[0] < config.num_steps and change[1] in RL_MODES,
            f"config.loss.mode_changes has {change!r}: each must be (RL step from 0 to {config.num_steps - 1}, mode), "
            f"the mode one of {', '.join(RL_MODES)}",
        )
    targets = config.lora.targets
    known = ATTENTION if config.model.num_experts and config.lora.rank else LINEAR
    require(
        bool(targets) and set(targets) <= set(known) and len(set(targets)) == len(targets),
        f"config.lora.targets = {targets}: some of {', '.join(known)}, each once",
    )
    steps = config.system.profile_steps
    require(
        not steps or (len(steps) == 2 and all(isinstance(s, int) for s in steps) and 1 <= steps[0] <= steps[1]),
        f"config.system.profile_steps = {steps}: it must be (first, last) RL steps from 1, or ()",
    )
    # An option that would do nothing is an error: its run would not be what its name says.
    scaling, defaults = config.model.rope_scaling, config_lib.default_config()
    unused = set(scaling) - {"kind", *SCALINGS[scaling.kind]}
    idle = {name: scaling[name] for name in unused if scaling[name] != defaults.model.rope_scaling[name]}
    require(not idle, f"config.model.rope_scaling.kind = {scaling.kind!r} has no {idle}")
    require(
        scaling.kind == "none" or (scaling.factor > 1.0 and config.model.rope_theta > 1.0),
        f"config.model.rope_scaling.factor = {scaling.factor} and config.model.rope_theta = {config.model.rope_theta} "
        f"must both be above 1 with the kind {scaling.kind!r}",
    )
    for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
        require(
            scaling[low] < scaling[high],
            f"config.model.rope_scaling.{low} = {scaling[low]} must be below {high} = {scaling[high]}",
        )
    experts, per_token = config.model.num_experts, config.model.experts_per_token
    require(
        1 <= per_token <= experts if experts else not per_token and config.model.normalize_experts,
        f"config.model.experts_per_token = {per_token}, normalize_experts = {config.model.normalize_experts} with "
        f"num_experts = {experts}: from 1 to num_experts, or 0 and True without experts",
    )
    idle = {name: config.lora[name] for name in ("alpha", "targets") if config.lora[name] != defaults.lora[name]}
    require(bool(config.lora.rank) or not idle, f"config.lora.rank = 0: there are no adapters that {idle} could be of")
    modes = {loss.mode, *(mode for _, mode in loss.mode_changes)}
    trains_observations = loss.observation_weight > 0 and any(loss.class_weights.values())
    require(
        "env_only" not in modes or trains_observations,
        f"config.loss: env_only trains observations alone, and observation_weight = {loss.observation_weight} with "
        "these class_weights trains none",
    )
    require(
        "env_only" in modes or not (loss.min_valid_calls or loss.clean_parse),
        f"config.loss.min_valid_calls = {loss.min_valid_calls}, clean_parse = {loss.clean_parse}: only env_only uses "
        "them",
    )
    clip = POLICY_LOSSES[loss.policy].clip
    bounds = {name: loss[name] for name in ("clip_low", "clip_high") if loss[name] is not None}
    require(clip is not None or not bounds, f"config.loss.policy = {loss.policy!r} has no clip for {bounds}")
    require(
        not loss.dual_clip or loss.policy in DUAL_CLIPPED,
        f"config.loss.dual_clip = {loss.dual_clip}: only {', '.join(DUAL_CLIPPED)} use it",
    )
    require(
        not loss.kl_weight or modes != {"env_only"},
        f"config.loss.kl_weight = {loss.kl_weight}: env_only has no policy term that it is a part of",
    )
    for field, known in (("class_weights", ENVIRONMENT_CLASSES), ("tool_weights", TOOL_IDS)):
        for name, weight in loss[field].items():
            require(name in known, f"config.loss.{field}.{name} = {weight}: choose from {', '.join(known)}")
    try:
        load_filter(loss.observation_filter)
    except SelectionError as error:
        raise ConfigError(f"config.loss.observation_filter: {error}") from error
