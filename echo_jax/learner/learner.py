"""The training half of a run: mesh, shapes of model and state, objective, optimizer, packing.

In: a config, the size of the vocabulary, and devices, which may be TPUs that are not attached. Out: a `Learner`, which
uses no device memory.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from echo_jax.config import ConfigError, environments, of_environment
from echo_jax.learner.optimizer import make_optimizer, make_schedule
from echo_jax.learner.step import TrainState, abstract_state, init_state
from echo_jax.models import lora
from echo_jax.models.rope import RopeScaling
from echo_jax.models.transformer import ModelConfig, abstract_params
from echo_jax.objective import packing
from echo_jax.objective.advantages import LengthPenalty, Pool, advantages_of, alone, find_estimator
from echo_jax.objective.control import Control
from echo_jax.objective.loss import HeadOptions, LossOptions, PolicyOptions
from echo_jax.objective.policy_losses import POLICY_LOSSES, find_policy_loss
from echo_jax.objective.selection import Selection, find_filter
from echo_jax.objective.weights import Objective, TokenWeights, by_environment, mode_at, scheduled_weight, weigh_each
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.system.sharding import bytes_a_device, make_mesh, processes_of

GROUPED_GRADIENT = (0, 12)  # jax version since which the TPU compiler groups the gradient of experts by expert


@dataclasses.dataclass(frozen=True)
class Learner:
    """The half of a run that runs on the accelerators."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    model_config: ModelConfig
    graphdef: object
    abstract_params: dict
    tools: tuple[str, ...] = ()  # names of the run's tools; each gets observation metrics
    control_ids: tuple[int, ...] = ()  # see `Renderer.control_ids`

    @property
    def abstract_trained(self) -> dict:
        """Shapes of the trained parameters: all, or the adapters."""
        return lora.split(self.abstract_params)[0]

    @property
    def reference_bytes(self) -> int:
        """Memory on a device of the policy that the KL refers to; 0 without a KL."""
        return bytes_a_device(self.abstract_trained) if self.has_kl else 0

    @functools.cached_property
    def configs(self) -> dict[str, ml_collections.ConfigDict]:
        """The config of each entry of the task mixture that has settings of its own; that of all others under ""."""
        entries = [entry for entry in environments(self.config.task.mixture) if entry in self.config.environments]
        own = {entry: of_environment(self.config, entry) for entry in entries}
        return {"": self.config} | own

    @property
    def has_kl(self) -> bool:
        return any(config.loss.kl_weight for config in self.configs.values())

    @property
    def control(self) -> Control | None:
        """The controller of lambda; None if lambda follows its schedule alone."""
        loss = self.config.loss
        if not loss.observation_target_ratio:
            return None
        return Control(loss.observation_target_ratio, loss.observation_target_of, loss.observation_target_gain)

    @functools.cached_property
    def policies(self) -> tuple[tuple[str, PolicyOptions], ...]:
        """(name, hyperparameters) of each policy loss in use, the run's first."""
        return tuple(dict.fromkeys(policy_of(config.loss) for config in self.configs.values()))

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    def group_size(self, environment: str) -> int:
        """Returns how many rollouts a group of this entry of the task mixture has."""
        return self.configs.get(environment, self.config).rollout.group_size

    @property
    def largest_group(self) -> int:
        sizes = map(self.group_size, environments(self.config.task.mixture))
        return max(sizes, default=self.config.rollout.group_size)

    @property
    def rollouts_per_step(self) -> int:
        """Places for rollouts in a step, the same in each; those that a smaller group leaves stay empty."""
        return self.config.rollout.groups * self.largest_group

    @property
    def rollouts_at_once(self) -> int:
        """The largest number of rollouts that one process makes for a step."""
        return self.share(self.rollouts_per_step)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, over all devices."""
        return self.config.pack.rows or self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def processes(self) -> int:
        """Number of processes that the mesh spans. Each samples, packs and contributes its share of an update."""
        return processes_of(self.mesh)

    @property
    def own_rows(self) -> int:
        """Rows of a micro-batch that one process contributes."""
        return self.rows // self.processes

    def share(self, count: int) -> int:
        """Returns the largest share of `count` items dealt out to the processes in turn."""
        return -(-count // self.processes)

    def share_of_part(self, at_most: int, parts: int) -> int:
        """Returns how many of the `at_most` rollouts of a process one of `parts` mini-batches can hold: all of them, if
        other processes have enough for the other parts."""
        return min(at_most, -(-at_most * self.processes // parts))

    def capacity(self, at_most: int) -> int:
        """Returns the number of micro-batches that hold any `at_most` trajectories of one process."""
        tokens, length = self.config.rollout.max_tokens, self.config.pack.length
        return packing.capacity(at_most, tokens, rows=self.own_rows, length=length)

    def warm_start_schedule(self) -> optax.Schedule:
        """Returns the learning rate of each update of the warm start, counted from 0."""
        return make_schedule(self.config.warm_start.learning_rate, warmup_steps=self.config.optimizer.warmup_steps)

    def schedule(self) -> optax.Schedule:
        """Returns the learning rate of each update of RL, counted from 0."""
        o = self.config.optimizer
        steps = o.schedule_steps or self.config.num_steps * o.updates_per_batch * o.mini_batches
        return make_schedule(
            o.learning_rate, warmup_steps=o.warmup_steps, kind=o.schedule, steps=steps, end_share=o.end_share
        )

    def make_optimizer(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        o = self.config.optimizer
        return make_optimizer(
            schedule,
            name=o.name,
            b1=o.b1,
            b2=o.b2,
            momentum=o.momentum,
            weight_decay=o.weight_decay,
            clip_norm=o.clip_norm,
        )

    def init_state(self, params: dict, step: int = 0) -> TrainState:
        """Returns a state of these trained parameters with a fresh optimizer."""
        return init_state(params, self.make_optimizer(self.schedule()), self.mesh, step)

    def abstract_state(self) -> TrainState:
        """Returns the shapes and shardings of a train state; they are the same in every phase of a run."""
        return abstract_state(self.abstract_trained, self.make_optimizer(self.schedule()), self.mesh)

    def imitation_objective(self) -> Objective:
        """Returns the objective of the warm start: independent of the RL settings, so that all arms of an ablation
        start alike."""
        return Objective(
            mode="sft",
            observation_weight=self.config.warm_start.observation_weight,
            temperature=1.0,
            policy_normalizer=POLICY_LOSSES["imitation"].normalizer,
            every_action=True,
        )

    def objective(self, step: int, environment: str = "") -> Objective:
        """Returns the objective of an RL step, from 0, for the rollouts of an entry of the task mixture."""
        config = self.configs.get(environment, self.config)
        loss = config.loss
        policy = find_policy_loss(loss.policy)
        steps = loss.observation_schedule_steps or config.num_steps
        schedule = (loss.observation_schedule, step, steps, loss.observation_schedule_end)
        return Objective(
            mode=mode_at(step, loss.mode, loss.mode_changes),
            observation_weight=scheduled_weight(
                loss.observation_weight, *schedule, points=loss.observation_schedule_points
            ),
            temperature=config.rollout.temperature,
            selection=Selection(
                class_weights=dict(loss.class_weights),
                tool_weights=dict(loss.tool_weights),
                keep=find_filter(loss.observation_filter, loss.observation_filter_options),
                top_entropy=loss.top_entropy,
                dedupe=loss.dedupe,
            ),
            observation_normalizer=loss.observation_normalizer,
            observation_constant=loss.observation_constant or config.rollout.max_tokens,
            observation_epsilon=loss.observation_epsilon,
            observation_temperature=config.rollout.temperature if loss.observation_temperature == "sampling" else 1.0,
            reward_adaptive=loss.reward_adaptive,
            min_valid_calls=loss.min_valid_calls,
            clean_parse=loss.clean_parse,
            policy_normalizer=policy_normalizer_of(loss),
            policy_constant=loss.policy_constant or config.rollout.max_tokens,
            filter_zero_variance=filters_zero_variance(loss),
            mask_overlong=loss.mask_overlong,
            every_action=policy.every_action,
            kl_weight=loss.kl_weight,
            entropy_weight=loss.entropy_weight,
            policy=self.policies.index(policy_of(loss)),
        )

    def advantages(self, trajectories: Sequence[Trajectory], pool: Pool = alone) -> np.ndarray:
        """Returns f32 [R]; the groups of each environment that has settings of its own are an update of their own to
        its estimator."""
        advantages = np.zeros(len(trajectories), np.float32)
        for environment, members in by_environment(trajectories, self.configs).items():
            loss, rollout = self.configs[environment].loss, self.config.rollout
            name = find_policy_loss(loss.policy).advantage if loss.advantage == "auto" else loss.advantage
            estimator = find_estimator(name, loss.advantage_options)
            penalty = None
            if any(loss.length_penalty.values()):
                penalty = LengthPenalty(
                    **loss.length_penalty, max_tokens=rollout.max_tokens, max_turns=rollout.max_turns
                )
            advantages[members] = advantages_of([trajectories[i] for i in members], estimator, pool, penalty)
        return advantages

    def weigh(self, trajectories: Sequence[Trajectory], step: int, pool: Pool = alone) -> list[TokenWeights]:
        """Returns the weights of an RL step, from 0, for this process's share of its rollouts."""
        objectives = {environment: self.objective(step, environment) for environment in self.configs}
        return weigh_each(trajectories, self.advantages(trajectories, pool), objectives, pool)

    def head_options(self) -> HeadOptions:
        loss = self.config.loss
        mesh = self.mesh if self.mesh.size > 1 else None
        return HeadOptions(loss.token_block, loss.vocab_block, loss.score_all, mesh)

    def imitation_options(self) -> LossOptions:
        return LossOptions(policy="imitation", head=self.head_options(), tools=self.tools)

    def loss_options(self) -> LossOptions:
        """Returns the options of the RL steps."""
        loss = self.config.loss
        (policy, policy_options), *others = self.policies
        return LossOptions(
            policy=policy,
            head=self.head_options(),
            policy_options=policy_options,
            other_policies=tuple(others),
            tools=self.tools,
            importance_cap=loss.importance_cap if loss.old_logprobs == "recomputed" else 0.0,
            importance_correction=loss.importance_correction,
            observation_clip=loss.observation_clip,
            kl_estimator=loss.kl_estimator,
            control_ids=self.control_ids,
            kl_clamp=loss.kl_clamp,
            entropy_bonus=any(config.loss.entropy_weight for config in self.configs.values()),
        )

    def pack(self, trajectories, weights, *, at_most: int) -> packing.Packed:
        """Packs one process's trajectories into the fixed shape that holds any `at_most` of them."""
        length, capacity = self.config.pack.length, self.capacity(at_most)
        return packing.pack(
            trajectories,
            weights,
            length=length,
            rows=self.own_rows,
            micro_batches=capacity,
            tools=self.tools,
            first_row=jax.process_index() * self.own_rows if self.processes > 1 else 0,
        )


