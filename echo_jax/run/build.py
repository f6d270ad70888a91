"""Builds the parts of a run from its config and checks them before any work starts.

In: a config. Out: `Parts`: the learner and everything on the host: tokenizer, tasks, engine, collector, saved rollouts.
"""

import dataclasses
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grain
import jax
import ml_collections
import numpy as np

from echo_jax import config as config_lib
from echo_jax import tokenizer as tokenizers
from echo_jax.config import ConfigError, environments, of_environment
from echo_jax.learner.learner import Learner, build_learner
from echo_jax.models.pretrained import check_fields, check_tensors
from echo_jax.models.sources import Source, WeightsError, open_source
from echo_jax.objective.advantages import groups_of
from echo_jax.render import Renderer, make_renderer
from echo_jax.roles import Role
from echo_jax.rollout.collector import Collector
from echo_jax.rollout.engine import Engine, EngineSetup, find_engine
from echo_jax.rollout.engine.placement import engine_mesh
from echo_jax.rollout.episode import Rules, start
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.rollout.trajectory import load as load_trajectories
from echo_jax.rollout.world import Machine
from echo_jax.run.engine_layout import engine_layout
from echo_jax.run.validate import check_tools, validate
from echo_jax.system import descriptors, paths, provenance, user_code
from echo_jax.system import peers as peers_lib
from echo_jax.system.peers import Peers
from echo_jax.system.terminal import escaped
from echo_jax.tasks.stream import environment_stream, make_families, spare_tasks, task_stream
from echo_jax.tasks.task import Family, Task
from echo_jax.tokenizer import Tokenizer
from echo_jax.tools import bubblewrap, make_tools, sandbox
from echo_jax.tools.tool import Tool

CHECKED_TASKS = 16  # tasks of the mixture to check before a run starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that training and evaluation share."""

    learner: Learner
    renderer: Renderer
    rules: Rules  # of every episode
    train_tasks: grain.MapDataset
    heldout_tasks: grain.MapDataset
    environments: grain.MapDataset  # entries of the mixture that the tasks of these two come from
    spare_task: Callable[[str, int], Task]  # (entry, index) -> a train task that is not among these, to refill groups
    imitated: list[Trajectory]  # from warm_start.trajectories; empty: scripted demonstrations
    replay: list[Trajectory]  # from rollout.replay; empty: the policy samples
    transcripts: list[Trajectory]  # from eval.trajectories; empty: demonstrators write them
    source: Source | None  # the published weights of model.weights; None: random weights
    peers: Peers

    @property
    def config(self) -> ml_collections.ConfigDict:
        return self.learner.config

    @functools.cached_property
    def temperatures(self) -> dict[str, float]:
        """Entry of the task mixture -> its sampling temperature, where that is not the run's."""
        found = {e: of_environment(self.config, e).rollout.temperature for e in environments(self.config.task.mixture)}
        return {entry: own for entry, own in found.items() if own != self.config.rollout.temperature}

    def make_engine(self) -> Engine:
        rollout, learner = self.config.rollout, self.learner
        setup = EngineSetup(
            graphdef=learner.graphdef,
            model_config=learner.model_config,
            mesh=learner.mesh,
            sessions=learner.rollouts_at_once,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            stop_ids=self.renderer.stop_ids,
            seed=self.config.seed,
            reserved_bytes=learner.reference_bytes,
        )
        make = find_engine(rollout.engine, rollout.engine_options)
        try:
            engine = make(setup, **rollout.engine_options)
        except ValueError as error:
            raise ConfigError(f"config.rollout.engine_options: {error}") from error
        needed = ("sessions", "set_params", "open", "extend", "busy", "step", "close")
        if lacking := [name for name in needed if not hasattr(engine, name)]:
            raise ConfigError(
                f"config.rollout.engine = {rollout.engine!r}: {type(engine).__name__} lacks {', '.join(lacking)}, "
                "which an engine must have"
            )
        if self.temperatures:
            _check_takes_temperature(engine, rollout.engine, self.temperatures)
        return engine

    def make_collector(self) -> Collector:
        rollout = self.config.rollout
        threads = rollout.tool_threads or self.learner.rollouts_at_once
        return Collector(self.renderer, self.rules, sandboxes(self.config), threads, rollout.max_sandboxes)


def _check_takes_temperature(engine: Engine, name: str, temperatures: Mapping[str, float]) -> None:
    """Raises `ConfigError` if an engine cannot sample some sessions at temperatures of their own."""
    try:
        inspect.signature(engine.open).bind(0, 0, temperature=1.0)
    except TypeError as error:
        fields = ", ".join(f"environments.{entry}.rollout.temperature = {own}" for entry, own in temperatures.items())
        raise ConfigError(
            f"config.{fields}: {type(engine).__name__}, which config.rollout.engine = {name!r} made, has one "
            f"temperature for all sessions ({error}); give its method open an argument `temperature`, or remove these"
        ) from error


