"""The maze: every goal can be reached, walls block, and only standing on the goal earns the reward."""

import numpy as np
import pytest
from scoring import score

from echo_jax.render.calls import GRAMMARS
from echo_jax.tasks.maze import STEPS, MazeFamily, neighbour
from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import Status

BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}


def go(world, turn):
    [call] = GRAMMARS["plain"].parse(turn, {name: TOOLS[name] for name in ("go", "submit")})
    return TOOLS["go"].run(world, call.arguments)


def follow(task, *, solve, seed=0):
    """Runs a task's script; returns its reward and the number of steps."""
    world, script = task.world(), task.demonstrate(np.random.default_rng(seed), solve=solve)
    observation, steps = None, 0
    while (turn := script.send(observation)) != "submit ":
        observation = go(world, turn).head.decode()
        steps += 1
    world.kill_processes()
    world.close()
    return score(task, "", world), steps


@pytest.mark.parametrize(("width", "height"), [(2, 2), (6, 6), (8, 8), (2, 9), (20, 3)])
def test_script_walks_a_shortest_path_in_every_maze(width, height):
    family = MazeFamily(width=width, height=height, revision=2)
    for task in (family.make(split, i) for split in ("train", "heldout") for i in range(40)):
        way = task.ways()[task.goal]
        assert follow(task, solve=True) == (1.0, len(way))
        assert 0 < len(way) < width * height


@pytest.mark.parametrize(("width", "height"), [(2, 2), (6, 6), (3, 9)])
def test_every_cell_can_be_reached_and_every_door_leads_back(width, height):
    for i in range(20):
        task = MazeFamily(width=width, height=height, revision=2).make("train", i)
        ways = task.ways()
        assert ways.keys() == {(x, y) for x in range(width) for y in range(height)}
        assert all((there, here) in task.doors for here, there in task.doors)
        assert len(task.doors) // 2 >= width * height - 1
        assert 2 * len(ways[task.goal]) >= max(map(len, ways.values()))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_no_maze_can_be_crossed_without_a_look_at_its_doors(size):
    family = MazeFamily(width=size, height=size, revision=2)
    for task in (family.make(split, i) for split in ("train", "heldout") for i in range(100)):
        (x, y), (to_x, to_y) = task.start, task.goal
        across = ["east" if to_x > x else "west"] * abs(to_x - x)
        down = ["south" if to_y > y else "north"] * abs(to_y - y)
        for way in (across + down, down + across):
            world = task.world()
            for direction in way:
                world.go(direction)
            assert world.cell != task.goal


def test_some_mazes_have_more_than_one_path():
    doors = [len(MazeFamily(width=6, height=6, revision=2).make("train", i).doors) // 2 for i in range(20)]
    assert np.mean(doors) > 36


def test_step_shows_the_cell_and_a_wall_is_an_error_without_a_move():
    task = MazeFamily(width=6, height=6, revision=2).make("train", 0)
    world = task.world()
    for direction in STEPS:
        here, following = world.cell, neighbour(world.cell, direction)
        result = go(world, f"go {direction}")
        text = result.head.decode()
        if (here, following) in task.doors:
            assert (result.status, result.exit_code, world.cell) == (Status.OK, 0, following)
            assert text.startswith(f"at {following[0]} {following[1]}; doors ")
            assert BACK[direction] in text.split("; ")[1].split()
            go(world, f"go {BACK[direction]}")
        else:
            assert (result.status, result.exit_code, world.cell) == (Status.NONZERO, 1, here)
            assert text.startswith(f"wall; at {here[0]} {here[1]}; doors ")
        assert text.endswith(f"; goal {task.goal[0]} {task.goal[1]}\n")
        assert world.cell == here


@pytest.mark.parametrize("direction", ["", "up", "north east", "North", "n"])
def test_unknown_direction_is_an_error_that_names_the_directions(direction):
    world = MazeFamily(width=6, height=6, revision=2).make("train", 0).world()
    start = world.cell
    result = world.go(direction)
    assert (result.status, world.cell) == (Status.NONZERO, start)
    assert all(name in result.head.decode() for name in STEPS)


def test_only_standing_on_the_goal_earns_the_reward():
    for i in range(20):
        task = MazeFamily(width=6, height=6, revision=2).make("train", i)
        *way, last = task.ways()[task.goal]
        world = task.world()
        assert score(task, "", world) == score(task, f"{task.goal}", world) == 0.0
        for direction in way:
            world.go(direction)
        assert score(task, "", world) == 0.0
        world.go(last)
        assert score(task, "", world) == score(task, "anything", world) == 1.0
        assert score(task, None, world) == 0.0
        world.go(BACK[last])
        assert score(task, "", world) == 0.0


def test_episodes_have_separate_worlds():
    task = MazeFamily(width=6, height=6, revision=2).make("train", 0)
    one, other = task.world(), task.world()
    one.go(task.ways()[task.goal][0])
    assert one.cell != other.cell == task.start


def test_flawed_scripts_mostly_fail():
    family = MazeFamily(width=6, height=6, revision=2)
    assert np.mean([follow(family.make("train", i), solve=False, seed=i)[0] for i in range(100)]) < 0.2


@pytest.mark.parametrize(("width", "height"), [(2, 2), (2, 3), (3, 3), (4, 4)])
def test_the_splits_share_no_maze_however_small_it_is(width, height):
    family = MazeFamily(width=width, height=height, revision=2)
    train, heldout = ({repr((sorted(task.doors), task.start, task.goal)) for task in tasks} for tasks in (
        (family.make(split, i) for i in range(1500)) for split in ("train", "heldout")
    ))  # fmt: skip
    assert min(len(train), len(heldout)) > 1
    assert not train & heldout


@pytest.mark.parametrize(("width", "height"), [(1, 6), (6, 1), (0, 0), (-3, 5), (21, 6), (6, 99)])
def test_impossible_size_is_refused_with_its_numbers(width, height):
    with pytest.raises(ValueError, match=f"task.maze: {width} × {height} cells; choose 2 to 20"):
        MazeFamily(width=width, height=height)
