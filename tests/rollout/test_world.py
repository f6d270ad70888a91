"""Laws of an episode's world: separate budgets, scores in range, worlds without a sandbox."""

import dataclasses
import json
import math
import shlex
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echo_jax.render import BuiltinRenderer, Part
from echo_jax.render.calls import GRAMMARS, Call
from echo_jax.roles import Role
from echo_jax.rollout import world as environment
from echo_jax.rollout.episode import observation_parts
from echo_jax.rollout.world import START_ATTEMPTS, EpisodeWorld, Machine
from echo_jax.tasks.task import Task
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import CommandResult, Limits, Sandbox, SandboxBroken, SandboxError, Status

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
def test_score_out_of_range_counts_as_an_exception_of_the_score(score):
    """The agent may have written the number that the score read."""
    own = EpisodeWorld(Judged(judge=lambda answer, world: score), MACHINE)
    assert own.open()
    assert own.finish("") == 0.0
    [raised] = own.raised
    assert raised == own.score_raised
    assert raised.startswith("the score of task judged/train/0 raised ScoreError")
    assert "outside the reward_range [0, 1]" in raised


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


@pytest.mark.parametrize("acted", [False, True])
@pytest.mark.parametrize("where", ["kill", "score", "supervisor"])
def test_a_sandbox_that_dies_after_a_call_costs_the_agent_and_before_it_nobody(acted, where, monkeypatch):
    class Ranged(Judged):
        reward_range = (-1.0, 1.0)

    def die(*arguments):
        raise SandboxBroken("injected")

    own = EpisodeWorld(Ranged(judge=die if where == "score" else lambda answer, world: 1.0), MACHINE)
    assert own.open()
    if acted:
        assert run(own, "bash", command=":").status is Status.OK
    if where == "kill":
        monkeypatch.setattr(own._world, "kill_processes", die)
    elif where == "supervisor":
        own._world.close()
    assert own.finish("") == (-1.0 if acted else None)
    assert (own.broken, own.raised) == (acted, [])
    assert own.fault == ("the sandbox is closed" if where == "supervisor" else "injected")


def test_a_call_in_which_the_sandbox_dies_costs_the_reward_even_if_the_score_needs_no_sandbox():
    own = EpisodeWorld(Judged(judge=lambda answer, world: 1.0), MACHINE)
    assert own.open()
    own._world.close()
    assert run(own, "bash", command=":").status is Status.INFRA
    assert own.finish("") == 0.0
    assert own.broken


class Mute(Exception):
    """An exception that cannot tell its message."""

    def __str__(self):
        raise RuntimeError("mute")


EXCEPTIONS = st.one_of(
    st.builds(
        lambda kind, text: kind(text),
        st.sampled_from(
            [ValueError, OverflowError, RecursionError, MemoryError, KeyError, SystemExit, SandboxError, Mute]
        ),
        st.text(st.one_of(st.characters(), st.characters(categories=["Cs"])), max_size=20),
    ),
    st.builds(lambda data: UnicodeDecodeError("utf-8", data, 0, 1, "made up"), st.binary(min_size=1)),
    st.builds(lambda text: ExceptionGroup("g", [ValueError(text), Mute()]), st.text()),
    st.sampled_from([KeyboardInterrupt(), GeneratorExit(), StopIteration(1), AssertionError(), BaseException("x")]),
)


@given(EXCEPTIONS, st.booleans())
@settings(deadline=None)
def test_no_exception_of_a_tool_or_score_leaves_the_world(error, in_tool):
    class Still:
        timeout, cwd = 1.0, "/work"

        def kill_processes(self):
            pass

        close = kill_processes

    class Raises(Judged):
        def world(self):
            return Still()

        def run(self, world, arguments):
            raise error

        def score(self, episode):
            raise error

    own = EpisodeWorld(Raises(), MACHINE)
    assert own.open()
    if in_tool:
        result = own.run("broken", Raises(), {}, 1.0)
        assert result.status is Status.NONZERO
    assert own.finish("") == 0.0
    assert len(own.raised) == 1 + (in_tool and not isinstance(error, SandboxError))
    assert all(type(error).__name__ in text for text in own.raised)
    "".join(own.raised).encode()  # so that it can be printed


# -- text that UTF-8 cannot encode -------------------------------------------------------------------------------------

TEXT = st.text(
    st.one_of(st.characters(), st.characters(categories=["Cs"]), st.sampled_from("/.\0\n'\"\\")), max_size=12
)
TOKENIZER = SentencePieces()


