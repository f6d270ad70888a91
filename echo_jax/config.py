"""The default config: every field that exists, with its unit. Experiment files under configs/ only assign.

In: overrides from a config file or the command line. Out: one locked `ConfigDict`, and the record of it in a workdir.
"""

import json
import os
from pathlib import Path

import ml_collections


class ConfigError(ValueError):
    """A value that cannot work, found before any work starts."""


def default_config() -> ml_collections.ConfigDict:
    """Returns the default config, locked: assigning a field that does not exist raises."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # root of every random key: weights, tasks, sampling
    c.num_steps = 100  # RL updates after the warm start

    c.task = ml_collections.ConfigDict()
    c.task.mixture = ml_collections.ConfigDict({"lookup": 1.0})  # task family -> weight
    c.task.lookup = ml_collections.ConfigDict()
    c.task.lookup.folders = 3  # folders of the random tree
    c.task.lookup.files = 6  # files of the random tree
    c.task.lookup.words = 96  # distinct words for all names, keys and values
    c.task.rooms = ml_collections.ConfigDict()
    c.task.rooms.width = 3  # rooms of the map, west to east
    c.task.rooms.height = 3  # rooms of the map, north to south
    c.task.rooms.map_seed = 0  # one fixed map a seed; tasks are start/goal pairs on it

    c.model = ml_collections.ConfigDict()
    c.model.num_layers = 3
    c.model.embed_dim = 128
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 32
    c.model.ffn_dim = 384
    c.model.rope_theta = 10_000.0
    c.model.norm_eps = 1e-6
    c.model.tie_embeddings = True
    c.model.compute_dtype = "float32"  # matmuls: float32 or bfloat16; parameters stay float32
    c.model.remat = True  # recompute each layer in the backward pass

    c.tokenizer = ml_collections.ConfigDict()
    c.tokenizer.path = ""  # a SentencePiece model; empty: the small one shipped with the package

    c.rollout = ml_collections.ConfigDict()
    c.rollout.groups = 8  # tasks a step
    c.rollout.group_size = 8  # rollouts of each task
    c.rollout.max_turns = 3
    c.rollout.max_tokens = 96  # of a whole trajectory
    c.rollout.max_turn_tokens = 24  # sampled in one turn
    c.rollout.temperature = 1.0  # of sampling, in training and evaluation
    c.rollout.tool_threads = 8  # tool calls at work at once; as many sandboxes as rollouts are open
    c.rollout.save_every = 10  # keep the rollouts of every n-th step; 0: keep none

    c.sandbox = ml_collections.ConfigDict()
    c.sandbox.backend = "auto"
    c.sandbox.timeout_seconds = 5.0  # of one tool call
    c.sandbox.output_bytes = 256  # of one tool call; head and tail are kept
    c.sandbox.memory_bytes = 256 << 20
    c.sandbox.disk_bytes = 16 << 20
    c.sandbox.processes = 32

    c.warm_start = ml_collections.ConfigDict()
    c.warm_start.num_steps = 200  # sft updates on scripted demonstrations before RL; 0: none
    c.warm_start.demonstrations = 2048
    c.warm_start.success_rate = 0.35  # share of demonstrations that do the right thing
    c.warm_start.batch = 64  # demonstrations an update
    c.warm_start.learning_rate = 2e-3
    c.warm_start.observation_weight = 0.2  # action-only sft leaves observation CE worse than uniform

    c.loss = ml_collections.ConfigDict()
    c.loss.clip_low = 0.2  # the importance ratio is clipped to [1 - clip_low, 1 + clip_high]
    c.loss.clip_high = 0.2
    c.loss.observation_weight = 0.05  # lambda
    c.loss.observation_normalizer = "observation"  # observation | selected | token
    c.loss.policy_normalizer = "sequence"  # sequence | token
    c.loss.token_block = 1024  # tokens whose logits exist at once in the LM-head loss

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 10
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0  # of the global gradient norm

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.pack = ml_collections.ConfigDict()
    c.pack.length = 256  # tokens of a packed row
    c.pack.rows = 8  # rows of a micro-batch, over all devices

    c.eval = ml_collections.ConfigDict()
    c.eval.every = 0  # RL steps between evaluations; 0: only before and after RL
    c.eval.episodes = 256  # held-out tasks, one sampled rollout each
    c.eval.transcripts = 64  # fixed held-out transcripts for eval/observation_ce

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 20  # steps; the last step is always saved
    c.checkpoint.keep = 2
    return c.lock()


# What `validate` checks field by field.
_MAY_BE_ZERO = (
    "seed",
    "num_steps",
    "task.rooms.map_seed",
    "rollout.save_every",
    "warm_start.num_steps",
    "warm_start.demonstrations",
    "optimizer.warmup_steps",
    "eval.every",
)
_NOT_NEGATIVE = (
    "loss.observation_weight",
    "loss.clip_low",
    "loss.clip_high",
    "warm_start.observation_weight",
    "warm_start.learning_rate",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
)
_POSITIVE = ("rollout.temperature", "optimizer.clip_norm", "model.rope_theta", "model.norm_eps")
_CHOICES = {
    "loss.observation_normalizer": ("observation", "selected", "token"),
    "loss.policy_normalizer": ("sequence", "token"),
    "model.compute_dtype": ("float32", "bfloat16"),
}


def flat(config: ml_collections.ConfigDict) -> dict[str, object]:
    """Returns {"section.field": value} over all leaves."""
    leaves = {}
    for name in sorted(config):
        value = config[name]
        if isinstance(value, ml_collections.ConfigDict):
            leaves |= {f"{name}.{rest}": leaf for rest, leaf in flat(value).items()}
        else:
            leaves[name] = value
    return leaves


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises `ConfigError`, naming field and value, for what no run could use."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    fields = flat(config)
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool):
            least = 0 if name in _MAY_BE_ZERO else 1
            require(value >= least, f"config.{name} = {value}: it must be at least {least}")
    for name in _NOT_NEGATIVE:
        require(fields[name] >= 0, f"config.{name} = {fields[name]}: it must not be negative")
    for name, allowed in _CHOICES.items():
        require(fields[name] in allowed, f"config.{name} = {fields[name]!r}: choose one of {', '.join(allowed)}")
    share = config.warm_start.success_rate
    require(0 <= share <= 1, f"config.warm_start.success_rate = {share}: it must lie between 0 and 1")
    for name in _POSITIVE:
        require(fields[name] > 0, f"config.{name} = {fields[name]}: it must be above 0")
    for name in ("optimizer.b1", "optimizer.b2"):
        require(0 <= fields[name] < 1, f"config.{name} = {fields[name]}: it must lie in [0, 1)")
    tokens, length = config.rollout.max_tokens, config.pack.length
    require(tokens <= length, f"config.rollout.max_tokens = {tokens} does not fit config.pack.length = {length}")
    made, batch = config.warm_start.demonstrations, config.warm_start.batch
    require(
        config.warm_start.num_steps == 0 or made >= batch,
        f"config.warm_start.demonstrations = {made} is less than one batch of config.warm_start.batch = {batch}",
    )
    model, mesh = config.model, config.mesh
    require(model.head_dim % 2 == 0, f"config.model.head_dim = {model.head_dim}: rotary embedding needs an even one")
    divisions = [
        ("pack.rows", config.pack.rows, "mesh.data * mesh.fsdp", mesh.data * mesh.fsdp),
        ("model.embed_dim", model.embed_dim, "mesh.fsdp", mesh.fsdp),
        ("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads),
        ("model.num_heads", model.num_heads, "mesh.tensor", mesh.tensor),
        ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor),
        ("model.ffn_dim", model.ffn_dim, "mesh.tensor", mesh.tensor),
    ]
    for name, value, by, divisor in divisions:
        require(value % divisor == 0, f"config.{name} = {value} is not divisible by {by} = {divisor}")


def claim_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes config.json into a new workdir, or checks that an old one belongs to the same config."""
    path = workdir / "config.json"
    if path.exists():
        check_workdir(config, workdir)
        return
    workdir.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name("config.json.tmp")
    scratch.write_text(json.dumps(flat(config), indent=2, sort_keys=True) + "\n")
    os.replace(scratch, path)


def check_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Raises `ConfigError`, listing the fields, if a workdir holds no run or a run of another config: going on would
    mix two experiments."""
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run; train one first: python -m echo_jax.train --workdir={workdir} …")
    ours = json.loads(json.dumps(flat(config)))
    try:
        theirs = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); move the workdir away, or use another --workdir") from error
    if ours == theirs:
        return
    missing = "(no such field)"
    differing = [
        f"  {name}: there {theirs.get(name, missing)!r}, here {ours.get(name, missing)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name, missing) != theirs.get(name, missing)
    ]
    raise ConfigError(
        f"workdir {workdir} holds a run of another config:\n"
        + "\n".join(differing)
        + "\nUse the same config to resume it, or another --workdir for a new run."
    )
