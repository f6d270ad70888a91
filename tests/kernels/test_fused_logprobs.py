"""The fused LM head matches float64 in value and gradients, ragged on every axis, on one device and on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from echo_jax.kernels.fused_logprobs import Axes, fused_logprobs, xla
from echo_jax.system.sharding import make_mesh

VARIANT = pytest.mark.variant
IMPLEMENTATIONS = ("reference", "xla")  # the Pallas kernel needs interpret mode on a CPU, and has separate tests
# Tolerances, relative to the norm of the whole array; absolute for log-probs.
GRADIENT = {"float32": 1e-5, "bfloat16": 5e-3}
LOGPROB = 2e-5  # where |z| <= 20


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs, cotangents and their float64 results."""

    hidden: np.ndarray
    head: np.ndarray  # [V, D]
    targets: np.ndarray
    active: np.ndarray
    temperature: np.ndarray
    cotangents: np.ndarray  # [3, N] of logprob, logsumexp, entropy

    def float64(self, softcap=None):
        """Returns ((logprob, logsumexp, entropy), (d hidden, d head), argmax) by the formulas, with [N, V] arrays."""
        hidden, head, temperature = (x.astype(np.float64) for x in (self.hidden, self.head, self.temperature[:, None]))
        raw = hidden @ head.T
        capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
        logits = capped / temperature
        top = logits.max(-1, keepdims=True)
        logsumexp = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
        p = np.exp(logits - logsumexp[:, None])
        mean = (p * logits).sum(-1, keepdims=True)
        n = np.arange(len(self.targets))
        values = np.stack([logits[n, self.targets] - logsumexp, logsumexp, logsumexp - mean[:, 0]]) * self.active
        g_logprob, g_logsumexp, g_entropy = (self.cotangents.astype(np.float64) * self.active)[:, :, None]
        delta = p * (g_logsumexp - g_logprob - g_entropy * (logits - mean))
        delta[n, self.targets] += g_logprob[:, 0]
        delta = delta / temperature * (1.0 if softcap is None else 1.0 - (capped / softcap) ** 2)
        return values, (delta @ head, delta.T @ hidden), logits.argmax(-1)


def problem(tokens, vocab, dim=24, *, seed=0, scale=1.0, active=1.0, dtype="float32") -> Problem:
    """Random inputs, rounded to `dtype`; the logits' standard deviation is about 4 × scale."""
    rng = np.random.default_rng(seed)
    rounded = lambda x: np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))  # noqa: E731
    return Problem(
        hidden=rounded(scale * rng.normal(size=(tokens, dim))),
        head=rounded(rng.normal(size=(vocab, dim)) / np.sqrt(dim) * 4),
        targets=rng.integers(0, vocab, tokens).astype(np.int32),
        active=rng.random(tokens) < active,
        temperature=rng.uniform(0.5, 1.5, tokens).astype(np.float32),
        cotangents=rng.normal(size=(3, tokens)).astype(np.float32),
    )


@functools.partial(jax.jit, static_argnames=("softcap", "dtype", "options"))
def run(p: dict, *, softcap=None, dtype="float32", **options):
    options = dict(options.pop("options"))

    def scalar(hidden, head):
        scores = fused_logprobs(
            hidden,
            head,
            p["targets"],
            active=p["active"],
            temperature=p["temperature"],
            logit_softcap=softcap,
            entropy=True,
            **options,
        )
        used = jnp.stack(scores[:3])
        return jnp.sum(used * p["cotangents"]), (used, scores.correct)

    hidden, head = p["hidden"].astype(dtype), p["head"].astype(dtype)
    head = head.T if options.get("vocab_axis") else head
    grads, (values, correct) = jax.grad(scalar, (0, 1), has_aux=True)(hidden, head)
    return values, correct, (grads[0], grads[1].T if options.get("vocab_axis") else grads[1])


