"""Laws of saved rollouts: they are loaded as they were saved, and an unusable file is reported."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import make_trajectory

from echo_jax.roles import Role
from echo_jax.rollout import trajectory as trajectory_lib
from echo_jax.rollout.trajectory import DTYPES, Attempt, TrajectoryError, load, save

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
VOCAB = 1280


def make(ids=(1, 2, 3), role=(2, 1, 3), logprob=(0.0, 0.0, -0.1), **fields):
    defaults = dict(task="lookup/train/0", policy_version=4, reward=1.0, calls={"ok": 1})
    return make_trajectory(ids, role, logprob=logprob, **(defaults | fields))


def same(a, b):
    """Returns whether two trajectories are equal bit for bit, types included."""
    arrays = DTYPES
    return vars(a).keys() == vars(b).keys() and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() if name in arrays else x == y
        for name, x, y in ((name, getattr(a, name), getattr(b, name)) for name in vars(a))
    )


def rewrite(path, edit):
    """Replaces the lines of a saved file by edit(lines)."""
    with gzip.open(path, "rt") as file:
        lines = file.read().splitlines()
    with gzip.open(path, "wt") as file:
        file.write("".join(line + "\n" for line in edit(lines)))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "rollouts" / "step_000001.jsonl.gz"
    save(path, [make(), make(task="rooms/train/1", group=1)], vocab_size=VOCAB)
    return path


texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.binary(max_size=4).map(
    lambda data: data.decode("utf-8", "surrogateescape")
)
log_probabilities = st.floats(max_value=0.0, width=32, allow_nan=False) | st.sampled_from(
    [-0.0, -1e-45, -3.4e38, -np.inf]
)


attempts = st.builds(
    Attempt,
    st.integers(0, 99),
    texts,
    texts,
    st.none() | st.integers(0, 255),
    texts,
    st.integers(0, 2**60),
)


@st.composite
def trajectories(draw):
    length = draw(st.integers(0, 12))
    column = lambda elements: draw(st.lists(elements, min_size=length, max_size=length))  # noqa: E731
    return make(
        column(st.integers(0, VOCAB - 1)),
        column(st.sampled_from([*map(int, Role)])),
        column(log_probabilities),
        tool=column(st.integers(0, 1)),
        entropy=column(st.floats(0, 99, width=32) | st.just(np.nan)),
        rollout=draw(st.integers(0, 2**40)),
        shared=draw(st.integers(0, length)),
        task=draw(texts),
        group=draw(st.integers(0, 2**40)),
        policy_version=draw(st.integers(-1, 2**31)),
        reward=draw(st.floats(0, 1)),
        scored=draw(st.booleans()),
        outcome=draw(texts),
        turns=draw(st.integers(0, 99)),
        attempts=tuple(draw(st.lists(attempts, max_size=3))),
        limits_by=draw(texts),
    )


@PATIENT
@given(st.lists(trajectories(), max_size=3))
def test_load_returns_what_was_saved_bit_for_bit(tmp_path_factory, originals):
    path = tmp_path_factory.mktemp("rollouts") / "x.jsonl.gz"
    save(path, originals, vocab_size=VOCAB)
    loaded = load(path, vocab_size=VOCAB)
    assert len(loaded) == len(originals)
    assert all(map(same, loaded, originals))


def test_truncated_file_is_refused(saved):
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        with pytest.raises(TrajectoryError, match="step_000001.jsonl.gz"):
            load(saved, vocab_size=VOCAB)


def test_file_with_a_flipped_byte_is_refused_or_unchanged(saved):
    """Some bytes of gzip's header do not matter here (time, name); every other change must be detected."""
    originals = load(saved, vocab_size=VOCAB)
    whole = saved.read_bytes()
    refused = 0
    for at in range(len(whole)):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            assert all(map(same, load(saved, vocab_size=VOCAB), originals))
        except TrajectoryError:
            refused += 1
    assert refused > 0.8 * len(whole)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [],
        lambda lines: lines[1:],
        lambda lines: ["[]", *lines[1:]],
        lambda lines: ["null", *lines[1:]],
        lambda lines: ['{"format": "echo_jax.trajectories/3"}', *lines[1:]],
        lambda lines: [lines[0].replace("trajectories/3", "trajectories/2"), *lines[1:]],
        lambda lines: [*lines[:-1], lines[-1].replace('"attempts": [[1, ', '"attempts": [[1, 1, 1, 1, 1, 1, ')],
        lambda lines: [lines[0].replace('"ACTION": 3', '"ACTION": 4'), *lines[1:]],
        lambda lines: [*lines, "not JSON"],
        lambda lines: [*lines, "[]"],
        lambda lines: [*lines, "7"],
        lambda lines: [*lines, "{}"],
        lambda lines: [*lines[:-1], lines[-1].replace('"reward"', '"prize"')],
        lambda lines: [*lines[:-1], lines[-1].replace('"ids": [1, ', '"ids": [')],
        lambda lines: [*lines[:-1], lines[-1].replace('"ids": [1, ', '"ids": ["a", ')],
        lambda lines: [*lines[:-1], lines[-1].replace('"ids": [1, ', '"ids": [99999999999, ')],
        lambda lines: [*lines[:-1], lines[-1].replace('"ids": [1, ', '"ids": [1280, ')],
        lambda lines: [*lines[:-1], lines[-1].replace('"ids": [1, ', '"ids": [-1, ')],
        lambda lines: [*lines[:-1], lines[-1].replace('"role": [2, ', '"role": [11, ')],
        lambda lines: [*lines[:-1], lines[-1].replace('"tool": [0, ', '"tool": [99, ')],
        lambda lines: [*lines[:-1], lines[-1].replace('"reward": 1.0', '"reward": "x"')],
        lambda lines: [*lines[:-1], lines[-1].replace('"reward": 1.0', '"reward": NaN')],
        lambda lines: [*lines[:-1], lines[-1].replace('"shared": 0', '"shared": -1')],
        lambda lines: [*lines[:-1], lines[-1].replace('"role": [2, ', '"role": [300, ')],
    ],
    ids=range(24),
)
def test_file_of_another_format_is_refused(saved, edit):
    before = saved.read_bytes()
    rewrite(saved, edit)
    assert gzip.decompress(saved.read_bytes()) != gzip.decompress(before)
    with pytest.raises(TrajectoryError, match="step_000001.jsonl.gz"):
        load(saved, vocab_size=VOCAB)


