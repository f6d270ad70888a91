"""The default config: every field, with its unit. Experiment files under configs/ only assign.

In: overrides from a config file or the command line. Out: one locked `ConfigDict`. `run/validate.py` checks its values.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import ml_collections
from ml_collections import config_dict

from echo_jax.system import named
from echo_jax.system.errors import ConfigError

TASKS_PER_SEED = 10**9  # train tasks of seed s have indices from s × this; no two seeds share an index
FIRST_SPARE = TASKS_PER_SEED // 2  # of a seed's train tasks; runs use those from here on only to refill groups
# Sections to which a config may add entries. Elsewhere, assigning a field that does not exist is an error.
OPEN_SECTIONS = (
    "task.mixture",
    "tools",
    "rollout.engine_options",
    "loss.policy_options",
    "loss.advantage_options",
    "loss.class_weights",
    "loss.tool_weights",
    "loss.observation_filter_options",
    "environments",
)
# The fields that an entry of the task mixture may have a value of its own for, in `environments`.
OF_AN_ENVIRONMENT = (
    *("loss.mode", "loss.policy", "loss.policy_options", "loss.clip_low", "loss.clip_high", "loss.dual_clip"),
    *("loss.advantage", "loss.advantage_options", "loss.length_penalty", "loss.filter_zero_variance"),
    *("loss.mask_overlong", "loss.kl_weight", "loss.entropy_weight", "loss.observation_weight", "loss.class_weights"),
    *("loss.tool_weights", "loss.observation_filter", "loss.observation_filter_options", "loss.top_entropy"),
    *("loss.reward_adaptive", "loss.dedupe", "loss.min_valid_calls", "loss.clean_parse"),
    *("rollout.temperature", "rollout.group_size"),
)
# Fields of `loss` that name a function -> those that hold its options.
OPTIONS_OF = {
    "policy": ("policy_options", "clip_low", "clip_high", "dual_clip"),
    "advantage": ("advantage_options",),
    "observation_filter": ("observation_filter_options",),
}


def default_config() -> ml_collections.ConfigDict:
    """Returns the default config, locked: assigning a field that does not exist raises. Only `task` and `environments`
    are open, so that a config can add sections for entries of the mixture."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # root of every random key: weights, tasks, sampling
    c.num_steps = 100  # RL steps after the warm start
    # Start from another run's weights instead of a warm start of its own: WORKDIR or WORKDIR:STEP of a checkpoint after
    # the warm start, the newest by default. Its steps count as this run's, and its tasks are not used again.
    c.init_from = ""

    c.task = ml_collections.ConfigDict()
    # Entry -> sampling weight. An entry is the name of a built-in family, or any name with a section
    # c.task.ENTRY = {"family": …, **parameters}, whose "family" is a built-in name or your "module:Class".
    c.task.mixture = ml_collections.ConfigDict({"lookup": 1.0})
    # `revision`: which tasks a family makes. They change when a family is mended; 1 are those of runs from before this
    # field. 0: the newest in a new run, which records it; a run that goes on keeps the revision that it has.
    c.task.lookup = ml_collections.ConfigDict({"revision": 0})
    c.task.lookup.folders = 3  # folders in the random tree
    c.task.lookup.files = 6  # files in the random tree
    c.task.lookup.words = 96  # distinct words, for all names, keys and values
    c.task.shell = ml_collections.ConfigDict({"level": 1, "revision": 0})  # 1 to 3; higher: more files, more steps
    c.task.python = ml_collections.ConfigDict({"level": 1, "revision": 0})
    c.task.sqlite = ml_collections.ConfigDict({"level": 1, "revision": 0})
    c.task.maze = ml_collections.ConfigDict({"width": 6, "height": 6, "revision": 0})  # in cells; runs no subprocess
    c.task.rooms = ml_collections.ConfigDict({"revision": 0})
    c.task.rooms.width = 3  # rooms from west to east
    c.task.rooms.height = 3  # rooms from north to south
    c.task.rooms.map_seed = 0  # each seed gives one fixed map; tasks are start/goal pairs on it

    # What differs for an entry of the mixture: c.environments.ENTRY = {"loss": {…}, "rollout": {…}}, with fields of
    # OF_AN_ENVIRONMENT, such as c.environments.maze = {"loss": {"policy": "sapo", "observation_weight": 0.1}}.
    c.environments = ml_collections.ConfigDict()

    # Your tools, for tasks to name: name -> "module:Class" or {"tool": "module:Class", **keyword arguments}.
    c.tools = ml_collections.ConfigDict()

    c.model = ml_collections.ConfigDict()
    # Published weights to start from: a folder of safetensors with config.json, or a .gguf file; empty: random weights.
    c.model.weights = ""
    c.model.vocab_size = 0  # rows of the embedding; 0: those of the weights or, without weights, the tokenizer's size
    c.model.num_layers = 3
    c.model.embed_dim = 128
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 32
    c.model.ffn_dim = 384
    c.model.rope_theta = 10_000.0
    c.model.rope_scaling = ml_collections.ConfigDict()  # for contexts longer than in pretraining
    c.model.rope_scaling.kind = "none"  # none | llama3 | yarn
    c.model.rope_scaling.factor = 1.0  # new context length over old
    c.model.rope_scaling.original_length = 8192  # tokens of the old context
    c.model.rope_scaling.low_frequency_factor = 1.0  # llama3: stretch waves with fewer turns per old context than this,
    c.model.rope_scaling.high_frequency_factor = 4.0  # keep waves with more turns than this, blend in between
    c.model.rope_scaling.beta_fast = 32.0  # yarn: keep waves with more turns than this,
    c.model.rope_scaling.beta_slow = 1.0  # stretch waves with fewer, blend in between
    c.model.rope_scaling.attention_factor = 0.0  # yarn: multiplies queries and keys; 0: 0.1 ln(factor) + 1
    c.model.norm_eps = 1e-6
    c.model.qkv_bias = False  # biases on queries, keys and values (Qwen2.5)
    c.model.qk_norm = False  # RMSNorm on each head's queries and keys (Qwen3)
    c.model.num_experts = 0  # experts per FFN (Qwen3-MoE), each ffn_dim wide; 0: a dense FFN
    c.model.experts_per_token = 0  # each token goes to this many of its likeliest experts
    c.model.normalize_experts = True  # rescale the chosen experts' probabilities to sum to 1
    c.model.tie_embeddings = True
    # Of matmuls: float32 | bfloat16. On a GPU float32 is TF32, unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
    c.model.compute_dtype = "float32"
    # Of stored parameters: float32 | bfloat16. bfloat16 loses small updates; use it for weights frozen under adapters.
    c.model.param_dtype = "float32"
    c.model.remat = "full"  # full | dots | none: what the backward pass recomputes, see models/transformer.py
    c.model.attention = "xla"  # xla | splash (TPU only; rows of a multiple of 512 tokens)

    c.lora = ml_collections.ConfigDict()  # train only low-rank adapters on each layer's matrices
    c.lora.rank = 0  # 0: no adapters; train the whole model
    c.lora.alpha = 32.0  # an adapter's output is scaled by alpha / rank
    c.lora.targets = ("query", "key", "value", "attention_out", "gate", "up", "down")

    c.tokenizer = ml_collections.ConfigDict()
    # A SentencePiece model, a .gguf file, or a folder with tokenizer.json or tokenizer.model. Empty: the tokenizer of
    # model.weights or, without weights, the small one shipped with the package.
    c.tokenizer.path = ""

    c.render = ml_collections.ConfigDict()
    # Chat format: builtin (for models from scratch) | qwen3 | llama_3 | template (the tokenizer's Jinja template).
    c.render.format = "builtin"
    c.render.thinking = True  # qwen3: False starts each turn with an empty reasoning block
    c.render.system = ""  # the system message, if the format has one

    c.rollout = ml_collections.ConfigDict()
    c.rollout.groups = 8  # tasks per step
    c.rollout.group_size = 8  # rollouts per task, a group
    c.rollout.max_turns = 3
    c.rollout.max_tokens = 96  # of a whole rollout, prompt and tool output included
    c.rollout.max_turn_tokens = 24  # sampled in one turn
    c.rollout.warn_last_turn = False  # tell the agent when its last turn comes
    c.rollout.temperature = 1.0  # sampling temperature, in training and evaluation
    c.rollout.engine = "paged"  # the sampler: paged, or your "module:Class"; see rollout/engine/
    c.rollout.engine_options = ml_collections.ConfigDict()  # keyword arguments of the engine
    c.rollout.tool_threads = 0  # tool calls that a process runs at once; 0: as many as it has open rollouts
    # Sandboxes that a process has open at once, those of the next step included, which start during the update. An open
    # rollout has one, so fewer rollouts are then sampled at once. 0: one for each session of the engine.
    c.rollout.max_sandboxes = 0
    c.rollout.save_every = 10  # save the rollouts of every n-th step, and of the last one; 0: of the last one only
    c.rollout.keep = 0  # newest of these files to keep; 0: all
    c.rollout.grammar = "plain"  # syntax of tool calls: plain | json | llama, see render/calls.py
    c.rollout.max_seconds = 60.0  # total run time of one rollout's tool calls
    c.rollout.max_format_errors = 4  # end a rollout after this many turns in a row without a runnable call
    # Replace a group whose scored rollouts all earned the same reward by one of another task of its environment, up to
    # this many times (DAPO's dynamic sampling); 0: never. What is still without variance then is trained as it is.
    c.rollout.refill_tries = 0
    c.rollout.replay = ""  # file of saved rollouts to train on, off-policy, instead of sampling

    c.sandbox = ml_collections.ConfigDict()
    c.sandbox.backend = "auto"  # auto | bubblewrap
    c.sandbox.timeout_seconds = 5.0  # wall clock of one tool call
    c.sandbox.output_bytes = 256  # kept of one tool call's output: its head and tail
    c.sandbox.memory_bytes = 256 << 20
    c.sandbox.disk_bytes = 16 << 20
    c.sandbox.flood_bytes = 64 << 20  # kill a tool call that prints more
    c.sandbox.processes = 32
    c.sandbox.open_files = 256  # per process
    c.sandbox.cpu_seconds = 60  # per process
    c.sandbox.setup_seconds = 30.0  # time-out of a task's setup command
    c.sandbox.score_seconds = 30.0  # time-out of one scoring command

    # Imitates actions, with cross-entropy on the body of every observation, whatever `loss` says for RL.
    c.warm_start = ml_collections.ConfigDict()
    c.warm_start.num_steps = 200  # SFT updates on scripted demonstrations before RL; 0: none
    c.warm_start.demonstrations = 2048
    c.warm_start.success_rate = 0.35  # share of demonstrations that solve their task; the others go wrong
    c.warm_start.trajectories = ""  # file of saved rollouts to imitate instead of scripted demonstrations
    c.warm_start.min_reward = 0.0  # imitate only rollouts of that file with at least this reward
    c.warm_start.batch = 64  # demonstrations per update
    c.warm_start.learning_rate = 2e-3
    c.warm_start.observation_weight = 0.2  # lambda; SFT on actions alone leaves observation CE worse than uniform

    c.loss = ml_collections.ConfigDict()
    c.loss.mode = "echo"  # grpo (lambda = 0) | echo | env_only (no policy term, no verifier needed)
    c.loss.mode_changes = ()  # pairs (RL step from 0, mode): switch to the mode at that step
    # The policy term.
    # grpo | dr_grpo | dapo | gspo | cispo | dppo | ipo | sapo | rloo | reinforce, see policy_losses.py; or your
    # "module:function".
    c.loss.policy = "grpo"
    c.loss.policy_options = ml_collections.ConfigDict()  # hyperparameters that differ from its defaults
    # group | batch | group_mean | mean | leave_one_out | reward, see advantages.py; auto: as in the policy loss's
    # paper; or yours.
    c.loss.advantage = "auto"
    c.loss.advantage_options = ml_collections.ConfigDict()  # keyword arguments of the advantage
    # Before the advantage, subtract from each reward the group's mean reward times the sum of these, each times its
    # share of the largest possible: sampled tokens and tokens of the environment of rollout.max_tokens, turns of
    # rollout.max_turns. Filters and refills of groups go by the reward itself.
    c.loss.length_penalty = ml_collections.ConfigDict({"output": 0.0, "input": 0.0, "turns": 0.0})
    # Groups of equal rewards leave the policy term and its denominator; None: as in the policy loss's paper.
    c.loss.filter_zero_variance = config_dict.placeholder(bool)
    c.loss.policy_normalizer = "auto"  # sequence | token | constant; auto: as in the policy loss's paper
    # Clip the importance ratio to [1 - clip_low, 1 + clip_high]; None: as in the policy loss's paper (grpo .2, .2).
    c.loss.clip_low = config_dict.placeholder(float)
    c.loss.clip_high = config_dict.placeholder(float)
    c.loss.dual_clip = 0.0  # for a negative advantage A the loss is at most -dual_clip A (3 is usual); 0: off
    c.loss.old_logprobs = "sampler"  # sampler | recomputed: denominator of the importance ratio
    # What the ratio of recomputed old probabilities to the sampler's does to a token's policy loss, see `echo_loss`:
    # token_truncate | token_mask | sequence_truncate | sequence_mask.
    c.loss.importance_correction = "token_truncate"
    c.loss.importance_cap = 2.0  # of that ratio; 0: no correction
    c.loss.entropy_weight = 0.0  # of the entropy bonus, on the tokens of the policy term
    c.loss.mask_overlong = False  # exclude rollouts that hit a budget from the policy term
    c.loss.kl_weight = 0.0  # weight of the KL to the policy at the start of RL; 0: off
    c.loss.kl_estimator = "k3"  # k1 | k2 | k3
    c.loss.kl_clamp = 0.0  # bound a token's KL to [-kl_clamp, kl_clamp] (verl and SkyRL: 10); 0: off
    # The observation term.
    c.loss.observation_weight = 0.05  # lambda; not transferable between normalisers
    # The share of lambda at a step: constant | linear, cosine, step (from 1 to observation_schedule_end) | warmup (from
    # there to 1) | piecewise (through observation_schedule_points).
    c.loss.observation_schedule = "constant"
    c.loss.observation_schedule_steps = 0  # length of the schedule in RL steps; 0: num_steps
    c.loss.observation_schedule_end = 0.0
    c.loss.observation_schedule_points = ()  # pairs (RL step from 0, share of lambda), joined by straight lines
    # Hold the ratio of the observation term to the policy term at this value, by a factor on lambda; 0: off. With
    # optimizer.mini_batches, the first of a step is measured.
    c.loss.observation_target_ratio = 0.0
    # gradients (ratio of their norms) | terms (of the absolute values of their tokens' losses; one forward pass more
    # in place of two backward passes).
    c.loss.observation_target_of = "gradients"
    c.loss.observation_target_gain = 0.5  # share of the error, in logarithms, that each step corrects
    # Of its cross-entropy: "1" (the paper's eq. 3), or "sampling": rollout.temperature, as in the authors' release.
    c.loss.observation_temperature = "1"
    c.loss.observation_normalizer = "observation"  # observation | selected | token | constant
    c.loss.observation_epsilon = 0.0  # added to the length that "observation" and "selected" divide by
    # Weight of each class of environment tokens; see roles.py for the classes.
    c.loss.class_weights = ml_collections.ConfigDict(
        {
            "body": 1.0,
            "boilerplate": 0.0,
            "truncation": 0.0,
            "feedback": 0.0,
            "warning": 0.0,
            "user": 0.0,
            "system": 0.0,
        }
    )
    c.loss.tool_weights = ml_collections.ConfigDict({"bash": 1.0})  # of each tool's output; default 1
    c.loss.observation_filter = ""  # your module:function (trajectory, bool [T]) -> bool [T], narrows what is trained
    c.loss.observation_filter_options = ml_collections.ConfigDict()  # keyword arguments of the filter
    c.loss.observation_clip = 1.0  # stop training a token once its probability exceeds this (PaW: 0.2); 1: never
    c.loss.top_entropy = 1.0  # train only observations after this share of turns, the most uncertain (PaW: 0.75)
    c.loss.reward_adaptive = False  # multiply lambda by (1 - mean reward) of each group (PaW)
    c.loss.dedupe = False  # train an observation only once if it repeats within a group
    # Both leave a rollout out of the observation term, and its denominator:
    c.loss.min_valid_calls = 0.0  # if its share of valid call attempts is smaller than this
    c.loss.clean_parse = False  # if a turn was cut off or a call left open
    # Both terms.
    c.loss.policy_constant = 0  # divisor in tokens of the normaliser "constant"; 0: rollout.max_tokens
    c.loss.observation_constant = 0  # the same for the observation term
    c.loss.gradient_metrics_every = 0  # steps of either phase between comparisons of the terms' gradients; 0: never
    c.loss.token_block = 256  # the LM head computes logits in blocks of this many tokens (better: TPU 1024, H100 2048)
    c.loss.vocab_block = 2048  # by this many vocabulary entries (better: H100 8192)
    c.loss.score_all = True  # run the LM head also for tokens that only metrics read; False: only for trained tokens

    c.optimizer = ml_collections.ConfigDict()
    # Of the warm start too: adamw | sgd | muon (of the layers' matrices; adamw of embeddings, head, norms, biases).
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-4  # of RL
    c.optimizer.updates_per_batch = 1  # passes over each RL batch
    c.optimizer.mini_batches = 1  # updates in a pass, each on a part of the rollouts (PPO's mini-batches)
    c.optimizer.warmup_steps = 10  # updates of either phase whose rate rises
    c.optimizer.schedule = "constant"  # of RL's rate after the warm-up: constant | linear | cosine
    c.optimizer.schedule_steps = 0  # RL updates until it ends, warm-up included; 0: all
    c.optimizer.end_share = 0.0  # share of the learning rate at the end of the schedule
    c.optimizer.b1 = 0.9  # of AdamW's moments
    c.optimizer.b2 = 0.999
    c.optimizer.momentum = 0.0  # of sgd
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0  # of the global gradient norm

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = 1  # 0: all devices that data and tensor leave
    c.mesh.tensor = 1

    c.pack = ml_collections.ConfigDict()
    c.pack.length = 256  # tokens per packed row
    c.pack.rows = 8  # rows per micro-batch, over all devices; 0: one per data shard

    c.eval = ml_collections.ConfigDict()
    c.eval.every = 0  # RL steps between evaluations; 0: only before and after RL
    c.eval.episodes = 256  # held-out tasks, one sampled rollout each
    c.eval.transcripts = 64  # fixed held-out transcripts for eval/observation_ce, by the tasks' demonstrators
    c.eval.trajectories = ""  # file of saved rollouts to use as these transcripts, for tasks without demonstrators

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 20  # steps between checkpoints; the last step is always saved
    c.checkpoint.minutes = 10.0  # also save once this much time has passed since the last checkpoint; 0: never
    c.checkpoint.keep = 2  # newest checkpoints to keep

    c.system = ml_collections.ConfigDict()
    c.system.compilation_cache = ""  # folder that caches compiled programs between runs; empty: none
    # For runs with several processes.
    c.system.silence_seconds = 30.0  # a process is presumed dead after this long without a sign of life
    c.system.barrier_seconds = 3600.0  # the longest wait for a process that is alive but late
    c.system.profile_steps = ()  # (first, last) RL steps, from 1, to profile into workdir/profile
    c.lock()
    families = [section for name, section in c.task.items() if name != "mixture"]
    c.task.unlock()
    c.environments.unlock()
    for section in families:
        section.lock()
    return c


