"""Laws of the action-shuffled control; tests/run/test_lifecycle.py tests other scores on a real run."""

import numpy as np
from synthetic import varied

from echo_jax.learner.scoring import shuffle_actions
from echo_jax.objective.selection import turn_of
from echo_jax.roles import Role


def observed(t):
    return t.ids[np.isin(t.role, Role.OBSERVATION)].tolist()


def actions(t, turn):
    return tuple(t.ids[(turn_of(t) == turn) & (t.role == Role.ACTION)].tolist())


def test_shuffling_changes_the_actions_and_nothing_else():
    chosen = varied()
    shuffled = shuffle_actions(chosen, 0)
    assert [observed(t) for t in shuffled] == [observed(t) for t in chosen]
    for own, other in zip(chosen, shuffled, strict=True):
        assert own.ids[own.role != Role.ACTION].tolist() == other.ids[other.role != Role.ACTION].tolist()
        assert turn_of(own)[-1] == turn_of(other)[-1]
    moved = 0
    for k in range(1, max(turn_of(t)[-1] for t in chosen) + 1):
        before, after = ([actions(t, k) for t in ts if turn_of(t)[-1] >= k] for ts in (chosen, shuffled))
        assert sorted(before) == sorted(after)
        moved += sum(a != b for a, b in zip(before, after, strict=True))
        if len(before) > 1:
            assert before != after
    assert moved > 10