def policy_of(loss: ml_collections.ConfigDict) -> tuple[str, PolicyOptions]:
    """Returns the name and the hyperparameters of the policy loss that a section `loss` chooses."""
    return loss.policy, tuple(sorted((clips_set_by(loss) | dict(loss.policy_options)).items()))


def policy_normalizer_of(loss: ml_collections.ConfigDict) -> str:
    policy = find_policy_loss(loss.policy)
    return policy.normalizer if loss.policy_normalizer == "auto" else loss.policy_normalizer


def filters_zero_variance(loss: ml_collections.ConfigDict) -> bool:
    policy = find_policy_loss(loss.policy)
    return policy.filter_zero_variance if loss.filter_zero_variance is None else loss.filter_zero_variance


def clips_set_by(loss: ml_collections.ConfigDict) -> dict[str, float]:
    """Returns the hyperparameters of the policy loss that have fields of their own, where they are set."""
    clips = {name: loss[name] for name in ("clip_low", "clip_high") if loss[name] is not None}
    return clips | ({"dual_clip": loss.dual_clip} if loss.dual_clip else {})


def describe_model(config: ml_collections.ConfigDict, vocab_size: int) -> ModelConfig:
    """Returns the part of a config that describes the model."""
    fields = {name: value for name, value in config.model.items() if name != "weights"}
    fields |= {"vocab_size": vocab_size, "rope_scaling": RopeScaling(**config.model.rope_scaling)}
    return ModelConfig(**fields, lora=lora.Lora(**config.lora))


