"""The parts of a run, built from its config and checked before any work starts.

In: a config. Out: a `Runtime`: what training.py builds, and what the host does with it: tokenizer, tasks, engine,
collector, saved rollouts.
"""

import dataclasses
import hashlib
from pathlib import Path

import grain
import jax
import ml_collections
import numpy as np

from echo_jax import config as config_lib
from echo_jax import peers as peers_lib
from echo_jax import provenance
from echo_jax.advantages import ADVANTAGES, groups_of
from echo_jax.calls import GRAMMARS
from echo_jax.checkpoint import CheckpointError
from echo_jax.config import ConfigError
from echo_jax.engine.dense import DenseEngine
from echo_jax.environment import Machine, ScoreError
from echo_jax.episode import Rules, start
from echo_jax.kernels import attention
from echo_jax.metrics import MetricsError
from echo_jax.models.pretrained import check_fields, check_tensors
from echo_jax.models.rope import SCALINGS
from echo_jax.models.sources import Source, WeightsError, open_source
from echo_jax.models.transformer import ATTENTION, LINEAR, REMAT
from echo_jax.objective import (
    MODES,
    OBSERVATION_NORMALIZERS,
    POLICY_NORMALIZERS,
    SCHEDULES,
)
from echo_jax.peers import PeerError, Peers
from echo_jax.policy_loss import CLIPPED, KL_ESTIMATORS, POLICY_LOSSES
from echo_jax.render import FORMATS, Renderer, RenderError, make_renderer
from echo_jax.roles import ENVIRONMENT_CLASSES
from echo_jax.rollout import Collector, RolloutError
from echo_jax.selection import SelectionError, load_filter
from echo_jax.tasks.stream import make_families, task_stream
from echo_jax.tasks.task import Task
from echo_jax.tokenizer import Tokenizer, TokenizerError, differing, vocabulary
from echo_jax.tokenizer import load as load_tokenizer
from echo_jax.tools import TOOL_IDS, TOOLS, sandbox
from echo_jax.training import Training, build_training
from echo_jax.trajectory import Trajectory, TrajectoryError
from echo_jax.trajectory import load as load_trajectories

# What a user can mend: printed as one message instead of a traceback. An OSError names its path.
USER_ERRORS = (
    ConfigError,
    TokenizerError,
    WeightsError,
    RenderError,
    sandbox.SandboxError,
    CheckpointError,
    MetricsError,
    TrajectoryError,
    RolloutError,
    PeerError,
    ScoreError,
    SelectionError,
    OSError,
)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime(Training):
    """What train and evaluate share."""

    renderer: Renderer
    train_tasks: grain.MapDataset
    heldout_tasks: grain.MapDataset
    imitated: list[Trajectory]  # of warm_start.trajectories; empty: scripted demonstrations
    replay: list[Trajectory]  # of rollout.replay; empty: the policy samples
    source: Source | None  # of model.weights; None: weights are random
    peers: Peers

    def make_engine(self) -> DenseEngine:
        rollout = self.config.rollout
        return DenseEngine(
            self.graphdef,
            self.model_config,
            lanes=self.rollouts_at_once,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            stop_ids=self.renderer.stop_ids,
            seed=self.config.seed,
            mesh=self.mesh,
        )

    def make_collector(self) -> Collector:
        rollout = self.config.rollout
        rules, machine = episode_rules(self.config), sandboxes(self.config)
        return Collector(self.renderer, rules, machine, rollout.tool_threads, self.peers)


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


def _check_tasks(config: ml_collections.ConfigDict, renderer: Renderer, tasks: list[Task]) -> None:
    """Raises `ConfigError` if a task has a tool that there is not, or its prompt or the first turn of its solution does
    not fit the budgets of an episode."""
    for task in tasks:
        if unknown := [name for name in task.tools if name not in TOOLS]:
            raise ConfigError(f"task {task.name} has the tools {unknown}; there are {', '.join(TOOLS)}")
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


