"""Laws of an episode's world: separate budgets, scores in range, worlds without a sandbox."""

import dataclasses
import math
import time

import pytest

from echo_jax.rollout import world as environment
from echo_jax.rollout.world import START_ATTEMPTS, EpisodeWorld, Machine, ScoreError
from echo_jax.tasks.task import Task
from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import CommandResult, Limits, SandboxBroken, SandboxError, Status

MACHINE = Machine(Limits(timeout_seconds=5.0, memory_bytes=128 << 20, disk_bytes=8 << 20, output_bytes=256))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged(Task):
    name: str = "judged/train/0"
    prompt: str = "do it"
    judge: object = lambda answer, world: 1.0

    def score(self, episode):
        return self.judge(episode.answer, episode.world)


def run(world, tool, seconds=math.inf, **arguments):
    return world.run(tool, TOOLS[tool], arguments, seconds)


def test_call_stops_at_its_time_out_and_at_the_episodes_budget():
    with_limit = EpisodeWorld(Judged(), dataclasses.replace(MACHINE, limits=Limits(timeout_seconds=0.3)))
    roomy = EpisodeWorld(Judged(), MACHINE)
    for own, seconds in ((with_limit, math.inf), (with_limit, 60.0), (roomy, 0.3)):
        assert own._world is not None or own.open()
        result = run(own, "bash", seconds, command="sleep 60")
        assert result.status is Status.TIMEOUT
        assert 0.2 < result.seconds < 3
    assert run(roomy, "bash", command="sleep 0.5; echo done").head == b"done\n"
    for own in (with_limit, roomy):
        assert own.finish("") == 1.0


def test_setup_has_a_separate_budget_and_is_not_the_agents_fault():
    slow = EpisodeWorld(Judged(setup="sleep 60"), dataclasses.replace(MACHINE, setup_seconds=0.2))
    start = time.monotonic()
    assert not slow.open()
    assert time.monotonic() - start < START_ATTEMPTS * 3
    assert "setup 'sleep 60': timeout" in slow.fault
    assert slow.finish("") is None
    patient = EpisodeWorld(
        Judged(setup="sleep 0.4; mkdir d"), dataclasses.replace(MACHINE, limits=Limits(timeout_seconds=0.2))
    )
    assert patient.open()
    assert run(patient, "bash", command="ls").head == b"d\n"
    patient.close()


def test_scoring_has_a_separate_budget():
    def judge(answer, world):
        result = world.run("sleep 60", fresh=True)
        return float(result.status is Status.OK)

    own = EpisodeWorld(Judged(judge=judge), dataclasses.replace(MACHINE, score_seconds=0.3))
    assert own.open()
    start = time.monotonic()
    assert own.finish("") == 0.0
    assert time.monotonic() - start < 4


def test_agents_processes_are_killed_before_scoring():
    def judge(answer, world):
        try:
            world.write_files({"f": b"honest"})
        except SandboxError:  # it exists again
            return 0.0
        return float({world.read_file("f", limit=100) for _ in range(200)} == {b"honest"})

    own = EpisodeWorld(Judged(judge=judge), MACHINE)
    assert own.open()
    forge = "(setsid sh -c 'while :; do echo forged > f; done' &); sleep 0.1; echo started"
    assert run(own, "bash", command=forge).head == b"started\n"
    forge = "import os\nif not os.fork():\n    while True: open('f', 'w').write('forged')"
    assert run(own, "python", code=forge).status is Status.OK
    assert judge("", own._world) == 0.0  # the processes are running
    assert own.finish("") == 1.0


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, -0.1, 1.5])
def test_score_out_of_range_is_an_error_naming_the_task(score):
    own = EpisodeWorld(Judged(judge=lambda answer, world: score), MACHINE)
    assert own.open()
    with pytest.raises(ScoreError, match=r"judged/train/0 is .*outside its reward_range \[0, 1\]"):
        own.finish("")


def test_task_with_its_world_needs_no_sandbox(monkeypatch):
    class Counter:
        timeout, cwd, closed = 1.0, "", 0
        steps = 0

        def go(self, direction):
            self.steps += 1
            return CommandResult(Status.OK, 0, b"at %d" % self.steps, b"", 0, 0.0, "")

        def kill_processes(self):
            pass

        def close(self):
            self.closed += 1

    world = Counter()

    class Walk(Judged):
        def world(self):
            return world

    monkeypatch.setattr(environment, "Sandbox", None)
    own = EpisodeWorld(Walk(tools=("go",), judge=lambda answer, world: float(world.steps == 2)), MACHINE)
    assert own.open()
    assert run(own, "go", direction="n").head == b"at 1"
    assert run(own, "go", direction="n").head == b"at 2"
    assert (own.finish(""), world.closed, own.limits_by) == (1.0, 1, "")


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(0), KeyboardInterrupt(), SandboxError("no such file")])
def test_whatever_a_score_raises_is_its_lowest_reward_from_0_and_is_kept(error):
    class Positive(Judged):
        reward_range = (0.5, 1.0)

    def judge(answer, world):
        raise error

    for task, reward in ((Judged, 0.0), (Positive, 0.5)):
        own = EpisodeWorld(task(judge=judge), MACHINE)
        assert own.open()
        assert own.finish("") == reward
        (raised,) = own.raised
        assert raised.startswith(f"the score of task judged/train/0 raised {type(error).__name__} ({__file__}:")
        assert own.fault == ""


def test_a_sandbox_that_dies_while_it_is_scored_is_the_machines_fault():
    def judge(answer, world):
        raise SandboxBroken("injected")

    own = EpisodeWorld(Judged(judge=judge), MACHINE)
    assert own.open()
    assert own.finish("") is None
    assert (own.fault, own.raised) == ("injected", [])


@pytest.mark.parametrize(
    ("made", "seen"),
    [
        (KeyError("oak"), b"KeyError: 'oak'\n"),
        (SystemExit(0), b"SystemExit: 0\n"),
        ("text", b"TypeError: it returned a str; it must return a CommandResult\n"),
        (
            CommandResult(Status.OK, 0, "text", b"", 0, 0.0, ""),
            b"its result has head = 'text'; it must be bytes",
        ),
        (SandboxError("f: not a file"), b"f: not a file\n"),
        (ValueError("x" * 4096), b"x" * 100),
    ],
)
def test_whatever_a_tool_raises_or_returns_is_an_observation(made, seen):
    class Broken:
        def run(self, world, arguments):
            if isinstance(made, BaseException):
                raise made
            return made

    own = EpisodeWorld(Judged(), MACHINE)
    assert own.open()
    result = own.run("broken", Broken(), {}, 1.0)
    assert (result.status, result.exit_code) == (Status.NONZERO, 1)
    assert seen in result.head + result.tail
    assert len(result.head + result.tail) <= MACHINE.limits.output_bytes
    assert bool(own.raised) != isinstance(made, SandboxError)
    own.close()


@pytest.mark.parametrize("files", [{"../x": b""}, {"x": 7}])
def test_files_that_cannot_be_are_the_tasks_fault(files):
    own = EpisodeWorld(Judged(files=files), MACHINE)
    assert not own.open()
    assert own.fault.startswith("the files of task judged/train/0 raised ")
    own.close()
