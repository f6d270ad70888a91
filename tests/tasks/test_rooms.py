"""The rooms tasks: every pair can be walked in a real sandbox, and only standing in the goal earns the reward."""

import functools

import numpy as np
import pytest
from scoring import score

from echo_jax.render import BuiltinRenderer
from echo_jax.roles import Role
from echo_jax.rollout.collector import Collector, Job
from echo_jax.rollout.episode import Rules
from echo_jax.rollout.world import Machine
from echo_jax.tasks.rooms import EXITS, RoomsFamily, move
from echo_jax.tasks.words import WORDS
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools.sandbox import Limits, Sandbox

RENDERER = BuiltinRenderer(SentencePieces())
RULES = Rules(max_turns=8, max_tokens=160, max_turn_tokens=24)
LIMITS = Limits(timeout_seconds=10.0, memory_bytes=256 << 20, disk_bytes=16 << 20, processes=32, output_bytes=256)
BACK = {"n": "s", "s": "n", "e": "w", "w": "e"}


def family(seed=0, width=3, height=3, revision=2):
    return RoomsFamily(width=width, height=height, map_seed=seed, revision=revision)


@functools.cache
def all_pairs(split, revision=2):
    """Returns a task for every start/goal pair of a split of the default map."""
    tasks = {task.prompt: task for task in (family(revision=revision).make(split, i) for i in range(600))}
    return [tasks[prompt] for prompt in sorted(tasks)]


def run_scripts(tasks, *, solve):
    jobs = [Job(task, group=i, rollout=i) for i, task in enumerate(tasks)]
    with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=2) as collector:
        return collector.scripted(jobs, [solve] * len(jobs), seed=0)


def walk(task, exits):
    """Returns the directory at the end of a path, found from the map's links alone."""
    room = task.setup.removeprefix("cd ")
    for name in exits:
        room = task.symlinks[f"{room}/{name}"].removeprefix("../")
    return room


def distances(task, start):
    """Returns {directory: number of exits to it}."""
    steps, queue = {start: 0}, [start]
    for room in queue:
        for name in EXITS:
            behind = task.symlinks[f"{room}/{name}"].removeprefix("../")
            if behind not in steps:
                steps[behind] = steps[room] + 1
                queue.append(behind)
    return steps


@pytest.fixture
def visit():
    """Returns a function that opens a task's sandbox, runs commands in it, and scores an answer."""

    def visited(task, commands, answer):
        with Sandbox(limits=LIMITS, files=task.files, symlinks=task.symlinks, places=task.reads_places) as box:
            for command in (task.setup, *commands):
                box.run(command)
            box.kill_processes()
            return score(task, answer, box)

    return visited


@pytest.mark.parametrize(("revision", "count"), [(1, 72), (2, 54)])
def test_solving_script_walks_every_pair_of_the_map(revision, count):
    tasks = all_pairs("train", revision) + all_pairs("heldout", revision)
    assert len(tasks) == count
    assert min(len(task.path) for task in tasks) == revision
    for task, trajectory in zip(tasks, run_scripts(tasks, solve=True), strict=True):
        assert (trajectory.reward, trajectory.outcome) == (1.0, "submitted"), task.prompt
        assert trajectory.turns == len(task.path) + 1
        observed = RENDERER.tokenizer.decode(trajectory.ids[trajectory.role == Role.OBSERVATION])
        assert observed.split()[-1] == task.goal_sign


def test_flawed_scripts_mostly_fail():
    trajectories = run_scripts(all_pairs("train"), solve=False)
    assert 0 < np.mean([t.reward for t in trajectories]) < 0.5


def test_only_standing_in_the_goal_earns_the_reward(visit):
    task = max(all_pairs("train"), key=lambda task: len(task.path))
    way = [move(name).removeprefix("bash ") for name in task.path]
    assert visit(task, way, task.goal_sign) == 1.0
    assert visit(task, way, "anything") == 1.0  # the shell's directory counts, not the answer
    assert visit(task, way, None) == 0.0
    assert visit(task, [], task.goal_sign) == 0.0
    assert visit(task, way[:-1], task.goal_sign) == 0.0
    assert visit(task, [*way, "cd /work"], task.goal_sign) == 0.0
    assert visit(task, [f"mkdir -p /tmp/{task.goal}; cd /tmp/{task.goal}"], task.goal_sign) == 0.0


def test_goal_counts_whichever_exit_led_to_it(visit):
    task = max(all_pairs("train"), key=lambda task: len(task.path))
    assert visit(task, [f"cd {name}" for name in task.path], task.goal_sign) == 1.0
    assert visit(task, [f"ls; cd /work; cd - && cd -P {name} && sleep 0" for name in task.path], task.goal_sign) == 1.0
    assert visit(task, ["mkdir -p '/tmp/it'\"'\"'s'; cd '/tmp/it'\"'\"'s'"], task.goal_sign) == 0.0