def load_config_file(path: Path) -> ModuleType:
    """Returns the module of a config file; its `get_config` makes the config.

    Raises:
      ConfigError: the file does not exist.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    named.add_to_path(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environments(mixture: Mapping[str, float]) -> list[str]:
    """Returns the entries of a task mixture that tasks come from."""
    return sorted(name for name, weight in mixture.items() if weight > 0)


def of_environment(config: ml_collections.ConfigDict, entry: str) -> ml_collections.ConfigDict:
    """Returns a config as it is for an entry of the task mixture: with the values of `environments.ENTRY`, field by
    field, in place of those of the run. The config itself, if the entry has none.

    What OPTIONS_OF says belongs to the run's policy loss, advantage or filter, so an entry with another does without.
    """
    own = config.environments.get(entry)
    if not own:
        return config
    merged = config.copy_and_resolve_references()
    with merged.ignore_type(), merged.unlocked():  # run/validate.py checks the types
        for name, options in OPTIONS_OF.items():
            if own.get("loss", {}).get(name, config.loss[name]) != config.loss[name]:
                for option, default in ((option, default_config().loss[option]) for option in options):
                    is_section = isinstance(default, ml_collections.ConfigDict)
                    merged.loss[option] = ml_collections.ConfigDict() if is_section else default
        for name, value in flat(own).items():
            *sections, leaf = name.split(".")
            section = merged
            for part in sections:
                section = section[part]
            is_float = isinstance(section.get(leaf), float)
            section[leaf] = float(value) if is_float and type(value) is int else value
    return merged


def may_add(name: str) -> bool:
    """Returns whether a config may have a field of this dotted name that the default config lacks: an entry of an open
    section, or the section of a task family that is not built in, and its parameters."""
    section, _, rest = name.partition(".")
    family = rest.partition(".")[0]
    if section == "task" and family and family not in default_config().task:
        return True
    return name.startswith(tuple(f"{section}." for section in OPEN_SECTIONS))


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
