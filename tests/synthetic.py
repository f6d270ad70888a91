"""Random trajectories and tiny models for tests of the learning side; no tools, no sampling."""

import dataclasses
import functools

import jax
import numpy as np

from echo_jax.learner.step import loss_and_grads
from echo_jax.models.transformer import ModelConfig, abstract_params, init_params
from echo_jax.objective.batch import to_mesh
from echo_jax.objective.loss import HeadOptions, LossOptions
from echo_jax.objective.packing import capacity, pack
from echo_jax.objective.weights import Objective, weigh_each
from echo_jax.roles import ENVIRONMENT_ROLES, Role
from echo_jax.rollout.trajectory import DTYPES, Attempt, Trajectory
from echo_jax.system.sharding import make_mesh
from echo_jax.tools import TOOLS

TINY = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    compute_dtype="float32",
    remat="full",
    attention="xla",
)
SPARSE = dataclasses.replace(TINY, qk_norm=True, num_experts=6, experts_per_token=2)
MESH = make_mesh(1, 1, 1)
GRAPHDEF, ABSTRACT_PARAMS = abstract_params(TINY, MESH)
HEAD = HeadOptions(token_block=16, vocab_block=24)  # blocks that divide neither the tokens nor the vocabulary
OPTIONS = LossOptions(policy="grpo", head=HEAD, policy_options=(("clip_high", 0.28),), tools=("bash", "python"))
ECHO = Objective(observation_weight=0.05, temperature=0.8)
# Without USER and SYSTEM, which came later: the random draws, and with them the golden numbers, stay.
ROLES = (Role.SCAFFOLD, Role.ACTION, *ENVIRONMENT_ROLES[:5])


def trajectory(
    rng: np.random.Generator, length: int, *, group: int = 0, rollout: int = 0, reward: float = 0.0
) -> Trajectory:
    """Returns a prompt of three tokens, then random roles; log-probs near those of an untrained model."""
    role = np.concatenate([[Role.SCAFFOLD, Role.PROMPT, Role.PROMPT], rng.choice(ROLES, length - 3)]).astype(np.int8)
    sampled = role == Role.ACTION
    return make_trajectory(
        rng.integers(0, TINY.vocab_size, length),
        role,
        tool=np.isin(role, (Role.OBSERVATION, Role.BOILERPLATE, Role.TRUNCATION)),
        logprob=np.where(sampled, rng.normal(-4.2, 0.3, length), 0.0),
        entropy=np.where(sampled, rng.uniform(0.0, 4.0, length), 0.0),
        group=group,
        rollout=rollout,
        reward=reward,
    )


def make_trajectory(ids, role=None, **fields) -> Trajectory:
    """Returns a trajectory of these tokens, with defaults for all other fields."""
    role = np.full(len(ids), Role.PROMPT) if role is None else role
    arrays = {"ids": ids, "role": role} | {name: np.zeros(len(ids)) for name in ("tool", "logprob", "entropy")}
    plain = dict(
        task="family/train/0", group=0, rollout=0, shared=0, reward=0.0, scored=True, outcome="submitted", turns=1,
        attempts=(), limits_by="", tools=tuple(TOOLS),
    )  # fmt: skip
    arrays["version"] = np.where(np.asarray(role) == Role.ACTION, fields.pop("policy_version", 0), -1)
    for status, count in fields.pop("calls", {}).items():
        plain["attempts"] += (Attempt(1, "bash", status),) * count
    fields = arrays | plain | fields
    return Trajectory(**{n: np.asarray(x, DTYPES[n]) if n in DTYPES else x for n, x in fields.items()})


def trajectories(seed: int, count: int = 7, longest: int = 30) -> list[Trajectory]:
    rng = np.random.default_rng(seed)
    return [
        trajectory(rng, int(rng.integers(4, longest + 1)), group=i % 3, rollout=i, reward=float(rng.integers(2)))
        for i in range(count)
    ]