@pytest.mark.parametrize(
    "jump",
    [
        "cd $(dirname $(grep -lx 'room {sign}' /work/*/sign))",
        "cd /work/{goal}",
        "cd -P {path}",
        "rm n; ln -s ../{goal} n; cd n",
        "cd ..; mv $OLDPWD away; mv {goal} $OLDPWD; cd $OLDPWD",
        "until grep -qx 'room {sign}' sign; do cd -P $(printf '%s\n' n e s w | shuf -n 1); done",
    ],
)
def test_a_jump_to_the_goal_earns_the_reward_only_in_revision_1(visit, jump):
    for revision in (1, 2):
        task = max(all_pairs("train", revision), key=lambda task: len(task.path))
        command = jump.format(goal=task.goal, sign=task.goal_sign, path="/".join(task.path))
        moved_there = revision == 1 and "mv" not in jump
        assert visit(task, [command], task.goal_sign) == moved_there, revision


@pytest.mark.parametrize("revision", [1, 2])
def test_forged_shell_state_does_not_change_the_score(visit, revision):
    task = all_pairs("train", revision)[0]
    lie = f"pwd() {{ echo /work/{task.goal}; }}"
    assert visit(task, [f"{lie}; export -f pwd; export PWD=/work/{task.goal}"], task.goal_sign) == 0.0
    assert visit(task, [f"trap - EXIT; echo '{lie}' > /run/shell/env"], task.goal_sign) == 0.0  # read by the next shell
    places = [walk(task, task.path[:i]) for i in range(1, len(task.path) + 1)]
    for end in ("kill -9 $$", "trap - EXIT", "exec true"):
        forged = [f"echo /work/{place} > /run/shell/cwd; {end}" for place in places]
        assert visit(task, forged, task.goal_sign) == 0.0, end
        assert visit(task, [*forged, "true"], task.goal_sign) == (revision == 1), end  # the next shell starts there


def test_prompt_reveals_neither_the_path_nor_the_directories():
    for task in all_pairs("train") + all_pairs("heldout"):
        assert not {task.goal, task.setup.split()[1], *EXITS} & {*task.prompt.split()}
        assert not any(task.goal in content.decode() for content in task.files.values())


@pytest.mark.parametrize(("width", "height"), [(3, 3), (4, 1), (1, 4), (2, 2), (7, 5), (14, 15)])
def test_every_map_is_connected_and_paths_are_shortest(width, height):
    for seed in range(3 if width > 9 else 25):
        task = family(seed, width, height).make("train", seed)
        start = task.setup.removeprefix("cd ")
        steps = distances(task, start)
        assert len(steps) == width * height == len(task.files)
        assert walk(task, task.path) == task.goal
        assert len(task.path) == steps[task.goal] > 0
        for room in steps:
            for name in EXITS:
                behind = task.symlinks[f"{room}/{name}"].removeprefix("../")
                assert behind == room or task.symlinks[f"{behind}/{BACK[name]}"] == f"../{room}"


def test_signs_and_directories_name_one_room_each():
    task = family(0, 14, 15).make("train", 0)
    assert len({*task.files.values()}) == len(task.files) == 210
    assert {path.split("/")[0] for path in task.symlinks} == {path.split("/")[0] for path in task.files}


def test_another_seed_is_another_map():
    maps = {tuple(sorted(family(seed).make("train", 0).symlinks.items())) for seed in range(20)}
    assert len(maps) == 20


@pytest.mark.parametrize(("width", "height"), [(2, 2), (3, 3), (6, 2)])
def test_train_and_heldout_partition_the_pairs(width, height):
    count = width * height
    for revision, least in ((1, 1), (2, 2)):
        rooms = family(0, width, height, revision)
        train, heldout = ({rooms.make(split, i).prompt for i in range(2500)} for split in ("train", "heldout"))
        tasks = [rooms.make(split, i) for split in ("train", "heldout") for i in range(500)]
        starts = {task.setup.removeprefix("cd "): task for task in tasks}
        steps = [steps for start, task in starts.items() for steps in distances(task, start).values()]
        assert len(starts) == count
        assert not train & heldout
        assert len(train) + len(heldout) == sum(distance >= least for distance in steps)
        assert len(heldout) == len(train | heldout) // 3


@pytest.mark.parametrize(
    ("width", "height"), [(1, 3), (0, 9), (9, 0), (-2, -2), (-3, 3), (1, len(WORDS) + 1), (20, 20)]
)
def test_impossible_map_is_refused_with_its_size(width, height):
    with pytest.raises(ValueError, match=f"{width} × {height} rooms.*4 to {len(WORDS)}"):
        family(0, width, height)
