"""Shows tasks, and checks that a script solves them and that an empty answer does not.

In: a family's name and parameters. Out: text on the terminal.
"""

import time
from collections.abc import Sequence

import numpy as np

from echo_jax.config import default_config
from echo_jax.render import BuiltinRenderer
from echo_jax.rollout.collector import Collector, Job
from echo_jax.rollout.episode import Rules
from echo_jax.rollout.world import EpisodeWorld, Machine
from echo_jax.system.errors import ConfigError
from echo_jax.system.terminal import escaped
from echo_jax.tasks.stream import make_families
from echo_jax.tasks.task import Family, Task, has_demonstrator
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools.sandbox import Limits, SandboxError

RULES = Rules(max_turns=40, max_tokens=4096, max_turn_tokens=1024)
THREADS = 4


def make_family(name: str, settings: Sequence[str]) -> Family:
    """Returns a family, a key of FAMILIES or "module:Class", with integer parameters given as `name=value`; the others
    are those of the default config.

    Raises:
      ConfigError: the family or a parameter does not exist, or its value cannot work.
    """
    given = dict(default_config().task.get(name, {}))
    for setting in settings:
        parameter, _, value = setting.partition("=")
        if not value.removeprefix("-").isdecimal():
            raise ConfigError(f"--set {setting}: write it as NAME=INTEGER")
        given[parameter] = int(value)
    return make_families({name: 1.0}, {name: given})[name]


def show(task: Task) -> None:
    lines = [f"{task.name}: {task.prompt}", f"  tools: {' '.join(task.tools)}"]
    lines += [f"  {path}: {len(content)} bytes" for path, content in sorted(task.files.items())]
    lines += [f"  {path} -> {target}" for path, target in sorted(task.symlinks.items())]
    print(escaped("\n".join(lines)))


def check(tasks: Sequence[Task]) -> None:
    machine = Machine(Limits())
    started = time.monotonic()
    scripted = [task for task in tasks if has_demonstrator(task)]
    if scripted:
        with Collector(BuiltinRenderer(SentencePieces()), RULES, machine, THREADS) as collector:
            jobs = [Job(task, group=i, rollout=i) for i, task in enumerate(scripted)]
            trajectories = collector.scripted(jobs, solve=[True] * len(jobs), seed=0)
        seconds = (time.monotonic() - started) / len(scripted)
        print(f"solved by the script: {sum(t.solved for t in trajectories)} of {len(scripted)}")
        print(f"turns: {np.mean([t.turns for t in trajectories]):.1f}, seconds per episode: {seconds:.3f}")
    else:
        print("these tasks have no demonstrator")
    rewards = [idle_reward(task, machine) for task in tasks]
    solved = sum(r is not None and r >= t.reward_range[1] for r, t in zip(rewards, tasks, strict=True))
    unscored = f", {rewards.count(None)} could not be scored" if None in rewards else ""
    print(f"solved by doing nothing: {solved} of {len(tasks)}{unscored}")


def idle_reward(task: Task, machine: Machine) -> float | None:
    """Returns the reward of an empty answer, submitted at once; None if the task cannot score it."""
    world = EpisodeWorld(task, machine)
    reward = world.finish("") if world.open() else None
    if reward is None and not world.unscored:
        raise SandboxError(world.fault)
    return reward
