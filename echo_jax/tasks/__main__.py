"""Shows tasks of a family, and checks that they can be solved, but not by doing nothing.

    python -m echo_jax.tasks --task=shell --set level=2
    python -m echo_jax.tasks --task=maze --set width=6 --set height=6 --split=heldout --show=1 --count=100

Out: prompts, tools and files; then how many of `--count` tasks the family's own script solves in real episodes, and how
many an agent solves that submits an empty answer at once.
"""

import inspect
import sys
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from echo_jax.environment import Environment, Machine
from echo_jax.episode import Rules
from echo_jax.render import BuiltinRenderer
from echo_jax.rollout import Collector, Job, RolloutError
from echo_jax.tasks import FAMILIES
from echo_jax.tasks.task import Family, Task
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools.sandbox import Limits, SandboxError

RULES = Rules(max_turns=40, max_tokens=4096, max_turn_tokens=1024)
THREADS = 4


def make_family(name: str, settings: Sequence[str]) -> Family:
    """Returns a family with its parameters, integers given as `name=value`.

    Raises ValueError for a family or a parameter that there is not, that is missing, or that cannot work."""
    if name not in FAMILIES:
        raise ValueError(f"--task={name}: choose one of {', '.join(FAMILIES)}")
    given = {}
    for setting in settings:
        parameter, _, value = setting.partition("=")
        if not value.removeprefix("-").isdecimal():
            raise ValueError(f"--set {setting}: write it as NAME=INTEGER")
        given[parameter] = int(value)
    needed = inspect.signature(FAMILIES[name]).parameters
    if given.keys() != needed.keys():
        raise ValueError(f"--task={name} has parameters {', '.join(given) or 'none'}; it takes {', '.join(needed)}")
    return FAMILIES[name](**given)


def show(task: Task) -> None:
    print(f"{task.name}: {task.prompt}")
    print(f"  tools: {' '.join(task.tools)}")
    for path, content in sorted(task.files.items()):
        print(f"  {path}: {len(content)} bytes")
    for path, target in sorted(task.symlinks.items()):
        print(f"  {path} -> {target}")


def check(tasks: Sequence[Task]) -> None:
    machine = Machine(Limits())
    started = time.monotonic()
    with Collector(BuiltinRenderer(SentencePieces()), RULES, machine, THREADS) as collector:
        jobs = [Job(task, group=i, rollout=i) for i, task in enumerate(tasks)]
        trajectories = collector.scripted(jobs, solve=[True] * len(jobs), seed=0)
    seconds = (time.monotonic() - started) / len(tasks)
    print(f"solved by the script: {sum(t.reward == 1.0 for t in trajectories)} of {len(tasks)}")
    print(f"solved by doing nothing: {sum(idle_reward(task, machine) == 1.0 for task in tasks)} of {len(tasks)}")
    print(f"turns: {np.mean([t.turns for t in trajectories]):.1f}, seconds an episode: {seconds:.3f}")


def idle_reward(task: Task, machine: Machine) -> float:
    """Returns what an empty answer earns that is submitted at once."""
    environment = Environment(task, machine)
    reward = environment.finish("") if environment.open() else None
    if reward is None:
        raise SandboxError(environment.fault)
    return reward


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    args = flags.FLAGS
    try:
        family = make_family(args.task, args.set)
        for index in range(args.show):
            show(family.make(args.split, index))
        check([family.make(args.split, index) for index in range(args.count)])
    except (ValueError, SandboxError, RolloutError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("task", None, f"The family: {', '.join(FAMILIES)}.", required=True)
    flags.DEFINE_multi_string("set", [], "A parameter of the family, as level=2; may be repeated.")
    flags.DEFINE_enum("split", "train", ["train", "heldout"], "Which tasks.")
    flags.DEFINE_integer("show", 3, "Tasks to show.", lower_bound=0)
    flags.DEFINE_integer("count", 20, "Tasks to run.", lower_bound=1)
    app.run(main)