@pytest.fixture(scope="module")
def lasting():
    own = EpisodeWorld(Judged(), dataclasses.replace(MACHINE, backend="auto"))
    assert own.open()
    yield own
    own.close()


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_in_a_call_leads_to_an_observation(lasting, data):
    """Half an emoji is valid in JSON, and what no UTF-8 can encode reaches every argument."""
    name = data.draw(st.sampled_from(["read", "write", "edit", "bash", "python", "sqlite"]))
    fields = TOOLS[name].parameters["properties"]
    path = st.one_of(TEXT, st.sampled_from(["/tmp/\ud83d", "\ud83d", "a/\udcff", "f"]))
    arguments = {key: data.draw(path if key in ("path", "database") else TEXT) for key in fields}
    if name == "bash":
        arguments["command"] = f"echo {shlex.quote(arguments['command'])}"
    if name == "python":
        arguments["code"] = f"print({arguments['code']!r})"
    grammar = data.draw(st.sampled_from(["json", "llama"]))
    body = {"name": name, ("arguments" if grammar == "json" else "parameters"): arguments}
    text = json.dumps(body)
    text = f"<tool_call>{text}</tool_call>" if grammar == "json" else text
    [attempt] = GRAMMARS[grammar].parse(text, TOOLS)
    assert attempt == Call(name, arguments)
    result = run(lasting, name, **attempt.arguments)
    assert result.status in (Status.OK, Status.NONZERO)
    assert lasting.raised == []
    assert BuiltinRenderer(TOKENIZER).observation(observation_parts(result)).ids


@given(TEXT, TEXT, st.sampled_from(sorted(GRAMMARS)))
@settings(deadline=None)
def test_any_text_that_is_no_call_leads_to_feedback(name, rest, grammar):
    body = json.dumps({"name": name, "arguments": {rest: rest}, "parameters": {rest: rest}})
    for text in (f"{name} {rest}", body, f"<tool_call>{body}</tool_call>", f"<tool_call>{rest}", f"<think>{name}"):
        for attempt in GRAMMARS[grammar].parse(text, TOOLS):
            if not isinstance(attempt, Call):
                assert BuiltinRenderer(TOKENIZER).observation([Part(attempt.message, Role.FEEDBACK)]).ids


def test_half_an_emoji_as_a_path_is_refused(lasting):
    for path in ("/tmp/\ud83d", "\ud83d", "a/\ud83d"):
        for name, more in (("read", {}), ("write", {"content": "x"}), ("edit", {"old": "a", "new": "b"})):
            assert run(lasting, name, path=path, **more).status is Status.NONZERO
    assert run(lasting, "write", path="f", content="\ud83d").status is Status.OK
    assert lasting.raised == []


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
        (CommandResult(Status.OK, "0", b"", b"", 0, 0.0, ""), b"its result has exit_code = '0'; it must be int | None"),
        (CommandResult(Status.OK, 0, b"", b"", None, 0.0, ""), b"its result has dropped_bytes = None; it must be int"),
        (CommandResult(Status.OK, 0, b"", b"", 0, None, ""), b"its result has seconds = None; it must be float | int"),
        (CommandResult(Status.OK, 0, b"", b"", 0, math.nan, ""), b"its result has seconds = nan; it must be a finite"),
        (
            CommandResult(Status.OK, 0, b"", b"", 0, 0.0, "", speaker="oak"),
            b"its result has speaker = 'oak'; choose one of tool, user, system",
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


def test_a_speaker_that_the_chat_format_cannot_show_is_an_exception_of_the_tool():
    class Says:
        def run(self, world, arguments):
            return CommandResult(Status.OK, 0, b"hello", b"", 0, 0.0, "", **arguments)

    own = EpisodeWorld(Judged(), MACHINE, speakers=("tool", "user"))
    assert own.open()
    assert own.run("says", Says(), {"speaker": "user"}, 1.0).head == b"hello"
    refused = own.run("says", Says(), {"speaker": "system"}, 1.0)
    assert (refused.status, refused.speaker) == (Status.NONZERO, "tool")
    assert b"shows no message after a turn; choose one of tool, user" in refused.head + refused.tail
    assert len(own.raised) == 1
    own.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing(Judged):
    reads_places = True


def test_a_task_knows_where_the_shell_stood_if_its_class_asks_for_it():
    def stood(answer, world):
        return float(world.places == ["/work/d", "/tmp", "/work/d"])

    for kind, reward, raised in ((Standing, 1.0, 0), (Judged, 0.0, 1)):
        own = EpisodeWorld(kind(judge=stood, files={"d/f": b""}, setup="cd d"), MACHINE)
        assert own.open()
        for command in ("cd /tmp", "cd /work/d"):
            run(own, "bash", command=command)
        assert own.finish("") == reward
        assert len(own.raised) == raised
        assert all("set reads_places = True in the class of the task" in text for text in own.raised)


@pytest.mark.parametrize("files", [{"../x": b""}, {"x": 7}])
def test_files_that_cannot_be_are_the_tasks_fault(files):
    own = EpisodeWorld(Judged(files=files), MACHINE)
    assert not own.open()
    assert own.fault.startswith("the files of task judged/train/0 raised ")
    own.close()


def test_a_start_that_succeeds_forgets_why_an_earlier_one_failed(monkeypatch):
    starts = []

    def start(**options):
        starts.append(options)
        if len(starts) == 1:
            raise SandboxBroken("injected")
        return Sandbox(**options)

    monkeypatch.setattr(environment, "Sandbox", start)
    world = EpisodeWorld(Judged(), MACHINE)
    assert world.open()
    assert (len(starts), world.fault) == (2, "")
    world.close()
