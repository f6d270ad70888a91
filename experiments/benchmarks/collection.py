"""Where the time of a collection goes: rollouts of a trained policy, with tools as they are and with slow ones.

    python experiments/benchmarks/collection.py --workdir=runs/quickstart

Samples the rollouts of some steps with the newest checkpoint of a run, half as many rows as sessions or by default, and
with each tool call delayed. `device busy` is the engine's time over the time in which a session could sample; rows are
counted at each token; known ids are prompts and tool output.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import numpy as np
from gpu import machine

from echo_jax.learner.checkpoint import Checkpointer
from echo_jax.learner.parameters import restore
from echo_jax.rollout.collector import Collector, Job
from echo_jax.rollout.summary import engine_metrics
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.run.build import Parts, build, sandboxes
from echo_jax.run.workdir import recorded_config


class Slow:
    """A tool that answers some seconds later."""

    def __init__(self, tool, seconds: float):
        self._tool, self._seconds = tool, seconds
        self.description, self.parameters = tool.description, tool.parameters

    def run(self, world, arguments):
        time.sleep(self._seconds)
        return self._tool.run(world, arguments)


def jobs(parts: Parts, step: int) -> list[Job]:
    """Returns rollouts of tasks that the run has not seen yet."""
    rollout = parts.config.rollout
    first = 1 << 16
    return [
        Job(parts.train_tasks[first + step * rollout.groups + group], group, (first + step) * 4096 + i)
        for i, group in enumerate(g for g in range(rollout.groups) for _ in range(rollout.group_size))
    ]


def unique(trajectories: list[Trajectory]) -> int:
    """Returns how many known ids must be computed: those of a group's prompt once, a rollout's others before its last
    turn each."""
    prompts, others = {}, 0
    for t in trajectories:
        sampled = np.flatnonzero(t.version >= 0)
        prompts[t.group] = sampled[0]
        others += int((t.version[sampled[0] : sampled[-1]] < 0).sum())
    return int(sum(prompts.values())) + others


def measure(parts: Parts, params, version: int, delay: float, options: dict, steps: int) -> str:
    config = parts.config
    with config.rollout.unlocked():
        config.rollout.engine_options = ml_collections.ConfigDict(options)
    engine = parts.make_engine()
    tools = {name: Slow(tool, delay) if name != "submit" else tool for name, tool in parts.rules.tools.items()}
    rules = dataclasses.replace(parts.rules, tools=tools)
    walls, records = [], []
    with Collector(parts.renderer, rules, sandboxes(config), parts.learner.rollouts_at_once) as collector:
        for step in range(steps + 1):  # the first compiles
            engine.set_params(params, version)
            made = jobs(parts, step)
            collector.prepare(made, engine)
            for world in collector._ahead.values():
                world.opened.result()
            start = time.perf_counter()
            trajectories = collector.rollouts(made, engine)
            walls.append(time.perf_counter() - start)
            spent, counts = collector.seconds, engine_metrics([dict(collector.counts)])
            # Prefill feeds a turn's last sampled id too, except the last turn's; decoding feeds its last known id.
            computed = counts["engine/prefill"] + len(trajectories)
            records.append(
                counts
                | {"busy": spent.engine / (spent.engine + spent.host), "engine": spent.engine, "tools": spent.tools}
                | {"twice": computed / unique(trajectories)}
            )
    mean = lambda name: statistics.fmean(record[name] for record in records[1:])  # noqa: E731
    cells = [f"{delay:g}", engine._layout.rows, f"{statistics.median(walls[1:]):.2f}", f"{mean('engine'):.2f}"]
    cells += [f"{mean('tools'):.2f}", f"{mean('busy'):.0%}", f"{mean('engine/rows_idle'):.0%}"]
    cells += [f"{mean(f'engine/rows_idle_{why}'):.0%}" for why in ("ended", "prefill", "tools", "unopened")]
    cells += [f"{mean('engine/prefill'):.0f}", f"{mean('engine/shared'):.0f}", f"{mean('twice'):.3f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(parts: Parts, params, version: int, args) -> Iterator[str]:
    sessions = parts.learner.rollouts_at_once
    yield (
        "| delay of a call, s | rows | wall s | engine s | only tools s | device busy | rows idle | ended | prefill "
        "| tools | unopened | known ids in prefill | shared | known ids computed over unique |"
    )
    yield "|" + "---|" * 14
    for delay in args.delays:
        for options in ({}, {"rows": sessions // 2}):
            yield measure(parts, params, version, delay, options, args.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--delays", type=float, nargs="*", default=(0.0, 2.0))
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    parts = build(recorded_config(args.workdir))
    with Checkpointer(args.workdir / "checkpoints") as checkpointer:
        policy = restore(checkpointer, parts.learner, parts.source, quiet=True)
    print(f"{machine()}; {parts.learner.rollouts_at_once} sessions, the policy of step {policy.step}\n")
    for line in table(parts, policy.params, policy.step, args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
