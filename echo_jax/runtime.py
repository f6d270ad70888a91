"""The parts of a run, built from its config: the one place below the programs that sees a whole config.

In: a validated config. Out: tokenizer, mesh, model, tasks, engine and collector, all checked before any work starts.
"""

import dataclasses
from pathlib import Path

import grain
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from echo_jax import config as config_lib
from echo_jax import packing
from echo_jax.advantages import ADVANTAGES, advantages_of, groups_of
from echo_jax.calls import GRAMMARS
from echo_jax.checkpoint import CheckpointError
from echo_jax.config import ConfigError
from echo_jax.engine.dense import DenseEngine
from echo_jax.environment import Machine, ScoreError
from echo_jax.episode import Rules, start
from echo_jax.loss import HeadOptions, LossOptions
from echo_jax.metrics import MetricsError
from echo_jax.models.transformer import ModelConfig, abstract_params
from echo_jax.objective import (
    MODES,
    OBSERVATION_NORMALIZERS,
    POLICY_NORMALIZERS,
    SCHEDULES,
    Objective,
    mode_at,
    scheduled_weight,
)
from echo_jax.optimizer import make_optimizer
from echo_jax.policy_loss import CLIPPED, KL_ESTIMATORS, POLICY_LOSSES, Clip
from echo_jax.render import Renderer
from echo_jax.roles import ENVIRONMENT_CLASSES
from echo_jax.rollout import Collector, RolloutError
from echo_jax.selection import Selection, SelectionError, load_filter
from echo_jax.sharding import make_mesh
from echo_jax.tasks.stream import make_families, task_stream
from echo_jax.tasks.task import Task
from echo_jax.tokenizer import Tokenizer, TokenizerError
from echo_jax.tools import TOOL_IDS, sandbox
from echo_jax.train_step import TrainState, abstract_state
from echo_jax.trajectory import Trajectory, TrajectoryError
from echo_jax.trajectory import load as load_trajectories

# What a user can mend: printed as one message instead of a traceback. An OSError names its path.
USER_ERRORS = (
    ConfigError,
    TokenizerError,
    sandbox.SandboxError,
    CheckpointError,
    MetricsError,
    TrajectoryError,
    RolloutError,
    ScoreError,
    SelectionError,
    OSError,
)