def _weights(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> tuple[Source | None, int]:
    """Returns the published weights that a config names, and the rows of the embedding.

    Raises:
      WeightsError: they are of another model than the config's, or of another vocabulary than the tokenizer's.
    """
    if not config.model.weights:
        return None, tokenizer.vocab_size
    path = Path(config.model.weights)
    source = open_source(path)
    rows = check_fields(source, path, config.model)
    if rows < tokenizer.vocab_size:
        raise WeightsError(
            f"{path}: model.embed_tokens.weight has {rows} rows, the tokenizer {config.tokenizer.path or '(built-in)'} "
            f"has {tokenizer.vocab_size} pieces: it is of another vocabulary"
        )
    return source, rows


def find_tokenizer(config: ml_collections.ConfigDict) -> Tokenizer:
    """Returns the tokenizer that a config names, or that of the weights which it names.

    Raises:
      TokenizerError: it cannot serve, or it is of another vocabulary than the one that comes with the weights.
    """
    weights, path = config.model.weights, config.tokenizer.path
    if not path:
        return load_tokenizer(weights)
    tokenizer = load_tokenizer(path)
    if weights and (theirs := vocabulary(weights)) and (difference := differing(tokenizer.vocabulary, theirs)):
        raise TokenizerError(f"{path} is of another vocabulary than the tokenizer of {weights}: {difference}")
    return tokenizer


def start_peers(config: ml_collections.ConfigDict, user_errors: tuple[type[Exception], ...] = USER_ERRORS) -> Peers:
    """Joins the other processes of this run; comes before any use of JAX's devices."""
    limits = {name: config.system[name] for name in ("silence_seconds", "barrier_seconds")}
    return peers_lib.start(**limits, user_errors=user_errors)


def _code(peers: Peers) -> dict[str, str | None]:
    """What has to be the same for all processes beside the config."""
    if peers.count == 1:
        return {}
    commit, diff = provenance.source()
    return {"jax": jax.__version__, "commit": commit, "diff": diff and hashlib.sha256(diff.encode()).hexdigest()}


def build(config: ml_collections.ConfigDict, peers: Peers | None = None) -> Runtime:
    """Builds the parts. Everything that can be wrong with a config or a host is found here.

    Raises:
      PeerError: the processes have not got the same config or the same JAX.
      ConfigError: a field's value cannot work.
      TokenizerError: the tokenizer cannot be used, or not with these weights.
      WeightsError: the weights are damaged, or of another model than the config's.
      RenderError: the tokenizer does not fit the chat format.
      TrajectoryError: saved rollouts that are to be used are damaged.
      SandboxUnavailable: no sandbox works on this host.
    """
    peers = peers or Peers()
    validate(config)
    given = {f"config.{name}": str(value) for name, value in config_lib.flat(config).items()}
    peers.same(given | _code(peers), "start all of them with the same code and command")
    tokenizer = find_tokenizer(config)
    mixture = dict(config.task.mixture)
    parameters = {name: dict(config.task[name]) for name in mixture if name in config.task}
    try:
        sandboxes(config)
        families = make_families(mixture, parameters)
        if any(family.make("train", 0).world() is None for family in families.values()):
            sandbox.probe(config.sandbox.backend)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    source, rows = _weights(config, tokenizer)
    training = build_training(config, rows, jax.devices())
    if source is not None:
        check_tensors(source, Path(config.model.weights), training.model_config)
    renderer = make_renderer(tokenizer, grammar=config.rollout.grammar, **config.render)
    train_tasks = task_stream(mixture, families, split="train", seed=config.seed)
    _check_tasks(config, renderer, [train_tasks[i] for i in range(16)])
    return Runtime(
        **vars(training),
        renderer=renderer,
        train_tasks=train_tasks,
        heldout_tasks=task_stream(mixture, families, split="heldout", seed=config.seed),
        imitated=_imitated(config, training.vocab_size),
        replay=_replay(config, training.vocab_size),
        source=source,
        peers=peers,
    )
