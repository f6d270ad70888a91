"""Groups without variance are replaced: an account that adds up, and runs that go on bit for bit wherever they stop.

Also what an environment has of its own when its rollouts are sampled: temperature and group size.
"""

import collections
import contextlib
import dataclasses
import re
import types
import zlib
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import comparable
from synthetic import make_trajectory

from configs import tiny
from echo_jax.config import FIRST_SPARE, TASKS_PER_SEED, ConfigError, default_config
from echo_jax.kernels.fused_logprobs import fused_logprobs
from echo_jax.learner import parameters
from echo_jax.models.transformer import bind
from echo_jax.roles import Role
from echo_jax.rollout import trajectory as trajectory_lib
from echo_jax.rollout.collector import Collector, Job, _Collection
from echo_jax.run import lifecycle
from echo_jax.run.build import build
from echo_jax.run.evaluator import FIRST_EVAL_ROLLOUT
from echo_jax.run.refill import FIRST_REFILL_ROLLOUT, Numbers, check_lengths, refill_jobs, without_variance
from echo_jax.run.trainer import Trainer
from echo_jax.system.metrics import read_metrics
from echo_jax.system.peers import Peers
from echo_jax.system.user_code import UserCodeError
from echo_jax.tasks.task import Task

# -- numbers -----------------------------------------------------------------------------------------------------------


@given(tries=st.integers(1, 3), groups=st.integers(1, 4), size=st.integers(1, 4), steps=st.integers(1, 4))
def test_no_two_refills_share_a_task_or_a_sampling_key(tries, groups, size, steps):
    numbers = Numbers(tries, groups, groups * size)
    every = [(step, attempt) for step in range(steps) for attempt in range(1, tries + 1)]
    tasks = [numbers.task(step, group, attempt) for step, attempt in every for group in range(groups)]
    rollouts = [numbers.rollout(step, place, attempt) for step, attempt in every for place in range(groups * size)]
    assert sorted(tasks) == list(range(steps * groups * tries))  # none is skipped
    assert sorted(rollouts) == list(range(FIRST_REFILL_ROLLOUT, FIRST_REFILL_ROLLOUT + steps * tries * groups * size))


def of_length(steps, **fields):
    config = default_config()
    config.num_steps = steps
    config.rollout.update(fields)
    return config