def check(p: Problem, *, softcap=None, dtype="float32", mesh=None, **options):
    inputs = {name: jnp.asarray(value) for name, value in vars(p).items()}
    if mesh is not None:
        axes = Axes(("data", "fsdp"), "tensor", "fsdp", options.pop("gather_once", False))
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        inputs |= {name: jax.device_put(inputs[name], rows) for name in ("hidden", "targets", "active", "temperature")}
        if not options.get("vocab_axis"):  # else it is transposed first
            inputs["head"] = jax.device_put(inputs["head"], NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
        options |= {"mesh": mesh, "axes": axes}
    values, correct, grads = jax.device_get(run(inputs, softcap=softcap, dtype=dtype, options=tuple(options.items())))
    expected, expected_grads, best = p.float64(softcap)
    np.testing.assert_allclose(values[0], expected[0], rtol=0, atol=LOGPROB)
    np.testing.assert_allclose(values[1:], expected[1:], rtol=1e-5, atol=LOGPROB)
    assert (correct == (p.active & (best == p.targets))).all()
    for found, value in zip(grads, expected_grads, strict=True):
        difference = np.linalg.norm(found.astype(np.float64) - value)
        assert difference <= GRADIENT[dtype] * np.linalg.norm(value) + 1e-12


# (dtype, tokens, vocabulary)
CASES = [
    ("float32", 1, 130),
    ("float32", 37, 130),
    ("float32", 5, 151_936),
    ("bfloat16", 50, 1187),
    *(
        pytest.param(*case, marks=VARIANT)
        for case in (
            ("float32", 64, 200), ("float32", 50, 1187),
            ("bfloat16", 1, 130), ("bfloat16", 37, 130), ("bfloat16", 64, 200), ("bfloat16", 5, 151_936),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tokens", "vocab"), CASES)
def test_values_and_gradients_equal_float64(implementation, tokens, vocab, dtype):
    blocks = dict(token_block=16, vocab_block=48 if vocab < 10_000 else 4096)
    check(problem(tokens, vocab, dtype=dtype), dtype=dtype, implementation=implementation, **blocks)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [5.0, pytest.param(30.0, marks=VARIANT)])
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_softcap_and_both_layouts_of_the_head(implementation, softcap, vocab_axis):
    p = problem(37, 130)
    check(p, softcap=softcap, vocab_axis=vocab_axis, implementation=implementation, token_block=8, vocab_block=100)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("active", [0.0, 0.05, *(pytest.param(active, marks=VARIANT) for active in (0.5, 1.0))])
def test_inactive_tokens_are_zero_and_give_no_gradient(implementation, active):
    check(problem(53, 200, active=active), implementation=implementation, token_block=8, vocab_block=64)


@pytest.mark.parametrize(
    ("token_block", "vocab_block"),
    [(1, 1), (37, 129), *(pytest.param(*blocks, marks=VARIANT) for blocks in ((7, 130), (1000, 1000)))],
)
def test_any_block_size_is_right(token_block, vocab_block):
    check(problem(37, 130), token_block=token_block, vocab_block=vocab_block)


def test_large_logits_are_nearly_as_accurate_as_dense_float32():
    """At ±80 a dense f32 head itself has errors; ours are at most 1.5 times as large, and nothing overflows."""
    p = problem(64, 1187, scale=6.0)
    inputs = {name: jnp.asarray(value) for name, value in vars(p).items()}
    expected, _, _ = p.float64()
    assert np.abs(expected[1]).max() > 60
    errors = {}
    for implementation in IMPLEMENTATIONS:
        blocks = (("token_block", 16), ("vocab_block", 100))
        values, _, grads = run(inputs, options=(("implementation", implementation), *blocks))
        errors[implementation] = np.abs(np.asarray(values[0]) - expected[0]).max()
        assert all(np.isfinite(g).all() for g in grads)
    assert errors["xla"] <= 1.5 * errors["reference"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_clipped_ratio_and_squared_logsumexp_cotangents(implementation):
    """A loss as used in training: PPO's clip on the log-probs, a z-loss on the logsumexp."""
    p = problem(40, 130, active=0.8)
    advantage, (logprob, logsumexp, _) = p.cotangents[0], p.float64()[0]
    old = logprob + np.random.default_rng(1).normal(0, 0.3, 40)

    def loss(hidden, head):
        scores = fused_logprobs(
            hidden, head, p.targets, active=p.active, temperature=p.temperature, token_block=16, vocab_block=48,
            implementation=implementation,
        )  # fmt: skip
        ratio = jnp.exp(scores.logprob - old)
        surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        return jnp.sum(p.active * (1e-2 * jnp.square(scores.logsumexp) - surrogate))

    ratio = np.exp(logprob - old)
    stopped = np.where(advantage > 0, ratio > 1.2, ratio < 0.8)
    assert 0 < stopped.sum() < 40
    cotangents = np.stack([np.where(stopped, 0.0, -ratio * advantage), 2e-2 * logsumexp, np.zeros(40)])
    expected = dataclasses.replace(p, cotangents=cotangents).float64()[1]
    for found, value in zip(jax.jit(jax.grad(loss, (0, 1)))(p.hidden, p.head), expected, strict=True):
        assert np.linalg.norm(found - value) <= GRADIENT["float32"] * np.linalg.norm(value)


@pytest.mark.parametrize(
    ("shape", "gather_once"),
    [
        ((2, 2, 2), False),
        ((2, 2, 2), True),
        ((1, 1, 8), False),
        *(
            pytest.param(shape, gather_once, marks=VARIANT)
            for shape in ((1, 8, 1), (1, 1, 8), (1, 2, 4), (1, 4, 2), (8, 1, 1))
            for gather_once in (False, True)
            if (shape, gather_once) != ((1, 1, 8), False)
        ),
    ],
)
def test_eight_devices_equal_float64_with_uneven_work_per_shard(shape, gather_once):
    """One shard has no active token, one has a few, the others have all."""
    p = problem(64, 1192)  # 149 entries per shard of eight: the block size does not divide it
    p.active[:8] = False
    p.active[8:14] = False
    check(p, mesh=make_mesh(*shape), gather_once=gather_once, token_block=4, vocab_block=100)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"vocab_axis": 1}, "bfloat16"),
        ({"softcap": 20.0}, "float32"),
        pytest.param({"vocab_axis": 1}, "float32", marks=VARIANT),
        pytest.param({"softcap": 20.0}, "bfloat16", marks=VARIANT),
        pytest.param({"vocab_axis": 1, "gather_once": True}, "float32", marks=VARIANT),
        pytest.param({"vocab_axis": 1, "gather_once": True}, "bfloat16", marks=VARIANT),
    ],
)
def test_eight_devices_in_other_layouts_and_dtypes(options, dtype):
    p = problem(64, 1192, active=0.4, dtype=dtype)
    check(p, mesh=make_mesh(2, 2, 2), dtype=dtype, token_block=4, vocab_block=100, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tied_gradients_add_up(implementation):
    p = problem(40, 130, active=0.7)
    sources = p.targets[::-1]
    p = dataclasses.replace(p, hidden=p.head[sources])

    def loss(table):
        scores = fused_logprobs(
            table[sources], table, p.targets, active=p.active, temperature=p.temperature, entropy=True,
            implementation=implementation, token_block=16, vocab_block=48,
        )  # fmt: skip
        return jnp.sum(jnp.stack(scores[:3]) * p.cotangents)

    d_hidden, expected = p.float64()[1]
    np.add.at(expected, sources, d_hidden)
    found = np.asarray(jax.jit(jax.grad(loss))(p.head), np.float64)
    assert np.linalg.norm(found - expected) <= GRADIENT["float32"] * np.linalg.norm(expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_contents_of_inactive_rows_do_not_matter(implementation):
    """They hold nan, logits whose exponential overflows, a target out of range, a temperature of zero."""
    p = problem(21, 130, active=0.5)
    assert p.active.sum() % 16 > 0  # the last block is not full
    idle = np.flatnonzero(~p.active)
    p = dataclasses.replace(p, hidden=p.hidden.copy())
    p.hidden[idle[0]] = np.nan
    p.hidden[idle[1]] = 1e4 * p.head[0]
    p.targets[idle[2]] = 10**6
    p.temperature[idle[3]] = 0.0
    p.cotangents[:, idle[4]] = np.nan
    clean = dataclasses.replace(
        p,
        hidden=np.where(p.active[:, None], p.hidden, 0),
        targets=np.where(p.active, p.targets, 0),
        temperature=np.where(p.active, p.temperature, 1),
        cotangents=np.where(p.active, p.cotangents, 0),
    )
    options = {"implementation": implementation, "token_block": 16, "vocab_block": 48}

    def scalar(hidden, head):
        scores = fused_logprobs(
            hidden, head, p.targets, active=p.active, temperature=p.temperature, entropy=True, **options
        )
        used = jnp.stack(scores[:3])
        return jnp.sum(jnp.where(p.active, used * p.cotangents, 0.0)), used

    grads, values = jax.jit(jax.grad(scalar, (0, 1), has_aux=True))(p.hidden, p.head)
    expected, expected_grads, _ = clean.float64()
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=LOGPROB)
    for found, value in zip(grads, expected_grads, strict=True):
        assert np.linalg.norm(found - value) <= GRADIENT["float32"] * np.linalg.norm(value)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_logits_far_from_zero(shift):
    p = problem(20, 130)
    p = dataclasses.replace(
        p, hidden=np.c_[p.hidden, np.ones(20)], head=np.c_[p.head, np.full(130, shift)], temperature=np.ones(20)
    )
    scores = fused_logprobs(p.hidden, p.head, p.targets, token_block=8, vocab_block=48)
    np.testing.assert_allclose(scores.logprob, p.float64()[0][0], atol=1e-3)  # an f32 near 300 resolves 3e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_omitted_arguments_have_plain_defaults(implementation):
    p = problem(21, 130)
    score = functools.partial(fused_logprobs, p.hidden, p.head, p.targets, implementation=implementation)
    plain = score()
    assert not plain.entropy.any()
    every = score(active=np.ones(21, bool), temperature=np.ones(21, np.float32), entropy=True)
    assert every.entropy.all()
    for default, explicit in zip(plain._replace(entropy=every.entropy), every, strict=True):
        np.testing.assert_array_equal(default, explicit)
    np.testing.assert_array_equal(score(temperature=0.7)[0], score(temperature=np.full(21, 0.7, np.float32))[0])


@pytest.mark.parametrize("share", [0.3, *(pytest.param(share, marks=VARIANT) for share in (0.0, 1.0))])
def test_blocks_without_an_active_row_are_not_computed(share, monkeypatch):
    p = problem(53, 200, active=share)
    computed = []

    def counted(self, t, block):
        jax.debug.callback(lambda t: computed.append(int(t)), t)
        return logits(self, t, block)

    logits = xla.Rows.logits
    monkeypatch.setattr(xla.Rows, "logits", counted)
    loss = lambda h: fused_logprobs(h, p.head, p.targets, active=p.active, token_block=8, vocab_block=64).logprob.sum()  # noqa: E731
    jax.block_until_ready(jax.grad(loss)(jnp.asarray(p.hidden)))
    jax.effects_barrier()
    assert len(computed) == 2 * -(-p.active.sum() // 8) * -(-200 // 64)  # forward and backward


def test_one_program_for_any_active_rows():
    function = jax.jit(lambda active: fused_logprobs(p.hidden, p.head, p.targets, active=active, token_block=8).logprob)
    p = problem(53, 200)
    for share in (0.0, 0.3, 1.0):
        function(np.random.default_rng(0).random(53) < share)
    assert function._cache_size() == 1


def equations(jaxpr):
    """Yields every equation of a jaxpr, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_bfloat16_matmuls_accumulate_in_float32_and_the_head_is_gathered_as_bfloat16():
    mesh = make_mesh(1, 2, 4)
    for gather_once in (False, True):
        axes = Axes(("data", "fsdp"), "tensor", "fsdp", gather_once)

        def loss(hidden, head, axes=axes):
            return fused_logprobs(
                hidden, head, np.zeros(16, np.int32), mesh=mesh, axes=axes, entropy=True
            ).entropy.sum()

        arguments = jnp.zeros((16, 8), jnp.bfloat16), jnp.zeros((64, 8), jnp.float32)
        found = list(equations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arguments).jaxpr))
        dots = [e for e in found if e.primitive.name == "dot_general"]
        assert len(dots) == 4
        assert all(e.outvars[0].aval.dtype == jnp.float32 for e in dots)
        assert all(v.aval.dtype == jnp.bfloat16 for e in dots for v in e.invars)
        gathers = [e for e in found if e.primitive.name == "all_gather"]
        assert gathers
        assert all(e.invars[0].aval.dtype == jnp.bfloat16 for e in gathers)


def test_float32_head_with_bfloat16_hidden_gets_float32_gradients():
    p = problem(40, 130)
    loss = lambda head: jnp.sum(fused_logprobs(p.hidden.astype(jnp.bfloat16), head, p.targets).logprob)  # noqa: E731
    grad = jax.grad(loss)(jnp.asarray(p.head))
    assert grad.dtype == jnp.float32
    assert (np.asarray(grad.astype(jnp.bfloat16).astype(jnp.float32)) != np.asarray(grad)).any()


def test_arguments_that_do_not_fit_are_named():
    p = problem(6, 130)
    with pytest.raises(ValueError, match=r"hidden \[N, D\] \(6, 24\), head \[D, V\] \(130, 24\)"):
        fused_logprobs(p.hidden, p.head, p.targets, vocab_axis=1)
    with pytest.raises(ValueError, match="choose one of reference, xla, pallas_tpu"):
        fused_logprobs(p.hidden, p.head, p.targets, implementation="triton")
    with pytest.raises(ValueError, match=r"'pallas_tpu' takes a head \[V, D\] on one device"):
        fused_logprobs(p.hidden, p.head.T, p.targets, vocab_axis=1, implementation="pallas_tpu")
    for active in (np.ones(9, bool), np.ones((6, 1), bool), np.ones(6, np.float32), np.bool_(True)):
        with pytest.raises(ValueError, match=r"active bool \[N\] .* do not fit"):
            fused_logprobs(p.hidden, p.head, p.targets, active=active)
    with pytest.raises(ValueError, match="do not fit"):
        fused_logprobs(p.hidden[:0], p.head, p.targets[:0])
    with pytest.raises(ValueError, match="vocab_axis = -1"):
        fused_logprobs(p.hidden, p.head, p.targets, vocab_axis=-1)
    with pytest.raises(ValueError, match="token_block = 0"):
        fused_logprobs(p.hidden, p.head, p.targets, token_block=0)
    axes = Axes(("data", "fsdp"), "tensor", "fsdp")
    with pytest.raises(ValueError, match="without a mesh"):
        fused_logprobs(p.hidden, p.head, p.targets, axes=axes)
    for wrong, named in (
        (Axes(("data", "expert"), "tensor"), "expert"),
        (Axes("data", "tensor"), "tokens must be a tuple"),
        (Axes(("data",), "tensor", "fsdp"), "`embed` must be"),
        (Axes(("data", "tensor"), "tensor"), "`vocab` must not be"),
    ):
        with pytest.raises(ValueError, match=named):
            fused_logprobs(p.hidden, p.head, p.targets, mesh=make_mesh(2, 2, 2), axes=wrong)
    with pytest.raises(ValueError, match="23 embedding dimensions are not divisible by 2"):
        fused_logprobs(p.hidden[:, :23], p.head[:, :23], p.targets, mesh=make_mesh(1, 2, 1), axes=axes)
    with pytest.raises(ValueError, match="6 rows of hidden are not divisible by 4"):
        fused_logprobs(p.hidden, p.head, p.targets, mesh=make_mesh(2, 2, 2), axes=axes)
    with pytest.raises(ValueError, match="130 vocabulary entries are not divisible by 8"):
        fused_logprobs(p.hidden, p.head, p.targets, mesh=make_mesh(1, 1, 8), axes=axes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wrong", [-1, 130])
def test_target_outside_the_vocabulary_is_named_or_nan_under_a_trace(implementation, wrong):
    p = problem(6, 130)
    p.targets[3] = wrong
    score = functools.partial(fused_logprobs, implementation=implementation)
    with pytest.raises(ValueError, match=f"target {wrong} is outside the vocabulary of 130"):
        score(p.hidden, p.head, p.targets)
    traced = np.asarray(jax.jit(score)(p.hidden, p.head, p.targets).logprob)
    assert np.isnan(traced).tolist() == [False, False, False, True, False, False]
    idle = np.arange(6) != 3
    assert np.isfinite(score(p.hidden, p.head, p.targets, active=idle).logprob).all()


def test_pallas_kernel_refuses_other_platforms():
    p = problem(6, 130)
    with pytest.raises(ValueError, match="interpret mode"):
        fused_logprobs(p.hidden, p.head, p.targets, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("tokens", "vocab", "dtype", "softcap"),
    [
        (1, 130, "float32", None),
        (37, 130, "float32", 30.0),
        (50, 1187, "bfloat16", 30.0),
        *(
            pytest.param(*shape, dtype, softcap, marks=VARIANT)
            for shape in ((1, 130), (37, 130), (50, 1187))
            for dtype in ("float32", "bfloat16")
            for softcap in (None, 30.0)
            if (*shape, dtype, softcap)
            not in ((1, 130, "float32", None), (37, 130, "float32", 30.0), (50, 1187, "bfloat16", 30.0))
        ),
    ],
)
def test_pallas_kernel_equals_float64_in_interpret_mode(tokens, vocab, dtype, softcap):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        check(
            problem(tokens, vocab, dtype=dtype, active=0.7),
            dtype=dtype,
            softcap=softcap,
            implementation="pallas_tpu",
            token_block=16,
        )


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_pallas_kernel_compiles_for_tpu(topology):
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    placed = jax.sharding.SingleDeviceSharding(device)
    shapes = [((2048, 4096), jnp.bfloat16), ((151_936, 4096), jnp.bfloat16), ((2048,), jnp.int32), ((2048,), bool)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for shape, dtype in shapes]

    def forward(hidden, head, targets, active):
        return fused_logprobs(
            hidden, head, targets, active=active, entropy=True, implementation="pallas_tpu", token_block=512
        )

    assert "tpu_custom_call" in jax.jit(forward).lower(*arguments).compile().as_text()
