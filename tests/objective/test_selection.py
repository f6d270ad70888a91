"""Laws of choosing the observation tokens to train."""

import numpy as np
import pytest
from synthetic import make_trajectory, varied

from echo_jax.objective.selection import Selection, SelectionError, find_filter, select, turn_of
from echo_jax.roles import Role

P, A, O, N, F = Role.PROMPT, Role.ACTION, Role.OBSERVATION, Role.BOILERPLATE, Role.FEEDBACK  # noqa: E741


def choose(trajectories, kept=None, **rules):
    kept = np.ones(len(trajectories), bool) if kept is None else np.asarray(kept)
    return select(trajectories, Selection(**rules), kept)


def only(t, **rules):
    return choose([t], **rules)[0].tolist()


def test_default_selects_only_bodies():
    for t, weight in zip(varied(), choose(varied()), strict=True):
        np.testing.assert_array_equal(weight, (t.role == O).astype(np.float32))


def test_class_and_tool_weights_multiply():
    t = make_trajectory([0] * 6, [P, A, O, N, F, O], tool=[0, 0, 1, 1, 0, 0])
    weights = {"body": 1.0, "boilerplate": 0.5, "feedback": 0.25}
    assert only(t, class_weights=weights) == [0, 0, 1, 0.5, 0.25, 1]
    assert only(t, class_weights=weights, tool_weights={"bash": 0.5}) == [0, 0, 0.5, 0.25, 0.25, 1]
    assert only(t, tool_weights={"bash": 0.0}) == [0, 0, 0, 0, 0, 1]


def test_turn_is_an_action_and_the_tokens_after_it():
    assert turn_of(make_trajectory([0] * 8, [P, P, A, A, O, A, O, O])).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert turn_of(make_trajectory([0] * 3, [A, O, A])).tolist() == [1, 1, 2]


def keep_even_ids(trajectory, mask):
    return mask & (trajectory.ids % 2 == 0)


def test_filter_narrows_the_mask():
    t = make_trajectory([0, 1, 2, 3, 4], [P, O, O, O, A])
    assert only(t, keep=keep_even_ids) == [0, 0, 1, 0, 0]
    assert find_filter(f"{__name__}:keep_even_ids", {}).__name__ == "keep_even_ids"
    assert find_filter("", {}) is None


@pytest.mark.parametrize(
    ("keep", "complaint"),
    [
        (lambda t, mask: mask[1:], r"bool \(4,\).*must be bool \(5,\)"),
        (lambda t, mask: mask.astype(float), r"float64 \(5,\)"),
        (lambda t, mask: mask.tolist(), "list"),
        (lambda t, mask: np.ones_like(mask), "tokens outside its mask"),
    ],
)
def test_filter_that_widens_the_mask_or_returns_no_mask_is_an_error(keep, complaint):
    with pytest.raises(SelectionError, match=complaint):
        only(make_trajectory([0, 1, 2, 3, 4], [P, O, O, O, A]), keep=keep)


def test_observations_after_the_most_uncertain_turns_are_kept():
    """Four turns over two trajectories, mean entropies 1, 4, 2, 3: three quarters are all but the first."""
    roles, entropy = [P, A, A, O, A, O], [0, 0.5, 1.5, 0, 4.0, 0]
    one = make_trajectory([0] * 6, roles, entropy=entropy)
    two = make_trajectory([0] * 6, roles, entropy=[0, 2.5, 1.5, 0, 3.0, 0], rollout=1)
    kept = [w.tolist() for w in choose([one, two], top_entropy=0.75)]
    assert kept == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 1]]
    kept = [w.tolist() for w in choose([one, two], top_entropy=0.25)]
    assert kept == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]


def test_missing_entropies_are_an_error():
    script = make_trajectory([0] * 3, [P, A, O], entropy=[0, np.nan, 0], task="lookup/train/7")
    with pytest.raises(SelectionError, match="lookup/train/7 has none"):
        only(script, top_entropy=0.75)
    assert only(script) == [0, 0, 1]


def test_repeated_observation_is_trained_once_in_its_group():
    roles = [P, A, O, O, A, O, O]
    one = make_trajectory([9, 1, 5, 6, 1, 5, 6], roles)  # repeats its observation
    two = make_trajectory([9, 2, 5, 6, 2, 5, 7], roles, rollout=1)  # repeats the first, then another observation
    other = make_trajectory([9, 2, 5, 6, 2, 5, 7], roles, rollout=2, group=1)
    kept = [w.tolist() for w in choose([one, two, other], dedupe=True)]
    assert kept == [[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1, 1]]


def test_repeated_observation_is_trained_once_in_any_order_of_rollouts():
    """An earlier version forgot the first when it met a repetition, and trained neither."""
    one = make_trajectory([9, 1, 5, 6], [P, A, O, O])
    two = make_trajectory([9, 2, 5, 6], [P, A, O, O], rollout=1)
    assert [w.tolist() for w in choose([two, one], dedupe=True)] == [[0] * 4, [0, 0, 1, 1]]
    assert [w.tolist() for w in choose([one, one], dedupe=True)] == [[0, 0, 1, 1], [0] * 4]  # as in a replay


def test_deduping_ignores_repetitions_in_the_shared_prefix_of_a_branch():
    stem = make_trajectory([9, 1, 5, 6], [P, A, O, O])
    branch = make_trajectory([9, 1, 5, 6, 1, 7], [P, A, O, O, A, O], shared=4)
    kept = [w.tolist() for w in choose([branch, stem], dedupe=True)]
    assert kept[1] == [0, 0, 1, 1]
    assert kept[0][4:] == [0, 1]


def test_excluded_rollouts_do_not_affect_the_others():
    one = make_trajectory([9, 1, 5, 6], [P, A, O, O], entropy=[0, 4.0, 0, 0])
    two = make_trajectory([9, 2, 5, 6], [P, A, O, O], entropy=[0, 1.0, 0, 0], rollout=1)
    assert [w.tolist() for w in choose([one, two], [False, True], dedupe=True)] == [[0] * 4, [0, 0, 1, 1]]
    assert [w.tolist() for w in choose([one, two], [False, True], top_entropy=0.5)] == [[0] * 4, [0, 0, 1, 1]]
    assert [w.tolist() for w in choose([one, two], top_entropy=0.5)] == [[0, 0, 1, 1], [0] * 4]