@pytest.mark.parametrize(
    ("fields", "places", "longest", "lacking"),
    [
        # After 2,048 demonstrations and 200 steps of the warm start.
        ({"groups": 64, "refill_tries": 1}, 64, (FIRST_SPARE - 2048) // 64, "tasks of its own"),
        ({"groups": 64, "refill_tries": 2}, 64, FIRST_SPARE // 128, "tasks to refill with"),
        ({"groups": 1, "refill_tries": 1}, 512, FIRST_REFILL_ROLLOUT // 512 - 200, "sampling keys of its own"),
        ({"groups": 1, "refill_tries": 4}, 512, FIRST_REFILL_ROLLOUT // 2048, "sampling keys of refills"),
    ],
)
def test_a_run_is_refused_when_its_tasks_or_sampling_keys_would_run_out(fields, places, longest, lacking):
    numbers = Numbers(fields["refill_tries"], fields["groups"], places)
    check_lengths(of_length(longest, **fields), places)
    with pytest.raises(ConfigError, match=f"config.num_steps = {longest + 1} with rollout.groups = .* {lacking}"):
        check_lengths(of_length(longest + 1, **fields), places)
    last = longest - 1, fields["groups"] - 1, fields["refill_tries"]
    assert numbers.task(*last) < TASKS_PER_SEED - FIRST_SPARE
    assert (200 + longest) * places <= FIRST_REFILL_ROLLOUT
    assert numbers.rollout(longest - 1, places - 1, fields["refill_tries"]) < FIRST_EVAL_ROLLOUT < 2**31


# -- the account -------------------------------------------------------------------------------------------------------


def rollout_of(job: Job, reward: float | None):
    return make_trajectory(
        [1, 2], group=job.group, rollout=job.rollout, task=job.task.name, environment=job.environment,
        reward=reward or 0.0, scored=reward is not None,
    )  # fmt: skip


class Draws:
    """A collector whose rollouts earn drawn rewards; it remembers its collections."""

    def __init__(self, draw):
        self._draw, self.made = draw, []

    def rollouts(self, jobs, engine, *, finished, adds=False):
        assert adds == bool(self.made)
        reward = st.sampled_from([0.0, 1.0, None])
        self.made.append([rollout_of(job, self._draw(reward)) for job in jobs])
        return self.made[-1]


@given(st.data(), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 3))
def test_every_rollout_is_trained_or_replaced_once(data, sizes, tries):
    """`sizes`: of the groups. Groups of the environment `still` may not be replaced."""
    numbers = Numbers(max(tries, 1), len(sizes), len(sizes) * max(sizes))
    environment = [data.draw(st.sampled_from(["moving", "still"])) for _ in sizes]
    task = types.SimpleNamespace
    jobs = [
        Job(task(name=f"own/{group}"), group=group, rollout=group * max(sizes) + i, environment=environment[group])
        for group, size in enumerate(sizes)
        for i in range(size)
    ]
    draws = Draws(data.draw)
    trainer = types.SimpleNamespace(collector=draws, engine=None, peers=Peers())
    trainer.config = types.SimpleNamespace(rollout=types.SimpleNamespace(refill_tries=tries))
    moving = {group for group, entry in enumerate(environment) if entry == "moving"} if tries else set()
    trainer._refillable = lambda: moving
    trainer._keeping = lambda trajectories: contextlib.nullcontext()
    trainer._refill_jobs = lambda jobs, groups, attempt: refill_jobs(
        jobs, groups, attempt, step=0, first_rollout=0, numbers=numbers,
        spare_task=lambda entry, index: task(name=f"{entry}/{index}"),
    )  # fmt: skip
    collected = Trainer._collect(trainer, jobs, [])
    metrics = collected.metrics(len(sizes))

    places = [(job.group, job.environment) for job in jobs]
    assert [(t.group, t.environment) for t in collected.trained] == places  # each in its place
    assert collected.tries == draws.made
    offered = [group for made in draws.made for group in {t.group for t in made}]
    assert len(offered) == metrics["rollout/offered"] == len(sizes) + metrics["rollout/refilled"]
    keys = [t.rollout for t in collected.sampled]
    assert len(set(keys)) == len(keys)
    tasks = {(t.group, t.task) for t in collected.sampled}
    assert len({name for _, name in tasks}) == len(tasks) == len(offered)
    last = {t.group: i for i, made in enumerate(draws.made) for t in made}  # the try that is trained
    expected = [t for i, made in enumerate(draws.made) for t in made if last[t.group] == i]
    assert sorted(t.rollout for t in collected.trained) == sorted(t.rollout for t in expected)
    for i, made in enumerate(draws.made):  # only groups without variance are replaced, as long as there are tries
        again = {group for group in {t.group for t in made} if last[group] > i}
        assert again == (without_variance(made) & moving if i < tries else set())
    assert metrics["rollout/unfilled"] == len(without_variance(collected.trained) & moving)


def test_groups_without_variance_by_hand():
    task = types.SimpleNamespace(name="t")
    rewards = {0: [1.0, 1.0], 1: [0.0, 1.0], 2: [None, 1.0], 3: [None, None], 4: [0.5, 0.5, None, 0.25], 5: [0.0]}
    made = [rollout_of(Job(task, group, 10 * group + i), r) for group in rewards for i, r in enumerate(rewards[group])]
    assert without_variance(made) == {0, 2, 3, 5}
    halves = [made[::2], made[1::2]]  # of two processes: each decides by the rewards of both
    entries = [[[t.rollout, t.group, t.reward if t.scored else None] for t in half] for half in halves]
    for half, others in zip(halves, reversed(entries), strict=True):
        assert without_variance(half, lambda own, others=others: [*own, *others]) == {0, 2, 3, 5}


# -- whole runs --------------------------------------------------------------------------------------------------------


class Nowhere:
    timeout, cwd = 1.0, "/"

    def kill_processes(self):
        pass

    def close(self):
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lottery(Task):
    """Pays for what the agent happens to say: once in `odds` times. It needs no sandbox and no skill."""

    odds: int
    raises: ClassVar[tuple[str, ...]] = ()  # tasks whose score raises

    def world(self):
        return Nowhere()

    def score(self, episode):
        assert self.name not in self.raises
        said = "".join(message.text for message in episode.transcript if message.role == Role.ACTION)
        return float(zlib.crc32(said.encode("utf-8", "surrogateescape")) % self.odds == 0)


class LotteryFamily:
    def __init__(self, odds):
        self.odds = odds

    def make(self, split, index):
        return Lottery(name=f"odds{self.odds}/{split}/{index}", prompt=f"draw {index % 97}", odds=self.odds)


SIZES, TEMPERATURES, TRIES = {"fair": 2, "rare": 3}, {"fair": 0.8, "rare": 1.7}, 2


def lotteries(**fields):
    """Returns a run over two environments, of which one has its own temperature and group size."""
    c = tiny.get_config()
    c.num_steps, c.warm_start.num_steps, c.eval.episodes = 3, 0, 4
    c.task.fair, c.task.rare = ({"family": f"{__name__}:LotteryFamily", "odds": odds} for odds in (2, 6))
    c.task.mixture = {"fair": 1.0, "rare": 1.0}
    c.environments.rare = {
        "loss": {"observation_weight": 0.2},
        "rollout": {"temperature": TEMPERATURES["rare"], "group_size": SIZES["rare"]},
    }
    c.rollout.update(groups=4, refill_tries=TRIES, grammar="plain")
    c.loss.kl_weight = 0.0
    c.checkpoint.every = 1
    c.update_from_flattened_dict(fields)
    return c


class Watched(NamedTuple):
    workdir: Path
    made: list[list]  # jobs and trajectories of each collection


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Watched:
    """A run that nothing interrupts."""
    made, collect = [], Collector.rollouts

    def remember(self, jobs, *arguments, **options):
        found = collect(self, jobs, *arguments, **options)
        made.append((jobs, found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "rollouts", remember)
        workdir = tmp_path_factory.mktemp("refill") / "whole"
        assert lifecycle.train(lotteries(), workdir) == 0
    return Watched(workdir, made)


def by_step(watched):
    """Returns {step: [(jobs, trajectories) of each try]}, and the collections of evaluations."""
    places, own, evaluations = build(lotteries()).learner.rollouts_per_step, collections.defaultdict(list), []
    for jobs, found in watched.made:
        first = jobs[0].rollout
        if first >= FIRST_EVAL_ROLLOUT:
            evaluations.append((jobs, found))
        elif first >= FIRST_REFILL_ROLLOUT:
            own[1 + (first - FIRST_REFILL_ROLLOUT) // (TRIES * places)].append((jobs, found))
        else:
            own[1 + first // places].append((jobs, found))
    return own, evaluations


def saved(workdir, step):
    vocab_size = build(lotteries()).learner.vocab_size
    return trajectory_lib.load(workdir / "rollouts" / f"step_{step:06d}.jsonl.gz", vocab_size=vocab_size)


def test_the_trainer_gives_each_environments_tokens_the_temperature_that_they_were_sampled_at(whole):
    records = read_metrics(whole.workdir / "metrics.jsonl")
    gaps = [record["policy/sampler_gap_max"] for record in records if "policy/sampler_gap_max" in record]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    weights = {
        (record["loss/observation_weight"], record["loss/observation_weight_env_rare"]) for record in records[1:]
    }
    assert weights == {(0.05, 0.2)}


def test_the_account_of_a_run_adds_up_and_the_filter_does_not_bias_its_solve_rate(whole):
    steps, _ = by_step(whole)
    records = {record["step"]: record for record in read_metrics(whole.workdir / "metrics.jsonl")}
    assert sorted(steps) == [1, 2, 3]
    for step, tries in steps.items():
        record, trained = records[step], saved(whole.workdir, step)
        groups = [len({job.group for job in jobs}) for jobs, _ in tries]
        assert groups[0] == 4
        assert (record["rollout/offered"], record["rollout/refilled"]) == (sum(groups), sum(groups[1:]))
        assert record["rollout/unfilled"] == len(without_variance(trained))
        counts = [record[f"rollout/{name}"] for name in ("accepted", "rejected", "filtered")]
        assert sum(counts) == record["rollout/submitted"] == len(trained)
        rates = [np.mean([t.solved for t in found]) for found in (tries[0][1], trained)]
        assert record["rollout/solve_rate"] == rates[0]
        tokens = sum(len(t.ids) for _, found in tries for t in found)
        assert record["rollout/tokens_per_second"] * record["time/rollout"] == pytest.approx(tokens)
    assert sum(record.get("rollout/refilled", 0) for record in records.values()) > 2
    assert any(len(tries) == 1 + TRIES for tries in steps.values())


def test_tasks_and_sampling_keys_are_used_once_and_spare_tasks_only_to_refill(whole):
    steps, evaluations = by_step(whole)
    keys = [job.rollout for jobs, _ in whole.made for job in jobs if job.rollout < FIRST_EVAL_ROLLOUT]
    assert len(set(keys)) == len(keys)
    groups = [{(step, i, job.group, job.task.name) for job in jobs}
              for step, tries in steps.items() for i, (jobs, _) in enumerate(tries)]  # fmt: skip
    names = [name for members in groups for *_, name in members]
    assert len(set(names)) == len(names)  # one task a group, and a group a task
    for step, i, group, name in set().union(*groups):
        index = int(name.rsplit("/", 1)[1])
        assert index == FIRST_SPARE + ((step - 1) * 4 + group) * TRIES + i - 1 if i else index < FIRST_SPARE
    environment = {(step, job.group): job.environment for step, tries in steps.items() for job in tries[0][0]}
    for step, tries in steps.items():
        for jobs, _ in tries:
            assert all(job.environment == environment[step, job.group] for job in jobs)
            assert all(f"odds{2 if job.environment == 'fair' else 6}/train/" in job.task.name for job in jobs)
    assert {name.split("/")[1] for jobs, _ in evaluations for name in (job.task.name for job in jobs)} == {"heldout"}


def test_groups_have_the_size_and_the_temperature_of_their_environment(whole):
    learner = build(lotteries()).learner
    assert (learner.rollouts_per_step, learner.rollouts_at_once) == (12, 12)
    own, evaluations = by_step(whole)
    for tries in own.values():
        for jobs, _ in tries:
            for members in collections.Counter((job.group, job.environment) for job in jobs).items():
                assert members[1] == SIZES[members[0][1]]
    for jobs, _ in (*(made for tries in own.values() for made in tries), *evaluations):
        assert {job.environment for job in jobs} <= SIZES.keys()
        assert all(job.temperature == {"fair": None, "rare": 1.7}[job.environment] for job in jobs)


def test_the_trainer_agrees_on_every_token_at_the_temperature_of_its_environment(whole):
    parts = build(lotteries())
    params, _ = parameters.begin(parts.learner, None)

    @jax.jit
    def score(ids, temperature):
        model = bind(parts.learner.graphdef, params)
        hidden = model(ids[None], jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32))[0]
        return fused_logprobs(hidden[:-1], model.head(), ids[1:], temperature=temperature).logprob

    seen = collections.Counter()
    for _, found in (*by_step(whole)[0][1], by_step(whole)[1][0]):  # sampled by the initial policy
        for t in found:
            ids = np.zeros(64, np.int32)
            ids[: len(t.ids)] = t.ids
            sampled = np.flatnonzero(t.role == Role.ACTION)
            gaps = {
                entry: np.abs(t.logprob[sampled] - np.asarray(score(ids, own))[sampled - 1]).max()
                for entry, own in TEMPERATURES.items()
            }
            assert gaps.pop(t.environment) < 1e-4 < 1e-2 < min(gaps.values())
            seen[t.environment] += 1
    assert min(seen["fair"], seen["rare"]) >= 4


class Killed(BaseException):
    """Ends a run at once, as kill -9 would: nothing is saved."""


def stopping(monkeypatch, when, deed):
    """Makes runs call `deed(collection)` once, when `when(rollout numbers that are done)` of a collection holds."""
    collect, done = _Collection._collect, []

    def collected(self, i, result):
        if self._collector.stop.is_set():
            return
        collect(self, i, result)
        if not done and when([self._jobs[k].rollout for k in self._done]):
            done.append(True)
            deed(self)

    monkeypatch.setattr(_Collection, "_collect", collected)


def refilling(*, attempt=1, after=2):
    """Returns whether `after` rollouts of a try to refill in the second step are done, for `stopping`."""
    places = build(lotteries()).learner.rollouts_per_step
    first = FIRST_REFILL_ROLLOUT + (TRIES + attempt - 1) * places
    return lambda done: len([i for i in done if first <= i < first + places]) >= after


def opened(monkeypatch):
    """Returns a list to which runs add the numbers of the rollouts that they sample for training."""
    found, begin = [], _Collection._begin

    def began(self, i):
        found.append(self._jobs[i].rollout)
        begin(self, i)

    monkeypatch.setattr(_Collection, "_begin", began)
    return found


def kill(collection):
    raise Killed


@pytest.mark.parametrize(
    ("when", "deed"),
    [
        pytest.param(None, "stop", id="stopped in the first try", marks=pytest.mark.variant),
        pytest.param({"attempt": 1}, "stop", id="stopped in the second try", marks=pytest.mark.variant),
        pytest.param({"attempt": 2}, "stop", id="stopped in the third try"),
        pytest.param({"attempt": 1}, "kill", id="killed in the second try"),
    ],
)
def test_a_run_that_stops_while_it_refills_goes_on_bit_for_bit(tmp_path, monkeypatch, whole, when, deed):
    when = refilling(**when) if when else lambda done: len(done) == 3 and 12 <= min(done) < 24
    with monkeypatch.context() as patch:
        before = opened(patch)
        stopping(patch, when, kill if deed == "kill" else lambda collection: collection._collector.stop.set())
        if deed == "kill":
            with pytest.raises(Killed):
                lifecycle.train(lotteries(), tmp_path)
        else:
            assert lifecycle.train(lotteries(), tmp_path) == 75
    kept = tmp_path / "rollouts" / "interrupted_000001.jsonl.gz"
    assert kept.exists() == (deed == "stop")
    finished = []
    if kept.exists():
        finished = [t.rollout for t in trajectory_lib.load(kept, vocab_size=build(lotteries()).learner.vocab_size)]
        assert len(set(finished)) == len(finished) >= 2
    with monkeypatch.context() as patch:
        after = opened(patch)
        assert lifecycle.train(lotteries(), tmp_path) == 0
    check_equal(tmp_path, whole)
    assert not kept.exists()
    own = [i for i in after if i < FIRST_EVAL_ROLLOUT]
    assert not set(own) & set(finished)
    if deed == "stop":  # whatever was finished, of any try, is not sampled again
        assert len(finished) >= len({i for i in before if 12 <= i < 24}) or max(finished) < FIRST_REFILL_ROLLOUT


def check_equal(workdir, whole):
    assert comparable(workdir) == comparable(whole.workdir)
    for step in (1, 2, 3):
        for ours, theirs in zip(saved(workdir, step), saved(whole.workdir, step), strict=True):
            for field in dataclasses.fields(ours):
                np.testing.assert_equal(getattr(ours, field.name), getattr(theirs, field.name))


def test_an_error_after_refills_loses_no_rollout_of_any_try(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_updated", lambda self, *_, **__: (_ for _ in ()).throw(UserCodeError("no update")))
        with pytest.raises(UserCodeError, match="no update"):
            lifecycle.train(lotteries(), tmp_path)
    again = opened(monkeypatch)
    assert lifecycle.train(lotteries(), tmp_path) == 0
    assert not {i for i in again if i < 12 or FIRST_REFILL_ROLLOUT <= i < FIRST_REFILL_ROLLOUT + 12 * TRIES}
    check_equal(tmp_path, whole)


def test_a_refill_that_cannot_be_made_stops_the_run_with_all_its_rollouts(tmp_path, monkeypatch, whole):
    make = LotteryFamily.make

    def only_ordinary(self, split, index):
        assert index < FIRST_SPARE, "no spare task"
        return make(self, split, index)

    with monkeypatch.context() as patch:
        patch.setattr(LotteryFamily, "make", only_ordinary)
        with pytest.raises(UserCodeError, match=r"make\('train', 50000000.\) raised AssertionError.*no spare task"):
            lifecycle.train(lotteries(), tmp_path)
    again = opened(monkeypatch)
    assert lifecycle.train(lotteries(), tmp_path) == 0
    assert not {i for i in again if i < 12}
    check_equal(tmp_path, whole)


def test_refills_whose_scores_all_raise_do_not_stop_a_run(tmp_path, monkeypatch):
    """Only a step in which every rollout raises does."""
    names = tuple(f"odds{odds}/train/{FIRST_SPARE + i}" for odds in (2, 6) for i in range(4 * TRIES))
    monkeypatch.setattr(Lottery, "raises", names)
    assert lifecycle.train(lotteries(num_steps=1), tmp_path) == 0
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert record["rollout/raised"] >= record["rollout/refilled"] * min(SIZES.values()) > 0
    assert record["rollout/unfilled"] > 0
    assert re.search(r"the score of task odds.* raised AssertionError", (tmp_path / "errors.log").read_text())


def test_without_tries_nothing_is_replaced_and_no_account_is_written(tmp_path):
    assert lifecycle.train(lotteries(**{"rollout.refill_tries": 0, "num_steps": 1}), tmp_path) == 0
    assert not {"rollout/offered", "rollout/refilled"} & read_metrics(tmp_path / "metrics.jsonl")[-1].keys()


def test_environments_without_a_policy_term_are_not_refilled(tmp_path):
    config = lotteries(num_steps=1)
    config.environments.rare.loss = {"mode": "env_only"}
    trainer = types.SimpleNamespace(config=config, parts=build(config), step=0, warm_steps=0)
    trainer._first_task = lambda step: Trainer._first_task(trainer, step)
    fair = {group for group in range(4) if trainer.parts.environments[8 + group] == "fair"}
    assert Trainer._refillable(trainer) == fair
    config.loss.mode_changes = ((0, "env_only"),)
    assert Trainer._refillable(trainer) == set()