def episode_rules(config: ml_collections.ConfigDict, tools: Mapping[str, Tool]) -> Rules:
    rollout = config.rollout
    return Rules(
        max_turns=rollout.max_turns,
        max_tokens=rollout.max_tokens,
        max_turn_tokens=rollout.max_turn_tokens,
        warn_last_turn=rollout.warn_last_turn,
        max_seconds=rollout.max_seconds,
        max_format_errors=rollout.max_format_errors,
        grammar=rollout.grammar,
        tools=tools,
    )


def _check_tasks(config: ml_collections.ConfigDict, renderer: Renderer, rules: Rules, tasks: Sequence[Task]) -> None:
    """Checks some tasks of the mixture.

    Raises:
      ConfigError: a task names a tool that does not exist, does not fit the budgets of an episode, or has no
        demonstrator for the warm start to imitate.
    """
    needs_script = config.warm_start.num_steps > 0 and not config.warm_start.trajectories
    for task in tasks:
        if unknown := [name for name in (*task.tools, task.listener) if name and name not in rules.tools]:
            raise ConfigError(
                f"task {task.name} names unknown tools: {', '.join(unknown)}; choose from {', '.join(rules.tools)}, or "
                "add yours to config.tools"
            )
        if task.listener and len(arguments := rules.tools[task.listener].parameters["required"]) != 1:
            raise ConfigError(
                f"the listener {task.listener} of task {task.name} requires the arguments {', '.join(arguments)}; it "
                "must require one, the text of the agent's turn"
            )
        try:
            episode = start(renderer, rules, task.prompt, task.tools, task.listener)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        with user_code.calling(f"the script of task {task.name}"):
            script = task.demonstrate(np.random.default_rng(0), solve=True)
            turn = next(script) if script is not None else None
        if script is None:
            if needs_script:
                raise ConfigError(
                    f"task {task.name} has no demonstrator for config.warm_start.num_steps = "
                    f"{config.warm_start.num_steps} to imitate: set num_steps to 0, or config.warm_start.trajectories "
                    "to a file of saved rollouts"
                )
            continue
        length = len(renderer.action(turn).ids)
        if length > episode.sample_budget:
            raise ConfigError(
                f"the demonstrator of task {task.name} begins with the turn {turn!r} of {length} tokens: more than "
                f"config.rollout.max_turn_tokens = {config.rollout.max_turn_tokens}, or than the prompt of "
                f"{len(episode.ids)} tokens leaves of config.rollout.max_tokens = {config.rollout.max_tokens}"
            )


def sandboxes(config: ml_collections.ConfigDict) -> Machine:
    """Returns how to make this config's sandboxes.

    Raises:
      ValueError: the limits are impossible.
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
    """Returns the scored rollouts of the file that a config field names; an empty list without a file."""
    if not path:
        return []
    trajectories = [t for t in load_trajectories(Path(paths.expanded(path)), vocab_size=vocab_size) if t.scored]
    longest = max((len(t.ids) for t in trajectories), default=0)
    if not 0 < longest <= config.rollout.max_tokens:
        raise ConfigError(
            f"config.{field} = {path} has {len(trajectories)} scored rollouts, the longest of {longest} tokens; it "
            f"must have at least one, and none longer than config.rollout.max_tokens = {config.rollout.max_tokens}"
        )
    return trajectories


def _transcripts(config: ml_collections.ConfigDict, vocab_size: int) -> list[Trajectory]:
    trajectories = _saved(config.eval.trajectories, "eval.trajectories", config, vocab_size)
    if trajectories and not any(t.count(Role.OBSERVATION) for t in trajectories):
        raise ConfigError(
            f"config.eval.trajectories = {config.eval.trajectories} has no token that a tool wrote, so there is no "
            "observation to predict: name another file"
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
            f"config.rollout.replay = {config.rollout.replay} has rollouts that no policy sampled: without log-probs "
            "they have no importance ratio; imitate them with config.warm_start.trajectories"
        )
    return trajectories


def _imitated(config: ml_collections.ConfigDict, vocab_size: int) -> list[Trajectory]:
    warm = config.warm_start
    trajectories = _saved(warm.trajectories, "warm_start.trajectories", config, vocab_size)
    least = warm.min_reward
    chosen = [t for t in trajectories if t.reward >= least]
    if trajectories and len(chosen) < warm.batch:
        raise ConfigError(
            f"config.warm_start.trajectories = {warm.trajectories} has {len(chosen)} rollouts with a reward of at "
            f"least warm_start.min_reward = {least}: fewer than one batch of warm_start.batch = {warm.batch}"
        )
    return chosen


def _weights(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> tuple[Source | None, int]:
    """Returns the published weights that a config names, and the number of rows of the embedding.

    Raises:
      WeightsError: the weights do not match the config's model or the tokenizer's vocabulary.
    """
    if not config.model.weights:
        return None, tokenizer.vocab_size
    path = Path(config.model.weights)
    source = open_source(path)
    rows = check_fields(source, path, config.model)
    if rows < tokenizer.vocab_size:
        raise WeightsError(
            f"{path}: model.embed_tokens.weight has {rows} rows, but the tokenizer "
            f"{config.tokenizer.path or '(built-in)'} has {tokenizer.vocab_size} pieces; choose the tokenizer of these "
            "weights"
        )
    return source, rows


def start_peers(config: ml_collections.ConfigDict) -> Peers:
    """Joins the other processes of this run. Call it before any use of JAX's devices."""
    limits = {name: config.system[name] for name in ("silence_seconds", "barrier_seconds")}
    return peers_lib.start(**limits)