def varied(seed: int = 0) -> list[Trajectory]:
    """Returns every case that an objective must handle; a clip of 0.2 affects some of the log-probs.

    Rollouts with no, one and many observations; without actions; ended by a budget; an all-fail group; one that was not
    scored; and rollout 8, in three branches that share its first 9 and 12 tokens.
    """
    rng = np.random.default_rng(seed)
    rewards = [1.0, 0.0, 0.5, 1.0, 0.0, 0.3, 0.0, 0.0, 1.0]
    made = [trajectory(rng, 12 + 2 * i, group=i // 3, rollout=i, reward=r) for i, r in enumerate(rewards)]
    environment = np.isin(made[0].role, ENVIRONMENT_ROLES)
    made[0] = dataclasses.replace(made[0], role=np.where(environment, Role.PROMPT, made[0].role).astype(np.int8))
    one = np.where(np.isin(made[1].role, ENVIRONMENT_ROLES), Role.ACTION, made[1].role).astype(np.int8)
    one[7] = Role.OBSERVATION
    made[1] = dataclasses.replace(made[1], role=one, outcome="max_tokens")
    idle = np.where(made[2].role == Role.ACTION, Role.OBSERVATION, made[2].role).astype(np.int8)
    made[2] = dataclasses.replace(made[2], role=idle)
    made[3] = dataclasses.replace(made[3], outcome="max_turns")
    made[5] = dataclasses.replace(made[5], scored=False, outcome="infra")
    made[6:8] = [dataclasses.replace(t, group=9, reward=0.0) for t in made[6:8]]  # all fail
    stem = made[8] = dataclasses.replace(made[8], group=0)
    for shared in (9, 12):
        tail = trajectory(rng, 20, group=0, rollout=8, reward=1.0)
        arrays = {n: np.concatenate([getattr(stem, n)[:shared], getattr(tail, n)[3:]]) for n in DTYPES}
        made.append(dataclasses.replace(tail, shared=shared, **arrays))
    return made


def columns(fields) -> dict[str, np.ndarray]:
    """Returns the fields of a `Batch` or of `TokenWeights`, each term's denominator as "denominators.TERM"."""
    found = dict(vars(fields))
    denominators = found.pop("denominators")
    return found | {f"denominators.{term}": parts for term, parts in denominators.items()}


def gradient(
    chosen,
    advantages,
    *,
    objective=ECHO,
    options=OPTIONS,
    length=64,
    rows=2,
    mesh=None,
    config=TINY,
    old=None,
    reference=None,
):
    """Returns (metric sums, gradients, parameters) of one update over packed trajectories.

    `objective`: one, or those of the environments as in `weigh_each`.
    `old` and `reference`: log-probs [T] of each trajectory under the old policy of the ratio and the KL's reference.
    """
    mesh = mesh or MESH
    _, params = initial(config, mesh)
    weights = weigh_each(chosen, advantages, objective if isinstance(objective, dict) else {"": objective})
    most = max(len(t.ids) for t in chosen)
    micro_batches = capacity(len(chosen), most, rows=rows, length=length)

    def packed(logprobs):
        with_them = [dataclasses.replace(t, logprob=own) for t, own in zip(chosen, logprobs, strict=True)]
        return pack(with_them, weights, length=length, rows=rows, micro_batches=micro_batches, tools=options.tools)

    sampled = packed([t.logprob for t in chosen])
    batch = sampled.batch
    if old is not None:
        batch = batch.replace(old_logprob=packed(old).batch.sampler_logprob)
    if reference is not None:
        batch = batch.replace(reference_logprob=packed(reference).batch.sampler_logprob)
    if mesh.size > 1:
        options = dataclasses.replace(options, head=dataclasses.replace(options.head, mesh=mesh))
    sums, grads = _jitted(config, mesh, options)(params, to_mesh(batch, mesh))
    return jax.device_get(sums), jax.device_get(grads), jax.device_get(params)


@functools.cache
def initial(config, mesh):
    """Returns `init_params`, cached per configuration."""
    return init_params(config, 0, mesh)


@functools.cache
def _jitted(config, mesh, options):
    """Returns one function per configuration, so that tests share compilations."""
    graphdef, _ = abstract_params(config, mesh)
    return jax.jit(lambda params, batch: loss_and_grads(graphdef, params, {}, batch, mesh, options))


def relative_difference(a, b) -> float:
    """Returns |a - b| / |b| over whole pytrees."""
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
