"""A whole training run whose tools crash, hang, flood and die: it continues, in bounded time, and counts every
fault."""

import collections
import itertools
import math
import random
import threading

import pytest

from configs import tiny
from echo_jax.run import lifecycle
from echo_jax.system.metrics import read_metrics
from echo_jax.tools.sandbox import Sandbox, Status
from echo_jax.tools.shell import Bash

TIMEOUT = 0.5
FAULTS = {"crash": 0.2, "hang": 0.1, "flood": 0.05, "die": 0.05}  # share of the tool calls


@pytest.fixture(scope="module")
def faulty_run(tmp_path_factory):
    """Returns (config, metrics of the RL steps, faults injected by kind)."""
    injected = collections.Counter()
    lock, numbers, faulty = threading.Lock(), itertools.count(), threading.Event()
    run_bash, make_rollouts = Bash.run, lifecycle.Trainer._rollouts

    def run(self, world: Sandbox, arguments):
        if not faulty.is_set():  # the warm start and the evaluations
            return run_bash(self, world, arguments)
        with lock:
            kind = random.Random(next(numbers)).choices([*FAULTS, None], [*FAULTS.values(), 1 - sum(FAULTS.values())])[
                0
            ]
            injected[kind] += 1
        if kind == "die":
            world.close()
        command = {"crash": "kill -9 $$", "hang": "trap '' TERM; sleep 60", "flood": "yes"}
        return run_bash(self, world, {"command": command.get(kind, arguments["command"])})

    def rollouts(self):
        faulty.set()
        try:
            return make_rollouts(self)
        finally:
            faulty.clear()

    config = tiny.get_config()
    config.num_steps = 8
    config.rollout.groups = 4
    config.rollout.max_turns = 3
    config.rollout.tool_threads = 4
    config.sandbox.timeout_seconds = TIMEOUT
    config.sandbox.flood_bytes = 1 << 20
    config.eval.episodes = 2
    workdir = tmp_path_factory.mktemp("faulty") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bash, "run", run)
        patch.setattr(lifecycle.Trainer, "_rollouts", rollouts)
        assert lifecycle.train(config, workdir) == 0
    return config, read_metrics(workdir / "metrics.jsonl")[config.warm_start.num_steps :], injected


def total(records, name):
    return sum(record[name] for record in records)


def test_training_continues_and_learns_from_the_observations(faulty_run):
    config, records, injected = faulty_run
    assert len(records) == config.num_steps
    assert sum(injected.values()) > 40
    assert all(injected[kind] > 0 for kind in FAULTS)
    assert all(math.isfinite(record["loss/total"]) for record in records)
    with_observations = [record for record in records if record["observation/tokens"] > 0]
    assert len(with_observations) > config.num_steps / 2  # the others' rollouts were all cut short
    assert all(record["train/gradient_norm"] > 0 for record in with_observations)


def test_every_rollout_is_accounted_for(faulty_run):
    config, records, _ = faulty_run
    for record in records:
        assert record["rollout/submitted"] == config.rollout.groups * config.rollout.group_size
        outcomes = ("accepted", "rejected", "filtered")
        assert record["rollout/submitted"] == sum(record[f"rollout/{name}"] for name in outcomes)
        assert record["rollout/broken"] <= record["rollout/retried"]
        assert record["rollout/rejected"] == 0  # every sandbox that died had run a call


def test_every_kind_of_fault_is_counted(faulty_run):
    """The calls of a repeated rollout are in no trajectory. So the counts are at most the faults, but most of them."""
    _, records, injected = faulty_run
    for kind, status in (("crash", Status.SIGNAL), ("hang", Status.TIMEOUT), ("flood", Status.OUTPUT_LIMIT)):
        counted = total(records, f"rollout/calls_{status}")
        assert injected[kind] / 2 <= counted <= injected[kind], kind
    broken, retried = total(records, "rollout/broken"), total(records, "rollout/retried")
    assert total(records, "rollout/calls_infra") == broken
    assert injected["die"] == broken + retried


def test_step_stays_within_its_time_budgets(faulty_run):
    config, records, _ = faulty_run
    rollouts = config.rollout.groups * config.rollout.group_size
    calls = 2 * config.rollout.max_turns * rollouts / config.rollout.tool_threads  # in sequence, and made twice
    for record in records:
        assert record["time/rollout"] < calls * (TIMEOUT + 0.5) + 10
