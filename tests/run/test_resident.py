"""Laws of what is resident, what fits, what would, and how fast sampling can be: by hand, without a compiler."""

import dataclasses

import jax
import pytest

from configs import qwen3_8b, qwen3_30b_a3b
from echo_jax.learner.learner import describe_model
from echo_jax.models.flops import decode_bytes
from echo_jax.rollout.engine.layout import PoolTooSmall, plan_layout
from echo_jax.run.resident import CHIPS, GIB, HostEngine, Memory, advice, decode_ceiling, resident, table, why_not
from echo_jax.system.sharding import make_mesh

QWEN3_8B = describe_model(qwen3_8b.get_config(), 151_936)
WEIGHTS = 2 * 8_190_735_360  # bf16
TOKEN = 144 * 1024  # bytes of the keys and values of a token, in all layers


def engine(tensor=4, replicas=1, **fields):
    fields = {"weights": WEIGHTS // tensor, "page": 64, "max_tokens": 16_384} | fields
    return HostEngine(model=QWEN3_8B, tensor=tensor, replicas=replicas, **fields)


def test_transfer_holds_what_was_brought_before_and_sampling_the_largest_program():
    frozen, adapters = Memory(argument=7, temporary=20, output=10), Memory(argument=1, temporary=5, output=2)
    assert resident(100, [frozen, adapters], [])["transfer"] == 100 + 30
    assert resident(100, [adapters, frozen], [])["transfer"] == 100 + 2 + 30
    # The first lacks a weight that it does not use, which lies there all the same.
    prefill, decode = Memory(argument=40, temporary=9, output=0), Memory(argument=50, temporary=3, output=1)
    assert resident(100, [], [prefill, decode], least=30)["sampling"] == 100 + 50 + 9
    assert resident(100, [], [], least=30)["sampling"] == 130


def test_sessions_of_a_pool_by_hand():
    left = 10 * GIB
    tokens = int(0.9 * left) // (64 * TOKEN // 4) * 64  # whole pages on one of four devices
    assert engine().longest_in(left) == tokens
    assert engine().sessions_in(left) == tokens // 16_384 == 16
    assert engine(tensor=1, replicas=4).sessions_in(left) == 4 * (9 * GIB // (16_384 * TOKEN)) == 16
    assert engine().sessions_in(-GIB) == engine().longest_in(-GIB) == 0


@pytest.mark.parametrize("gib", [0.3, 0.62, 0.63, 2.0, 9.0])
def test_it_holds_as_many_sessions_as_the_engine_plans(gib):
    mesh, left = make_mesh(1, 1, 4, jax.devices()), int(gib * GIB)
    own = dataclasses.replace(engine(), page=16)  # that of a CPU
    sizes = {"sessions": 1_000, "max_tokens": 16_384, "free_bytes": left}
    try:
        planned = plan_layout(QWEN3_8B, mesh, **sizes).sessions
    except PoolTooSmall:
        planned = 0
    assert own.sessions_in(left) == planned


def test_advice_names_what_alone_would_hold_one_session():
    """On v5e, tensor 2: half of the weights, 7.63 GiB, and a session's 1.125 GiB, beside 8 GiB of state."""
    own, usable, state = engine(tensor=2), 15.75 * GIB, 7.6 * GIB
    left = usable - state - own.weights
    assert 0 < left < GIB
    assert own.sessions_in(left) == 0
    found = advice(own, 64, usable, state)
    assert found == {"max_tokens": own.longest_in(left), "tensor": 4, "chips": 128}
    shorter = dataclasses.replace(own, max_tokens=found["max_tokens"])
    assert shorter.sessions_in(left) == 1
    assert dataclasses.replace(own, max_tokens=found["max_tokens"] + 1).sessions_in(left) == 0
    assert advice(own, 64, usable, state - 2 * GIB) == {}


def test_advice_is_silent_where_nothing_would_do():
    """On one chip the weights of 8B leave no room at any context, and no number of chips makes them smaller; two
    devices would do."""
    assert advice(engine(tensor=1), 64, 15.75 * GIB, 2 * GIB) == {"tensor": 2}
    assert advice(engine(tensor=8), 64, 15.75 * GIB, 15 * GIB)["chips"] == 128
    assert "tensor" not in advice(engine(tensor=8), 64, 15.75 * GIB, 15 * GIB)  # there are eight KV heads


def test_the_bound_of_the_speed_by_hand():
    multiplied = 8_190_735_360 - 151_936 * 4096 - (2 * 36 + 1) * 4096 - 36 * 2 * 128  # without embedding and norms
    assert decode_bytes(QWEN3_8B, 0) == 2 * multiplied
    assert decode_bytes(QWEN3_8B, 1000) == 2 * multiplied + 1000 * TOKEN
    found = decode_ceiling(engine(), CHIPS["v6e"], rows=256, live_tokens=1_024)
    seconds = (2 * multiplied + 256 * 1_024 * TOKEN) / 4 / 1640e9
    assert found["tokens_per_second_per_chip"] == pytest.approx(256 / 4 / seconds, rel=1e-3)
    both = decode_ceiling(engine(tensor=2, replicas=2), CHIPS["v6e"], rows=128, live_tokens=1_024)
    assert both["rows"] == 256
    assert both["tokens_per_second_per_chip"] < found["tokens_per_second_per_chip"]  # each replica reads the weights
    half = CHIPS["tpu7x"]
    whole = dataclasses.replace(half, per_chip=1, bandwidth=2 * half.bandwidth)
    speeds = [decode_ceiling(engine(), chip, 64, 512)["tokens_per_second_per_chip"] for chip in (half, whole)]
    assert speeds[0] == pytest.approx(speeds[1])  # two halves with half the bandwidth


def test_of_experts_a_decode_step_may_read_those_of_one_token():
    model = describe_model(qwen3_30b_a3b.get_config(), 151_936)
    attention, router, expert = 2048 * (2 * 32 + 2 * 4) * 128, 2048 * 128, 3 * 2048 * 768
    assert decode_bytes(model, 0) == 2 * (48 * (attention + router + 8 * expert) + 151_936 * 2048)


def result(**fields):
    sampler = {"replicas": 1, "tensor": 4, "pool_tokens": 65_536, "sessions": 4, "sessions_at_most": 12}
    sampler |= {"sessions_a_step": 4, "tokens_per_second_per_chip": 123.4}
    plain = {"config": "a", "topology": "v5e:4x4", "mesh": {"data": 1, "fsdp": 16, "tensor": 1}, "rows": 16}
    plain |= {"tokens_a_row": 64, "usable_bytes": 16 * GIB, "fits": True, "compile_seconds": 1.0, "programs": {}}
    plain |= {"resident": {"update": 8 * GIB, "transfer": 4 * GIB, "sampling": 10 * GIB}}
    return plain | {"sampler": sampler | fields.pop("sampler", {}), "would_hold_a_session": {}} | fields


def test_the_table_says_what_fits_and_why_not():
    narrow = result(fits=False, sampler={"sessions": 0}, would_hold_a_session={"max_tokens": 640, "tensor": 8})
    refused = result(fits=False, resident={"transfer": 1, "sampling": 17 * GIB})
    refused["programs"] = {"train_step": {"compiler": "out of memory."}}
    header, line, good, *_ = lines = list(table([result(), narrow, refused]))
    assert {row.count("|") for row in (header, line, good)} == {16}
    assert "| 8.00 | 4.00 | 10.00 | 16.00 | yes | 1 × 4 | 65536 | 12, 4 | 123 |" in good
    assert list(why_not(result())) == []
    (text,) = [row for row in lines if "640" in row]
    assert "at most 640 tokens or the model over 8 chips (it has 4)" in text
    assert "a does not fit on v5e:4x4: train_step: out of memory; sampling needs 17.00 GiB of 16.00." in lines[-1]