def build_learner(
    config: ml_collections.ConfigDict,
    vocab_size: int,
    devices: Sequence[jax.Device],
    tools: tuple[str, ...] = (),
    control_ids: tuple[int, ...] = (),
) -> Learner:
    """Builds a learner on the first devices, as many as the config's mesh has.

    Args:
      vocab_size: number of the tokenizer's pieces.
      tools: names of the run's tools; without them, observation metrics are not split by tool.
      control_ids: see `Renderer.control_ids`; without them, these tokens have no metrics.

    Raises:
      ConfigError: a size does not divide, or there are too few devices.
    """
    rows = config.model.vocab_size or vocab_size
    if rows < vocab_size:
        raise ConfigError(
            f"config.model.vocab_size = {rows} is less than the tokenizer's {vocab_size} pieces; raise it or set 0"
        )
    sizes = config.mesh
    try:
        mesh = make_mesh(
            sizes.data, sizes.fsdp or max(1, len(devices) // (sizes.data * sizes.tensor)), sizes.tensor, devices
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model_config = describe_model(config, rows)
    _check_divides(config, rows, mesh)
    _check_experts(config, devices)
    graphdef, params = abstract_params(model_config, mesh)
    learner = Learner(config, mesh, model_config, graphdef, params, tools, control_ids)
    _check_processes(learner, devices)
    return learner


def _check_experts(config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> None:
    """Raises `ConfigError` if the gradient of experts would compute every expert for every token."""
    trained = config.model.num_experts and not config.lora.rank
    if trained and devices[0].platform == "tpu" and jax.__version_info__ < GROUPED_GRADIENT:
        raise ConfigError(
            f"config.model.num_experts = {config.model.num_experts}: on TPUs jax {jax.__version__} computes the "
            f"gradient of every expert for every token (experiments/benchmarks/experts.md); use jax "
            f"{'.'.join(map(str, GROUPED_GRADIENT))} or newer, on Python 3.12, or adapters (config.lora.rank)"
        )


def _check_processes(learner: Learner, devices: Sequence[jax.Device]) -> None:
    """Raises `ConfigError` unless each process can contribute its share of an update."""
    mesh = learner.mesh
    available = len({device.process_index for device in devices})
    try:
        processes = learner.processes
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if processes < available:
        raise ConfigError(
            f"the mesh {dict(mesh.shape)} uses {mesh.size} of {len(devices)} devices, from only {processes} of "
            f"{available} processes; it must use devices of each: set mesh.fsdp = 0 to use all devices"
        )


def _check_divides(config: ml_collections.ConfigDict, vocab_size: int, mesh: Mesh) -> None:
    """Raises `ConfigError`, naming both numbers, for a size that cannot be sharded evenly over the mesh."""
    shards, model = mesh.shape, config.model
    for name, value, axes in (
        ("config.pack.rows", config.pack.rows, ("data", "fsdp")),
        ("config.model.embed_dim", model.embed_dim, ("fsdp",)),
        ("config.model.num_heads", model.num_heads, ("tensor",)),
        ("config.model.num_kv_heads", model.num_kv_heads, ("tensor",)),
        ("config.model.ffn_dim", model.ffn_dim, ("tensor",)),
        ("vocabulary", vocab_size, ("tensor",)),
    ):
        size = int(np.prod([shards[axis] for axis in axes]))
        if value % size:
            over = " * ".join(f"mesh.{axis}" for axis in axes)
            raise ConfigError(f"{name} = {value} is not divisible by {over} = {size}")