def _code(peers: Peers) -> dict[str, str | None]:
    """Returns what must be the same in all processes, besides the config."""
    if peers.count == 1:
        return {}
    commit, diff = provenance.source()
    return {"jax": jax.__version__, "commit": commit, "diff": diff and hashlib.sha256(diff.encode()).hexdigest()}


def build(config: ml_collections.ConfigDict, peers: Peers | None = None) -> Parts:
    """Builds the parts. Finds everything that can be wrong with a config or a host.

    Raises:
      PeerError: the processes differ in config, code or JAX version.
      ConfigError: a field's value cannot work.
      TokenizerError: the tokenizer cannot be used at all, or not with these weights.
      WeightsError: the weights are damaged, or do not match the config or the tokenizer.
      RenderError: the tokenizer does not fit the chat format.
      TrajectoryError: a file of saved rollouts is damaged.
      SandboxUnavailable: no sandbox works on this host.
    """
    peers = peers or Peers()
    validate(config)
    given = {f"config.{name}": str(value) for name, value in config_lib.flat(config).items()}
    peers.same(given | _code(peers), "start all of them with the same code and command")
    tokenizer = tokenizers.find(config.tokenizer.path, config.model.weights)
    mixture = dict(config.task.mixture)
    sections = {name: dict(config.task[name]) for name in mixture if name in config.task}
    tools = make_tools(config.tools)
    check_tools(config, tools)
    families = make_families(mixture, sections)
    try:
        sandboxes(config)
        in_sandboxes = any(_needs_sandbox(name, family) for name, family in families.items())
        if in_sandboxes:
            sandbox.probe(config.sandbox.backend)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    source, rows = _weights(config, tokenizer)
    if source and source.unread and peers.is_first:
        unread = ", ".join(source.unread)
        print(escaped(f"{config.model.weights}: reads {source.read}, not {unread}"), file=sys.stderr)
    renderer = make_renderer(tokenizer, grammar=config.rollout.grammar, **config.render)
    learner = build_learner(config, rows, jax.devices(), tuple(tools), renderer.control_ids)
    if in_sandboxes:
        at_once = min(learner.rollouts_at_once, config.rollout.max_sandboxes or learner.rollouts_at_once)
        descriptors.allow_sandboxes(at_once, bubblewrap.DESCRIPTORS)
    if config.rollout.engine == "paged":
        engine_layout(learner, engine_mesh(learner.mesh, learner.model_config))
    if source is not None:
        check_tensors(source, Path(config.model.weights), learner.model_config)
    train_tasks = task_stream(mixture, families, split="train", seed=config.seed)
    rules = episode_rules(config, tools)
    _check_tasks(config, renderer, rules, [train_tasks[i] for i in range(CHECKED_TASKS)])
    return Parts(
        learner=learner,
        renderer=renderer,
        rules=rules,
        train_tasks=train_tasks,
        heldout_tasks=task_stream(mixture, families, split="heldout", seed=config.seed),
        environments=environment_stream(mixture),
        spare_task=spare_tasks(families, seed=config.seed),
        imitated=_imitated(config, learner.vocab_size),
        replay=_replay(config, learner.vocab_size),
        transcripts=_transcripts(config, learner.vocab_size),
        source=source,
        peers=peers,
    )


def _needs_sandbox(name: str, family: Family) -> bool:
    with user_code.calling(f"environment {name}: train task 0 or its world"):
        return family.make("train", 0).world() is None
