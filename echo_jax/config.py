"""The default config: every field that exists, with its unit. Experiment files under configs/ only assign.

In: overrides from a config file or the command line. Out: one locked `ConfigDict`. `run/validate.py` checks its values.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import ml_collections
from ml_collections import config_dict

from echo_jax.system import named
from echo_jax.system.errors import ConfigError

# Sections whose entries a config names itself. Elsewhere, assigning a field that does not exist is an error.
OPEN_SECTIONS = (
    "task.mixture",
    "tools",
    "rollout.engine_options",
    "loss.policy_options",
    "loss.advantage_options",
    "loss.class_weights",
    "loss.tool_weights",
    "loss.observation_filter_options",
)


def default_config() -> ml_collections.ConfigDict:
    """Returns the default config, locked: assigning a field that does not exist raises. Only `task` is open, for the
    sections of further entries of the mixture."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # root of every random key: weights, tasks, sampling
    c.num_steps = 100  # RL updates after the warm start

    c.task = ml_collections.ConfigDict()
    # Entry -> weight. An entry is a family by its name; or it has a section c.task.ENTRY = {"family": …, **parameters},
    # where the family is one by its name or "module:Class" of yours.
    c.task.mixture = ml_collections.ConfigDict({"lookup": 1.0})
    c.task.lookup = ml_collections.ConfigDict()
    c.task.lookup.folders = 3  # folders of the random tree
    c.task.lookup.files = 6  # files of the random tree
    c.task.lookup.words = 96  # distinct words for all names, keys and values
    c.task.shell = ml_collections.ConfigDict({"level": 1})  # 1 to 3: more files, more steps
    c.task.python = ml_collections.ConfigDict({"level": 1})
    c.task.sqlite = ml_collections.ConfigDict({"level": 1})
    c.task.maze = ml_collections.ConfigDict({"width": 6, "height": 6})  # cells; runs no subprocess
    c.task.rooms = ml_collections.ConfigDict()
    c.task.rooms.width = 3  # rooms of the map, west to east
    c.task.rooms.height = 3  # rooms of the map, north to south
    c.task.rooms.map_seed = 0  # one fixed map a seed; tasks are start/goal pairs on it

    # Tools of your own, which tasks can name: name -> "module:Class" or {"tool": "module:Class", **keyword arguments}.
    c.tools = ml_collections.ConfigDict()

    c.model = ml_collections.ConfigDict()
    # Published weights to begin with: a folder of safetensors with its config.json, or a .gguf file; empty: random.
    c.model.weights = ""
    c.model.vocab_size = 0  # rows of the embedding; 0: as many as the weights have, or the tokenizer has pieces
    c.model.num_layers = 3
    c.model.embed_dim = 128
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 32
    c.model.ffn_dim = 384
    c.model.rope_theta = 10_000.0
    c.model.rope_scaling = ml_collections.ConfigDict()  # to contexts longer than those of pretraining
    c.model.rope_scaling.kind = "none"  # none | llama3 | yarn
    c.model.rope_scaling.factor = 1.0  # new context over old
    c.model.rope_scaling.original_length = 8192  # tokens of the old context
    c.model.rope_scaling.low_frequency_factor = 1.0  # llama3: waves that turn less often in it are stretched,
    c.model.rope_scaling.high_frequency_factor = 4.0  # those that turn more often are kept
    c.model.rope_scaling.beta_fast = 32.0  # yarn: the same bounds
    c.model.rope_scaling.beta_slow = 1.0
    c.model.rope_scaling.attention_factor = 0.0  # yarn: of queries and keys; 0: 0.1 ln(factor) + 1
    c.model.norm_eps = 1e-6
    c.model.qkv_bias = False  # biases of queries, keys and values (Qwen2.5)
    c.model.qk_norm = False  # RMSNorm of each head's queries and keys (Qwen3)
    c.model.num_experts = 0  # experts of each FFN (Qwen3-MoE), whose ffn_dim is that of one; 0: a plain FFN
    c.model.experts_per_token = 0  # the likeliest of them, which a token goes to
    c.model.normalize_experts = True  # their probabilities sum to 1
    c.model.tie_embeddings = True
    c.model.compute_dtype = "float32"  # matmuls: float32 | bfloat16
    # Of parameters at rest: float32 | bfloat16. bfloat16 loses small updates: meant for weights that adapters freeze.
    c.model.param_dtype = "float32"
    c.model.remat = "full"  # full | dots | none: what the backward pass computes again, see models/transformer.py
    c.model.attention = "xla"  # xla | splash (TPU only; rows of a multiple of 512 tokens)

    c.lora = ml_collections.ConfigDict()  # train low-rank adapters of each layer's matrices, and nothing else
    c.lora.rank = 0  # 0: no adapters, the whole model is trained
    c.lora.alpha = 32.0  # an adapter counts alpha / rank
    c.lora.targets = ("query", "key", "value", "attention_out", "gate", "up", "down")

    c.tokenizer = ml_collections.ConfigDict()
    # A SentencePiece model, a .gguf file, or a folder with a tokenizer.json or tokenizer.model; empty: that of
    # model.weights or, without weights, the small one shipped with the package.
    c.tokenizer.path = ""

    c.render = ml_collections.ConfigDict()
    # The chat format: builtin (of models from nothing) | qwen3 | llama_3 | template (the one that the tokenizer has).
    c.render.format = "builtin"
    c.render.thinking = True  # qwen3: False begins each turn with an empty reasoning
    c.render.system = ""  # the system message, where a format has one

    c.rollout = ml_collections.ConfigDict()
    c.rollout.groups = 8  # tasks a step
    c.rollout.group_size = 8  # rollouts of each task
    c.rollout.max_turns = 3
    c.rollout.max_tokens = 96  # of a whole trajectory
    c.rollout.max_turn_tokens = 24  # sampled in one turn
    c.rollout.warn_last_turn = False  # tell the agent that its last turn has come
    c.rollout.temperature = 1.0  # of sampling, in training and evaluation
    c.rollout.engine = "dense"  # what samples: dense, or "module:Class" of yours, see rollout/engine/interface.py
    c.rollout.engine_options = ml_collections.ConfigDict()  # its keyword arguments
    c.rollout.tool_threads = 8  # tool calls at work at once; as many sandboxes as rollouts are open
    c.rollout.save_every = 10  # keep the rollouts of every n-th step; 0: keep none
    c.rollout.grammar = "plain"  # of tool calls: plain | json | llama, see render/calls.py
    c.rollout.max_seconds = 60.0  # that the tool calls of one rollout may run, all together
    c.rollout.max_format_errors = 4  # turns on end without a call that could run, before a rollout is ended
    c.rollout.replay = ""  # a file of saved rollouts to train on, off-policy, in place of sampling

    c.sandbox = ml_collections.ConfigDict()
    c.sandbox.backend = "auto"
    c.sandbox.timeout_seconds = 5.0  # of one tool call
    c.sandbox.output_bytes = 256  # of one tool call; head and tail are kept
    c.sandbox.memory_bytes = 256 << 20
    c.sandbox.disk_bytes = 16 << 20
    c.sandbox.flood_bytes = 64 << 20  # printed by one tool call, before it is ended
    c.sandbox.processes = 32
    c.sandbox.open_files = 256  # of one process
    c.sandbox.cpu_seconds = 60  # of one process
    c.sandbox.setup_seconds = 30.0  # of a task's own setup command
    c.sandbox.score_seconds = 30.0  # of one command that scores

    # Imitation of actions, cross-entropy on every body of an observation, whatever `loss` says of RL.
    c.warm_start = ml_collections.ConfigDict()
    c.warm_start.num_steps = 200  # sft updates on scripted demonstrations before RL; 0: none
    c.warm_start.demonstrations = 2048
    c.warm_start.success_rate = 0.35  # share of demonstrations that do the right thing
    c.warm_start.trajectories = ""  # a file of saved rollouts to imitate in place of scripted demonstrations
    c.warm_start.min_reward = 0.0  # of the rollouts of that file that are imitated
    c.warm_start.batch = 64  # demonstrations an update
    c.warm_start.learning_rate = 2e-3
    c.warm_start.observation_weight = 0.2  # action-only sft leaves observation CE worse than uniform

    c.loss = ml_collections.ConfigDict()
    c.loss.mode = "echo"  # grpo (lambda = 0) | echo | env_only (no policy term, no verifier needed)
    c.loss.mode_changes = ()  # pairs (RL step from 0, mode): from there on that mode
    # The policy term.
    # grpo | dr_grpo | dapo | gspo | cispo | rloo | reinforce, see policy_losses.py; or "module:function" of yours.
    c.loss.policy = "grpo"
    c.loss.policy_options = ml_collections.ConfigDict()  # its hyperparameters, where not its defaults
    # group | group_mean | leave_one_out | reward, see advantages.py; auto: as the policy loss's paper; or yours.
    c.loss.advantage = "auto"
    c.loss.advantage_options = ml_collections.ConfigDict()  # its keyword arguments
    c.loss.policy_normalizer = "auto"  # sequence | token | constant; auto: as the policy loss's paper
    # The importance ratio is clipped to [1 - clip_low, 1 + clip_high]; None: as the policy loss's paper (grpo .2, .2).
    c.loss.clip_low = config_dict.placeholder(float)
    c.loss.clip_high = config_dict.placeholder(float)
    c.loss.dual_clip = 0.0  # bound of the loss of a negative advantage, in advantages (3 is usual); 0: none
    c.loss.old_logprobs = "sampler"  # sampler | recomputed: what the importance ratio is taken to
    c.loss.importance_cap = 2.0  # of truncated importance sampling, for recomputed old log-probs; 0: off
    c.loss.mask_overlong = False  # leave rollouts that a budget ended out of the policy term
    c.loss.kl_weight = 0.0  # of the KL to the policy at the start of RL
    c.loss.kl_estimator = "k3"  # k1 | k2 | k3
    # The observation term.
    c.loss.observation_weight = 0.05  # lambda; it does not transfer between normalisers
    c.loss.observation_schedule = "constant"  # constant | linear (to 0) | step (to 0) | warmup (from 0)
    c.loss.observation_schedule_steps = 0  # RL steps that the schedule takes; 0: num_steps
    c.loss.observation_normalizer = "observation"  # observation | selected | token | constant
    c.loss.class_weights = ml_collections.ConfigDict(
        {"body": 1.0, "boilerplate": 0.0, "truncation": 0.0, "feedback": 0.0, "warning": 0.0}
    )
    c.loss.tool_weights = ml_collections.ConfigDict({"bash": 1.0})  # of what a tool writes; 1 for one not named
    c.loss.observation_filter = ""  # module:function of (trajectory, bool [T]) -> bool [T], narrows what is trained
    c.loss.observation_filter_options = ml_collections.ConfigDict()  # its keyword arguments
    c.loss.observation_clip = 1.0  # stop training a token whose probability is above this (PaW: 0.2); 1: never
    c.loss.top_entropy = 1.0  # train observations after this share of turns, the most uncertain (PaW: 0.75)
    c.loss.reward_adaptive = False  # lambda times (1 - mean reward) of each group (PaW)
    c.loss.dedupe = False  # train an observation that is repeated within a group once
    c.loss.min_valid_calls = 0.0  # env_only: least share of a rollout's attempts at calls that were valid
    c.loss.clean_parse = False  # env_only: leave out rollouts with a turn that was cut off, or a call left open
    # Both terms.
    c.loss.policy_constant = 0  # tokens, the divisor of the normaliser "constant"; 0: rollout.max_tokens
    c.loss.observation_constant = 0
    c.loss.gradient_metrics_every = 0  # RL steps between comparisons of the two terms' gradients; 0: never
    c.loss.token_block = 256  # logits of so many tokens (on TPU better 1024) for so many entries exist at once
    c.loss.vocab_block = 2048
    c.loss.score_all = True  # run the LM head also for what only metrics read; False: metrics are over trained tokens

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.learning_rate = 3e-4
    c.optimizer.updates_per_batch = 1  # passes over each RL batch
    c.optimizer.warmup_steps = 10
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0  # of the global gradient norm

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = 1  # 0: the devices that the others leave
    c.mesh.tensor = 1

    c.pack = ml_collections.ConfigDict()
    c.pack.length = 256  # tokens of a packed row
    c.pack.rows = 8  # rows of a micro-batch, over all devices; 0: one a data shard

    c.eval = ml_collections.ConfigDict()
    c.eval.every = 0  # RL steps between evaluations; 0: only before and after RL
    c.eval.episodes = 256  # held-out tasks, one sampled rollout each
    c.eval.transcripts = 64  # fixed held-out transcripts for eval/observation_ce, written by the tasks' demonstrators
    c.eval.trajectories = ""  # a file of saved rollouts to take as these transcripts, for tasks without demonstrators

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 20  # steps; the last step is always saved
    c.checkpoint.keep = 2

    c.system = ml_collections.ConfigDict()
    c.system.compilation_cache = ""  # folder that keeps compiled programs from run to run; empty: none
    # Of runs with several processes.
    c.system.silence_seconds = 30.0  # without a sign of life, then a process is taken for dead
    c.system.barrier_seconds = 3600.0  # that a process may come later than the others, though alive
    c.system.profile_steps = ()  # (first, last) RL steps, from 1, that the profiler records into workdir/profile
    c.lock()
    families = [section for name, section in c.task.items() if name != "mixture"]
    c.task.unlock()
    for section in families:
        section.lock()
    return c


def load_config_file(path: Path) -> ModuleType:
    """Returns the module of a config file, of which `get_config` makes the config.

    Raises:
      ConfigError: there is no such file.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"there is no config file {path}")
    named.add_to_path(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