RL_MODES = [mode for mode in MODES if mode != "sft"]  # imitation has a phase of its own, the warm start
DUAL_CLIPPED = [name for name, loss in POLICY_LOSSES.items() if loss.surrogate in CLIPPED]
CHOICES = {
    "rollout.grammar": GRAMMARS,
    "model.compute_dtype": ("float32", "bfloat16"),
    "loss.mode": RL_MODES,
    "loss.policy": [name for name in POLICY_LOSSES if name != "imitation"],
    "loss.advantage": ("auto", *ADVANTAGES),
    "loss.policy_normalizer": ("auto", *POLICY_NORMALIZERS),
    "loss.old_logprobs": ("sampler", "recomputed"),
    "loss.kl_estimator": KL_ESTIMATORS,
    "loss.observation_schedule": SCHEDULES,
    "loss.observation_normalizer": OBSERVATION_NORMALIZERS,
}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What train and evaluate share."""

    config: ml_collections.ConfigDict
    renderer: Renderer
    mesh: Mesh
    model_config: ModelConfig
    graphdef: object
    abstract_params: dict
    train_tasks: grain.MapDataset
    heldout_tasks: grain.MapDataset
    imitated: list[Trajectory]  # of warm_start.trajectories; empty: scripted demonstrations
    replay: list[Trajectory]  # of rollout.replay; empty: the policy samples

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    @property
    def rollouts_per_step(self) -> int:
        return self.config.rollout.groups * self.config.rollout.group_size

    def make_engine(self) -> DenseEngine:
        rollout = self.config.rollout
        return DenseEngine(
            self.graphdef,
            self.model_config,
            lanes=self.rollouts_per_step,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            stop_id=self.renderer.stop_id,
            seed=self.config.seed,
        )

    def make_collector(self) -> Collector:
        rollout = self.config.rollout
        return Collector(self.renderer, episode_rules(self.config), sandboxes(self.config), rollout.tool_threads)

    def make_optimizer(self, learning_rate: float) -> optax.GradientTransformation:
        o = self.config.optimizer
        return make_optimizer(
            learning_rate=learning_rate,
            warmup_steps=o.warmup_steps,
            b1=o.b1,
            b2=o.b2,
            weight_decay=o.weight_decay,
            clip_norm=o.clip_norm,
        )

    def abstract_state(self) -> TrainState:
        """Returns the shapes and shardings of a train state; they are the same in every phase of a run."""
        return abstract_state(self.abstract_params, self.make_optimizer(0.0), self.mesh)

    def imitation_objective(self) -> Objective:
        """Returns the objective of the warm start: the same whatever RL ablates, so that all arms begin alike."""
        return Objective(
            mode="sft",
            observation_weight=self.config.warm_start.observation_weight,
            temperature=1.0,
            policy_normalizer=POLICY_LOSSES["imitation"].normalizer,
            every_action=True,
        )

    def objective(self, step: int) -> Objective:
        """Returns the objective of an RL step, from 0."""
        loss = self.config.loss
        policy = POLICY_LOSSES[loss.policy]
        steps = loss.observation_schedule_steps or self.config.num_steps
        return Objective(
            mode=mode_at(step, loss.mode, loss.mode_changes),
            observation_weight=scheduled_weight(loss.observation_weight, loss.observation_schedule, step, steps),
            temperature=self.config.rollout.temperature,
            selection=Selection(
                class_weights=dict(loss.class_weights),
                tool_weights=dict(loss.tool_weights),
                keep=load_filter(loss.observation_filter),
                top_entropy=loss.top_entropy,
                dedupe=loss.dedupe,
            ),
            observation_normalizer=loss.observation_normalizer,
            observation_constant=loss.observation_constant or self.config.rollout.max_tokens,
            reward_adaptive=loss.reward_adaptive,
            min_valid_calls=loss.min_valid_calls,
            clean_parse=loss.clean_parse,
            policy_normalizer=policy.normalizer if loss.policy_normalizer == "auto" else loss.policy_normalizer,
            policy_constant=loss.policy_constant or self.config.rollout.max_tokens,
            filter_zero_variance=policy.filter_zero_variance,
            mask_overlong=loss.mask_overlong,
            every_action=policy.every_action,
            kl_weight=loss.kl_weight,
        )

    def advantages(self, trajectories) -> np.ndarray:
        loss = self.config.loss
        estimator = POLICY_LOSSES[loss.policy].advantage if loss.advantage == "auto" else loss.advantage
        return advantages_of(trajectories, estimator)

    def head_options(self) -> HeadOptions:
        loss = self.config.loss
        mesh = self.mesh if self.mesh.size > 1 else None
        return HeadOptions(loss.token_block, loss.vocab_block, loss.score_all, mesh)

    def imitation_options(self) -> LossOptions:
        return LossOptions(policy="imitation", clip=Clip(0.0, 0.0), head=self.head_options())

    def loss_options(self) -> LossOptions:
        """Returns the options of the RL steps."""
        loss = self.config.loss
        own = POLICY_LOSSES[loss.policy].clip or Clip(0.0, 0.0)
        return LossOptions(
            policy=loss.policy,
            clip=Clip(
                own.low if loss.clip_low is None else loss.clip_low,
                own.high if loss.clip_high is None else loss.clip_high,
                loss.dual_clip,
            ),
            head=self.head_options(),
            importance_cap=loss.importance_cap if loss.old_logprobs == "recomputed" else 0.0,
            observation_clip=loss.observation_clip,
            kl_estimator=loss.kl_estimator,
        )

    def pack(self, trajectories, weights, *, at_most: int) -> packing.Packed:
        """Packs into the one shape that holds any `at_most` trajectories of this run."""
        rows, length = self.config.pack.rows, self.config.pack.length
        capacity = packing.capacity(at_most, self.config.rollout.max_tokens, rows=rows, length=length)
        return packing.pack(trajectories, weights, length=length, rows=rows, micro_batches=capacity)


def episode_rules(config: ml_collections.ConfigDict) -> Rules:
    rollout = config.rollout
    return Rules(
        max_turns=rollout.max_turns,
        max_tokens=rollout.max_tokens,
        max_turn_tokens=rollout.max_turn_tokens,
        warn_last_turn=rollout.warn_last_turn,
        max_seconds=rollout.max_seconds,
        max_format_errors=rollout.max_format_errors,
        grammar=rollout.grammar,
    )


def _check_budgets(config: ml_collections.ConfigDict, renderer: Renderer, tasks: list[Task]) -> None:
    """Raises `ConfigError` if a prompt or the first turn of a solution does not fit the budgets of an episode."""
    for task in tasks:
        try:
            episode = start(renderer, episode_rules(config), task.prompt, task.tools)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        turn = next(task.demonstrate(np.random.default_rng(0), solve=True))
        length = len(renderer.action(turn).ids)
        if length > episode.sample_budget:
            raise ConfigError(
                f"the turn {turn!r}, which solves task {task.name}, has {length} tokens: more than "
                f"config.rollout.max_turn_tokens = {config.rollout.max_turn_tokens} or than a prompt of "
                f"{len(episode.ids)} tokens leaves of config.rollout.max_tokens = {config.rollout.max_tokens}"
            )


def sandboxes(config: ml_collections.ConfigDict) -> Machine:
    """Returns how this config's sandboxes are made.

    Raises:
      ValueError: its limits cannot hold.
    """
    box = config.sandbox
    names = [field.name for field in dataclasses.fields(sandbox.Limits)]
    return Machine(
        limits=sandbox.Limits(**{name: box[name] for name in names}),
        backend=box.backend,
        setup_seconds=box.setup_seconds,
        score_seconds=box.score_seconds,
    )


def _saved(path: str, field: str, config: ml_collections.ConfigDict, vocab_size: int) -> list[Trajectory]:
    """Returns the scored rollouts of a file that a field of the config names; none for no file."""
    if not path:
        return []
    trajectories = [t for t in load_trajectories(Path(path), vocab_size=vocab_size) if t.scored]
    longest = max((len(t.ids) for t in trajectories), default=0)
    if not 0 < longest <= config.rollout.max_tokens:
        raise ConfigError(
            f"config.{field} = {path}: {len(trajectories)} scored rollouts, the longest of {longest} tokens; there "
            f"must be some, of at most config.rollout.max_tokens = {config.rollout.max_tokens}"
        )
    return trajectories


def _replay(config: ml_collections.ConfigDict, vocab_size: int) -> list[Trajectory]:
    trajectories = _saved(config.rollout.replay, "rollout.replay", config, vocab_size)
    largest = max(map(len, groups_of(trajectories).values()), default=0)
    if largest > config.rollout.group_size:
        raise ConfigError(
            f"config.rollout.replay = {config.rollout.replay} has a group of {largest} rollouts, more than "
            f"config.rollout.group_size = {config.rollout.group_size}"
        )
    if any(t.policy_version < 0 for t in trajectories):
        raise ConfigError(
            f"config.rollout.replay = {config.rollout.replay} has rollouts that no policy sampled: they have no "
            "log-probs to take a ratio to; imitate them with config.warm_start.trajectories"
        )
    return trajectories


def _imitated(config: ml_collections.ConfigDict, vocab_size: int) -> list[Trajectory]:
    warm = config.warm_start
    trajectories = _saved(warm.trajectories, "warm_start.trajectories", config, vocab_size)
    least = warm.min_reward
    chosen = [t for t in trajectories if t.reward >= least]
    if trajectories and len(chosen) < warm.batch:
        raise ConfigError(
            f"config.warm_start.trajectories = {warm.trajectories} has {len(chosen)} rollouts with a reward of "
            f"warm_start.min_reward = {least} or more: less than a batch of warm_start.batch = {warm.batch}"
        )
    return chosen


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
    # An option that would do nothing is an error: its run would not be what its name says.
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


def build(config: ml_collections.ConfigDict) -> Runtime:
    """Builds the parts. Everything that can be wrong with a config or a host is found here.

    Raises:
      ConfigError: a field's value cannot work.
      TokenizerError: the tokenizer's model cannot be used.
      SandboxUnavailable: no sandbox works on this host.
    """
    validate(config)
    tokenizer = Tokenizer(config.tokenizer.path)
    mixture = dict(config.task.mixture)
    parameters = {name: dict(config.task[name]) for name in mixture if name in config.task}
    model_config = ModelConfig(vocab_size=tokenizer.vocab_size, **config.model)
    try:
        sandboxes(config)
        families = make_families(mixture, parameters)
        if any(family.make("train", 0).world() is None for family in families.values()):
            sandbox.probe(config.sandbox.backend)
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if tokenizer.vocab_size % config.mesh.tensor:
        raise ConfigError(f"{tokenizer.vocab_size} pieces are not divisible by mesh.tensor = {config.mesh.tensor}")
    graphdef, params = abstract_params(model_config, mesh)
    renderer = Renderer(tokenizer)
    train_tasks = task_stream(mixture, families, split="train", seed=config.seed)
    _check_budgets(config, renderer, [train_tasks[i] for i in range(16)])
    return Runtime(
        config=config,
        renderer=renderer,
        mesh=mesh,
        model_config=model_config,
        graphdef=graphdef,
        abstract_params=params,
        train_tasks=train_tasks,
        heldout_tasks=task_stream(mixture, families, split="heldout", seed=config.seed),
        imitated=_imitated(config, tokenizer.vocab_size),
        replay=_replay(config, tokenizer.vocab_size),
    )