def test_other_vocabulary_is_refused_with_both_sizes(saved):
    with pytest.raises(TrajectoryError, match=r"1280.*32000"):
        load(saved, vocab_size=32000)


def test_file_of_a_padded_embedding_is_read_if_allowed(saved):
    found = load(saved, vocab_size=VOCAB - 80, padded=True)
    assert len(found) == len(load(saved, vocab_size=VOCAB))
    with pytest.raises(TrajectoryError, match=f"{VOCAB}.*{VOCAB - 80}"):
        load(saved, vocab_size=VOCAB - 80)
    with pytest.raises(TrajectoryError, match=f"{VOCAB}.*{VOCAB + 1}"):
        load(saved, vocab_size=VOCAB + 1, padded=True)


def test_missing_or_uncompressed_file_is_refused(tmp_path):
    for path in (tmp_path / "none.jsonl.gz", tmp_path):
        with pytest.raises(TrajectoryError, match=str(path)):
            load(path, vocab_size=VOCAB)
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps({"format": trajectory_lib.FORMAT, "vocab_size": VOCAB}) + "\n")
    with pytest.raises(TrajectoryError):
        load(plain, vocab_size=VOCAB)


def test_failed_save_leaves_the_old_file(saved):
    before = saved.read_bytes()

    def crash():
        yield make()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(saved, crash(), vocab_size=VOCAB)
    with pytest.raises(TypeError):
        save(saved, [make(), make(outcome=object())], vocab_size=VOCAB)
    assert saved.read_bytes() == before
    save(saved, [], vocab_size=VOCAB)
    assert load(saved, vocab_size=VOCAB) == []
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_lengths_must_agree():
    with pytest.raises(TrajectoryError, match="ids 3, role 2, tool 3"):
        make(role=(1, 2))


def test_count_omits_the_first_token():
    trajectory = make(ids=range(5), role=(3, 3, 4, 3, 5), logprob=[0.0] * 5)
    assert trajectory.count(Role.ACTION) == 2
    assert trajectory.count(Role.ACTION, Role.BOILERPLATE) == 3
    assert trajectory.count(Role.FEEDBACK) == 0
    assert make((), (), ()).count(Role.ACTION) == 0


def test_trajectories_of_runs_with_different_tools_share_a_file(tmp_path):
    one = make(tool=(0, 0, 1), tools=("bash", "search"))
    two = make(tool=(0, 1, 2), tools=("search", "count"))
    save(tmp_path / "x.jsonl.gz", [one, two], vocab_size=VOCAB)
    found = load(tmp_path / "x.jsonl.gz", vocab_size=VOCAB)
    named = [[t.tools[i - 1] if i else "" for i in t.tool] for t in found]
    assert named == [["", "", "bash"], ["", "search", "count"]]
    assert trajectory_lib.renumbered(two, ("count", "bash")).tolist() == [0, 0, 1]


def test_solved_means_the_highest_reward_of_the_task():
    assert make(reward=1.0).solved
    assert not make(reward=1.0, reward_range=(-1.0, 2.0)).solved
    assert make(reward=2.0, reward_range=(-1.0, 2.0)).solved


@pytest.mark.parametrize("damaged", ['"ab"', "[0, 1, 2]", "[1, 1]", "[1, 0]", "3", "null"])
def test_damaged_reward_range_is_refused(saved, damaged):
    rewrite(
        saved, lambda lines: [lines[0], lines[1].replace('"reward_range": [0.0, 1.0]', f'"reward_range": {damaged}')]
    )
    with pytest.raises(TrajectoryError, match="step_000001.jsonl.gz"):
        load(saved, vocab_size=VOCAB)


def test_role_that_this_version_lacks_is_refused_only_if_a_token_has_it(saved):
    rewrite(saved, lambda lines: [lines[0].replace('"SYSTEM": 10', '"SYSTEM": 10, "LATER": 11'), *lines[1:]])
    assert len(load(saved, vocab_size=VOCAB)) == 2
    rewrite(saved, lambda lines: [lines[0], lines[1].replace('"role": [2, ', '"role": [11, ')])
    with pytest.raises(TrajectoryError, match="roles LATER, which this version lacks"):
        load(saved, vocab_size=VOCAB)
