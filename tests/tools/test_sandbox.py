"""The sandbox's laws, tested on real sandboxes: every call is bounded in time and memory, and the next call works."""

import concurrent.futures
import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from echo_jax.tools import cgroup, processes, sandbox, seccomp, supervisor
from echo_jax.tools.sandbox import Limits, Sandbox, SandboxBroken, SandboxError, SandboxUnavailable, Status

SMALL = Limits(
    timeout_seconds=5.0, memory_bytes=128 << 20, disk_bytes=8 << 20, processes=24, open_files=64, output_bytes=4096
)


@pytest.fixture(scope="module")
def way():
    """The best way to make sandboxes that this host allows; `test_sandbox_ways.py` tests the others."""


def test_a_host_that_forks_sandboxes_gives_roots_users_of_their_own():
    found = sandbox._accepted("auto")
    if not found.forks:
        pytest.skip("this host takes no fork server")
    if os.getuid() == 0 and not found.apart:
        pytest.skip("this host maps no users")
    assert found.apart == (os.getuid() == 0)


@pytest.fixture(scope="module")
def shared(way):
    """One sandbox for all tests that leave it usable; sharing it tests that the next call always works."""
    with Sandbox(limits=SMALL) as box:
        yield box


@pytest.fixture
def box(shared):
    shared.run("cd /work")
    yield shared
    shared.kill_processes()
    result = shared.run("cd /work; rm -rf /work/* /work/.[!.]* /tmp/*; echo works")
    assert (result.status, result.head) == (Status.OK, b"works\n")


@pytest.fixture
def fresh():
    with Sandbox(limits=SMALL) as box:
        yield box
        assert output(box, "cd /work; echo works") == "works\n"


def output(box, command, **options):
    result = box.run(command, **options)
    assert result.status in (Status.OK, Status.NONZERO, Status.SIGNAL, Status.OOM, Status.LIMIT), result
    assert result.dropped_bytes == 0
    return (result.head + result.tail).decode("utf-8", "replace")


def processes_inside(box):
    return set(output(box, "echo /proc/[0-9]*").split()) - {"/proc/1"}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- statuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status", "exit_code"),
    [
        ("true", Status.OK, 0),
        ("", Status.OK, 0),
        ("# only a comment", Status.OK, 0),
        ("exit 3", Status.NONZERO, 3),
        ("false", Status.NONZERO, 1),
        ("no_such_command_here", Status.NONZERO, 127),
        ("if then (", Status.NONZERO, 2),
        ("kill -9 $$", Status.SIGNAL, 137),
        ("kill -TERM $$", Status.SIGNAL, 143),
        ("trap 'exit 7' TERM; kill $$", Status.NONZERO, 7),
        ("trap 'echo mine' EXIT", Status.OK, 0),
        ("exec false", Status.NONZERO, 1),
        ("sh -c 'kill -9 $$'", Status.NONZERO, 137),
    ],
)
def test_exit_code_is_the_shells(box, command, status, exit_code):
    result = box.run(command)
    assert (result.status, result.exit_code) == (status, exit_code)


def test_nul_byte_gets_an_answer_not_a_crash(box):
    result = box.run("echo a\0b")
    assert result.status is Status.NONZERO
    assert b"NUL" in result.head


def test_command_too_long_for_the_kernel_gets_an_answer(box):
    result = box.run("echo " + "x" * (1 << 18))
    assert (result.status, result.exit_code) == (Status.NONZERO, 126)
    assert box.run("#" + "x" * (sandbox.MAX_COMMAND_BYTES - 1)).status is Status.OK


def test_non_utf8_bytes_reach_the_shell(box):
    assert box.run("printf %s 'a\udcffb'").head == b"a\xffb"
    assert box.run(b"printf %s 'a\xffb'").head == b"a\xffb"
    assert box.run("printf %s '\ud800'").head == b"\xed\xa0\x80"  # a lone surrogate, as JSON may hold one


@pytest.mark.parametrize("command", ["cat", "read line || echo none", "python3 -i", "cat <<E\nE", "cat - | cat"])
def test_standard_input_is_at_its_end(box, command):
    assert box.run(command).seconds < 2


def test_a_here_document_is_read(box):
    assert output(box, "cat <<'E' | tr a-z A-Z\none\ntwo\nE") == "ONE\nTWO\n"


def test_a_pager_does_not_wait(box):
    assert output(box, "echo text > f; $PAGER f; less f < /dev/null | head -1").startswith("text\n")


# -- output --------------------------------------------------------------------------------------------------------


def test_both_streams_arrive_in_the_order_they_were_written(box):
    assert output(box, "echo 1; echo 2 >&2; echo 3; echo 4 >&2") == "1\n2\n3\n4\n"


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 4095, 4096, 4097, 70_000])
def test_head_tail_and_dropped_count_make_up_the_whole_output(box, size):
    result = box.run(f"python3 -c \"import sys; sys.stdout.write(''.join(chr(97 + i % 26) for i in range({size})))\"")
    whole = bytes(97 + i % 26 for i in range(size))
    assert len(result.head) + result.dropped_bytes + len(result.tail) == size
    assert result.dropped_bytes == max(0, size - SMALL.output_bytes)
    assert whole.startswith(result.head)
    assert whole.endswith(result.tail)


def test_endless_output_takes_no_memory_and_is_stopped(box):
    before = resident_bytes()
    result = box.run("yes", timeout=60)
    assert (result.status, result.exit_code) == (Status.OUTPUT_LIMIT, None)
    assert 0 <= result.dropped_bytes + SMALL.output_bytes - SMALL.flood_bytes < 1 << 20
    assert (result.head + result.tail).replace(b"y\n", b"") in (b"", b"y")
    assert result.seconds < 20
    assert resident_bytes() - before < 32 << 20
    assert box.run("yes > /dev/null", timeout=0.3).status is Status.TIMEOUT


def test_200_megabytes_without_a_newline_are_counted_exactly(box):
    result = box.run("head -c 200000000 /dev/zero | tr '\\0' x")
    assert result.status is Status.OK
    assert result.dropped_bytes == 200_000_000 - SMALL.output_bytes


def test_a_gigabyte_without_a_newline_is_bounded(box):
    before = resident_bytes()
    result = box.run("head -c 1G /dev/zero | tr '\\0' x", timeout=60)
    assert result.status is Status.OUTPUT_LIMIT
    assert len(result.head + result.tail) == SMALL.output_bytes
    assert resident_bytes() - before < 32 << 20


def test_random_bytes_survive(box):
    result = box.run("head -c 4000 /dev/urandom | tee f; sha256sum f > g")
    assert len(result.head + result.tail) == 4000
    assert box.read_file("f", limit=4000) == result.head + result.tail


def test_control_sequences_are_left_as_they_are(box):
    assert box.run(r"printf '\033[31mred\033[0m\000\377'").head == b"\033[31mred\033[0m\0\377"


# -- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "sleep 30 & echo hi",
        "setsid sleep 30 & echo hi",
        "(sleep 30 & ) & echo hi",
        "nohup sleep 30 > /dev/null 2>&1 & echo hi",
        "(trap '' TERM HUP; sleep 30) & disown; echo hi",
        "python3 -c 'import os,time\nif not os.fork():\n os.setsid()\n if not os.fork(): time.sleep(30)'; echo hi",
    ],
)
def test_call_ends_with_its_shell_whatever_holds_the_pipe(box, command):
    result = box.run(command)
    assert (result.status, result.head) == (Status.OK, b"hi\n")
    assert result.seconds < 2
    assert processes_inside(box)
    box.kill_processes()
    assert len(processes_inside(box)) <= 1


@pytest.mark.parametrize(
    "command",
    [
        "sleep 30",
        "trap '' TERM INT HUP; while :; do sleep 1; done",
        "setsid sleep 30 & (sleep 30 &) ; sleep 30",
        "bash -c 'kill -STOP $$'",
        "exec >&-; exec 2>&-; sleep 30",
        "cat /dev/zero > /dev/null",
        "mkfifo p; cat p",
    ],
)
def test_nothing_outlives_a_time_out(box, command):
    result = box.run(command, timeout=0.2)
    assert (result.status, result.exit_code) == (Status.TIMEOUT, None)
    assert result.seconds < 2
    assert len(processes_inside(box)) <= 1  # the shell that lists them


def test_output_before_the_time_out_is_kept(box):
    assert box.run("echo before; sleep 30", timeout=0.3).head == b"before\n"


def test_background_output_does_not_delay_later_calls(box):
    assert box.run("yes & echo hi").seconds < 1
    for _ in range(5):
        assert output(box, "echo next") == "next\n"


def test_background_process_keeps_running_between_calls(box):
    box.run("(while :; do date +%N > tick; head -c 100000 /dev/zero; sleep 0.01; done) &")
    ticks = set()
    for _ in range(5):
        time.sleep(0.05)
        ticks.add(box.read_file("tick", limit=100))
    assert len(ticks) > 2


def test_killing_everything_ends_only_the_call(box):
    assert b"left\n" in box.run("sleep 30 & kill -9 -1; echo left").head
    assert box.run("kill -9 1; kill -INT 1; kill -TERM 1; kill -CHLD 1; kill -STOP 1; echo alive").status is Status.OK


@pytest.mark.parametrize("bomb", [":(){ :|:& };:", "f(){ f & f; }; f", "while :; do sleep 30 & done"])
def test_a_fork_bomb_is_bounded(fresh, bomb):
    result = fresh.run(bomb, timeout=1.0)
    assert result.seconds < 6
    assert fresh.run("echo next", timeout=3.0).status in (Status.OK, Status.TIMEOUT, Status.SIGNAL)
    fresh.kill_processes()


def test_process_limit_is_enforced(fresh):
    count = """
        import os, signal, time
        children = []
        try:
            while len(children) < 500:
                child = os.fork()
                if child == 0:
                    time.sleep(9)
                children.append(child)
        except BlockingIOError:
            print(len(children))
    """
    fresh.write_files({"count.py": textwrap.dedent(count).encode()})
    result = fresh.run("python3 count.py")
    if fresh.limits_by.endswith("polled"):
        assert result.exit_code == 137
    else:
        assert SMALL.processes - 3 <= int(result.head) < SMALL.processes
    fresh.kill_processes()


def test_orphans_do_not_stay_as_zombies(box):
    box.run("for i in 1 2 3 4 5; do (sleep 0.05 &) ; done")
    time.sleep(0.3)
    pid = box._jail._pid
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


def test_signals_have_their_usual_effect(box):
    assert output(box, "yes | head -1; echo ${PIPESTATUS[0]}") == "y\n141\n"
    assert output(box, "sh -c 'kill -INT $$; echo survived' 2>&1; echo $?") == "130\n"


# -- limits --------------------------------------------------------------------------------------------------------


def test_memory_hog_is_killed_and_reported_as_out_of_memory(fresh):
    result = fresh.run("python3 -c \"x = bytearray(1 << 30); print('got', 'it')\"")
    assert b"got it" not in result.head
    if fresh.limits_by.startswith("cgroup"):
        assert (result.status, result.exit_code) == (Status.OOM, 137)
    else:
        assert b"MemoryError" in result.head + result.tail
    assert fresh.run("sort -S 1G /dev/zero").status in (Status.OOM, Status.NONZERO)


def test_many_hogs_together_stay_under_the_limit(fresh):
    if not fresh.limits_by.startswith("cgroup"):
        return  # memory is limited per process, see `limits_by`
    hog = "python3 -c 'import time; x = bytearray(40 << 20); time.sleep(3)' &"
    result = fresh.run(f"{hog} {hog} {hog} {hog} {hog} wait -n; wait; jobs; exit 5", timeout=10)
    assert result.status is Status.OOM


def test_out_of_memory_is_reported_for_the_call_that_caused_it(fresh):
    if fresh.limits_by.startswith("cgroup"):
        hog = "python3 -c 'bytearray(1 << 30)'"
        assert fresh.run(f"{hog}; true").status is Status.OK
        assert fresh.run("false").status is Status.NONZERO
        assert fresh.run(hog).status is Status.OOM
        assert fresh.run("false").status is Status.NONZERO


HOLD = """
import os, socket, sys, time

def tcp():
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    return client, server.accept()[0]

def pipe():
    read, write = os.pipe()
    return os.fdopen(write, "wb", buffering=0), read

def memory_file():
    return open(os.memfd_create("m"), "wb", buffering=0), None

make = {"unix": socket.socketpair, "tcp": tcp, "pipe": pipe, "memory file": memory_file}[sys.argv[1]]
for _ in range(20):
    if os.fork() == 0:
        held, ends = 0, []
        try:
            while True:
                ends.append(make())
                fd = ends[-1][0].fileno()
                os.set_blocking(fd, False)
                try:
                    for _ in range(100):
                        held += os.write(fd, bytes(65536))
                except BlockingIOError:
                    pass
        except OSError:  # no more descriptors
            print(held, flush=True)
            time.sleep(2)
            os._exit(0)
time.sleep(3)
"""


@pytest.mark.parametrize("kind", ["unix", "tcp", "pipe", "memory file"])
def test_what_the_kernel_holds_for_processes_is_under_the_limit(kind):
    with Sandbox(limits=SMALL, files={"hold.py": HOLD.encode()}) as box:
        if not box.limits_by.startswith("cgroup"):
            return  # see `limits_by`
        result = box.run(f"python3 hold.py '{kind}'")
    held = sum(int(line) for line in result.head.decode().splitlines() if line.isdecimal())
    assert result.status is Status.OOM or 0 < held < SMALL.memory_bytes, result


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_time_out_must_be_positive_and_finite(box, timeout):
    with pytest.raises(ValueError, match="positive"):
        box.run("true", timeout=timeout)


def test_full_disk_is_a_command_error_not_out_of_memory(box):
    for folder in ("/work", "/tmp", "/dev/shm", "/var/tmp"):
        text = output(box, f"for i in 1 2 3; do head -c 6M /dev/zero > {folder}/f$i; done; rm {folder}/f?")
        assert "No space left" in text
    result = box.run("for i in 1 2 3; do head -c 6M /dev/zero > f$i; done")
    assert (result.status, result.exit_code, result.limit) == (Status.LIMIT, 1, "disk")
    assert output(box, "mkdir -p /tmp/d; cd /tmp/d; export KEPT=1") == ""
    assert output(box, "echo $KEPT; pwd") == "1\n/tmp/d\n"


def test_file_size_is_limited(box):
    result = box.run("truncate -s 1G f")
    assert result.status is not Status.OK
    assert box.run("test $(stat -c %s f) -le 8388608").status is Status.OK


def test_open_files_are_limited(box):
    assert "Too many open files" in output(box, "python3 -c 'x = [open(\"/dev/null\") for _ in range(100)]' 2>&1")


def test_processor_time_is_limited():
    with Sandbox(limits=Limits(timeout_seconds=1.0, cpu_seconds=2)) as box:
        result = box.run("ulimit -t; ulimit -c")
        assert result.head == b"2\n0\n"
        burn = "import time; end = time.process_time() + 0.8\nwhile time.process_time() < end: pass"
        results = [box.run_python(burn, timeout=20) for _ in range(3)]
        assert [r.status for r in results] == [Status.OK, Status.OK, Status.LIMIT]
        assert results[-1].limit == "cpu"


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        ("for i in 1 2; do head -c 6M /dev/zero > f$i; done", "disk"),
        ("for i in 1 2; do head -c 6M /dev/zero > /dev/shm/f$i; done", "disk"),
        ("head -c 9M /dev/zero > f", "file_size"),
        ("truncate -s 9M f", "file_size"),
        ("python3 -c 'x = [open(\"/dev/null\") for _ in range(100)]'", "open_files"),
        (
            'python3 -c \'import os\nfor _ in range(99):\n if not os.fork(): os.execlp("sleep", "sleep", "9")\'',
            "processes",
        ),
    ],
)
def test_each_limit_has_a_name(box, command, limit):
    result = box.run(command)
    assert result.status is Status.LIMIT or (limit == "processes" and not box.limits_by.startswith("cgroup")), result
    assert result.limit in (limit, "" if limit == "processes" else limit)
    assert box.run("true; rm -f f* /dev/shm/f*").status is Status.OK


def test_limit_is_reported_only_for_failed_calls(box):
    assert box.run("head -c 7M /dev/zero > f; head -c 7M /dev/zero > g; true").status is Status.OK
    result = box.run("false")  # the disk is still full
    assert (result.status, result.limit) == (Status.LIMIT, "disk")
    box.run("rm f g")
    assert box.run("false").status is Status.NONZERO


def test_a_million_files_are_bounded(fresh):
    """Each file takes kernel memory, which the control group counts."""
    if fresh.limits_by.startswith("cgroup"):
        many = "for i in range(10**6): open('/tmp/' + 'x' * 200 + str(i), 'w')"
        result = fresh.run(f'python3 -c "{many}"', timeout=30)
        assert result.status is Status.OOM or result.limit == "inodes"


@pytest.mark.parametrize(
    "bad",
    [{"disk_bytes": 1 << 30}, {"output_bytes": 0}, {"processes": 0}, {"timeout_seconds": 0.0}],
)
def test_impossible_limits_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Limits(**bad)


# -- the interpreter ---------------------------------------------------------------------------------------------


RESTARTED = b"[a fresh interpreter: the last one ended]\n"


def test_the_interpreter_remembers_and_prints_a_last_expression(fresh):
    assert fresh.run_python("import math\nx = 6").head == b""
    assert fresh.run_python("def f(y):\n    return x * y\nf(7)").head == b"42\n"
    assert fresh.run_python("None").head == b""
    assert fresh.run_python("print('a'); import sys; print('b', file=sys.stderr); 'c'").head == b"a\nb\n'c'\n"
    assert fresh.run_python("").status is Status.OK
    fresh.write_files({"m.py": b"y = 3\n"})
    assert fresh.run_python("import m; m.y").head == b"3\n"


def test_exception_shows_the_agents_lines_and_keeps_variables(fresh):
    fresh.run_python("x = 1\ndef f():\n    return 1 / 0")
    result = fresh.run_python("x = 2\nf()")
    assert (result.status, result.exit_code) == (Status.NONZERO, 1)
    text = result.head.decode()
    assert text.count("File") == 2
    assert text.endswith("ZeroDivisionError: division by zero\n")
    assert "return 1 / 0" in text
    assert fresh.run_python("x").head == b"2\n"
    assert b"SyntaxError" in fresh.run_python("x = (").head
    assert fresh.run_python("input()").exit_code == 1
    assert fresh.run_python("raise KeyboardInterrupt").exit_code == 1
    assert fresh.run_python("'\udcff'").exit_code == 1
    assert fresh.run_python("a\0b").exit_code == 126
    assert fresh.run_python("x").head == b"2\n"


@pytest.mark.parametrize(
    ("code", "status", "exit_code"),
    [
        ("exit(3)", Status.NONZERO, 3),
        ("import os; os._exit(0)", Status.OK, 0),
        ("import os; os.kill(os.getpid(), 9)", Status.SIGNAL, 137),
        ("while True: pass", Status.TIMEOUT, None),
        pytest.param(
            "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()",
            Status.TIMEOUT,
            None,
            marks=pytest.mark.variant,
        ),
        pytest.param("import os; os.kill(os.getpid(), 19)", Status.TIMEOUT, None, marks=pytest.mark.variant),
        ("while True: print('y' * 1000)", Status.OUTPUT_LIMIT, None),
        ("import os; os.close(1); os.close(2)", Status.OK, 0),
        ("import os, time; os.closerange(3, 99); time.sleep(60)", Status.SIGNAL, 137),
    ],
)
def test_ended_interpreter_is_replaced_and_the_output_says_so(fresh, code, status, exit_code):
    fresh.run_python("x = 1")
    result = fresh.run_python(code, timeout=20 if status is Status.OUTPUT_LIMIT else 1)
    assert (result.status, result.exit_code) == (status, exit_code), result
    after = fresh.run_python("'x' in globals()")
    assert (after.status, after.head) == (Status.OK, RESTARTED + b"False\n")
    assert fresh.run_python("1").head == b"1\n"


def test_forged_end_of_call_harms_only_that_call(fresh):
    forge = "import os\nfor fd in range(3, 20):\n    try: os.write(fd, bytes(9))\n    except OSError: pass"
    assert fresh.run_python(forge + "\nimport time; time.sleep(60)", timeout=5).seconds < 2
    assert fresh.run_python("1", timeout=1).status in (Status.OK, Status.TIMEOUT)
    assert fresh.run("echo fine").head == b"fine\n"
    fresh.kill_processes()
    assert fresh.run_python("1").head == RESTARTED + b"1\n"


THIEF = """
import os, time
own = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
if os.fork() == 0:
    while True:
        try:
            os.read(own, 65536)
        except BlockingIOError:
            pass
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    os.write(1, b"x")
"""


@pytest.mark.parametrize("tool", ["run_python", "run"])
def test_agent_that_reads_back_its_output_loses_only_that_output(fresh, tool):
    fresh.write_files({"thief.py": THIEF.format(seconds=0.5).encode()})
    commands = {"run_python": THIEF.format(seconds=0.5), "run": "python3 thief.py"}
    result = getattr(fresh, tool)(commands[tool], timeout=3)
    assert result.status in (Status.OK, Status.TIMEOUT), result
    time.sleep(0.3)  # the thief is still running
    assert fresh.run_python("1").status is Status.OK
    assert fresh.run("true").status is Status.OK
    fresh.kill_processes()
    assert fresh.run("echo next").head == b"next\n"


def test_out_of_memory_that_kills_the_sandbox_is_not_an_infrastructure_fault():
    """The agent holds memory that no process maps, so the kernel is as likely to kill the supervisor."""
    hoard = """
        import os
        open("/proc/self/oom_score_adj", "w").write("0")
        held = [os.memfd_create("x") for _ in range(4)]
        while True:
            for fd in held:
                os.write(fd, bytes(1 << 20))
    """
    with Sandbox(limits=SMALL) as box:
        if not box.limits_by.startswith("cgroup"):
            return
        box.write_files({"hoard.py": textwrap.dedent(hoard).encode()})
        for _ in range(3):
            assert box.run("python3 hoard.py > /dev/null 2>&1 &").status in (Status.OK, Status.OOM)
            time.sleep(0.5)
            assert box.run("true").status in (Status.OK, Status.OOM)
            try:
                box.kill_processes()
            except sandbox.SandboxUsedUp:
                assert box.run("true").status is Status.OOM
                assert box.run_python("1").status is Status.OOM
                break


def test_supervisor_killed_for_lack_of_memory_counts_as_the_agents_fault(monkeypatch):
    with Sandbox(limits=SMALL) as box:
        counts = box._jail._counts()
        monkeypatch.setattr(box._jail, "_counts", lambda: (counts[0] + 1, counts[1]))  # between two calls
        os.kill(box._jail._pid, signal.SIGKILL)
        with pytest.raises(sandbox.SandboxUsedUp):
            box.kill_processes()
        assert box.run("true").status is Status.OOM
        with pytest.raises(sandbox.SandboxUsedUp):
            box.read_file("x", limit=1)


def test_agents_modules_do_not_shadow_the_interpreters_modules(fresh):
    fresh.write_files({"token.py": b"raise SystemExit", "ast.py": b"raise SystemExit", "mine.py": b"x = 5"})
    assert fresh.run_python("import mine; mine.x").head == b"5\n"
    assert b"ZeroDivisionError" in fresh.run_python("1 / 0").head


def test_children_of_the_interpreter_do_not_delay_calls(fresh):
    assert fresh.run_python("import os, time\nif not os.fork():\n    time.sleep(60)\n1").head == b"1\n"
    assert fresh.run_python("import subprocess; subprocess.Popen(['sleep', '60']); 2").head == b"2\n"
    assert fresh.run_python("print('x' * 70_000)").dropped_bytes == 70_001 - SMALL.output_bytes
    assert fresh.run("echo fine").head == b"fine\n"


# -- isolation -----------------------------------------------------------------------------------------------------


def test_there_is_no_network(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "refused" in output(box, f"exec 3<>/dev/tcp/127.0.0.1/{port}; echo $?")
    assert box.run("exec 3<>/dev/tcp/1.1.1.1/53", timeout=3).exit_code == 1
    resolve = "python3 -c \"import socket; socket.getaddrinfo('example.com', 80)\""
    assert b"gaierror" in box.run(resolve, timeout=5).head
    assert output(box, "tail -n +3 /proc/net/dev | cut -d: -f1").split() == ["lo"]


def test_abstract_sockets_of_the_host_are_out_of_reach(box):
    name = f"sandbox-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')"
        assert "ConnectionRefusedError" in output(box, f'python3 -c "{code}"')


def test_two_sandboxes_may_use_one_port(box):
    code = "import socket,time; s = socket.create_server(('127.0.0.1', 8080)); print('bound')"
    with Sandbox(limits=SMALL) as other:
        box.run(f'python3 -c "{code}; time.sleep(9)" > log &')
        assert output(other, f'python3 -c "{code}"') == "bound\n"


def test_the_loopback_of_a_sandbox_works(box):
    code = """
        import socket
        server = socket.create_server(("127.0.0.1", 8081))
        client = socket.create_connection(("127.0.0.1", 8081), timeout=5)
        server.accept()[0].sendall(b"heard")
        print(client.recv(5).decode())
    """
    box.write_files({"talk.py": textwrap.dedent(code).encode()})
    assert output(box, "python3 talk.py") == "heard\n"


def test_two_sandboxes_share_no_file_process_semaphore_queue_or_socket(box):
    """Whatever the kernel keeps by name: the one leaves it, the other finds none."""
    leave = """
        import ctypes, os, socket, subprocess
        libc = ctypes.CDLL(None)
        open("/tmp/left", "w").close()
        assert libc.semget(7777, 1, 0o1666) >= 0
        left = socket.socket(socket.AF_UNIX)
        left.bind("\\0left")
        left.listen()
        print("left", os.getpid(), flush=True)
        os.close(1), os.close(2)
        subprocess.run(["sleep", "60"])
    """
    find = """
        import ctypes, os, socket
        libc = ctypes.CDLL(None)
        assert libc.semget(7777, 1, 0) == -1
        assert os.listdir("/tmp") == []
        try:
            socket.socket(socket.AF_UNIX).connect("\\0left")
        except ConnectionRefusedError:
            print("found nothing")
    """
    with Sandbox(limits=SMALL) as other:
        box.write_files({"leave.py": textwrap.dedent(leave.replace("\\\\", "\\")).encode()})
        other.write_files({"find.py": textwrap.dedent(find.replace("\\\\", "\\")).encode()})
        assert output(box, "python3 leave.py & sleep 1").startswith("left ")
        assert output(other, "python3 find.py") == "found nothing\n"
        assert len(processes_inside(other)) == 1
        assert len(processes_inside(box)) == 3  # the shell, python3, and sleep


def test_each_supervisor_has_a_session_of_its_own(fresh, watched):
    """The kernel shares out the CPU among sessions: on a busy host, supervisors of one session would get one share."""
    sessions = {os.getsid(pid) for pid in (0, fresh._jail._pid, watched._jail._pid)}
    assert len(sessions) == 3


def test_a_killed_fork_server_breaks_its_sandboxes_and_the_next_start_works(monkeypatch):
    if not sandbox._accepted("auto").forks:
        pytest.skip("each sandbox is a bwrap of its own")
    own = {}
    monkeypatch.setattr(processes, "_fork_servers", own)
    with Sandbox(limits=SMALL) as lost:
        server = int(Path(f"/proc/{lost._jail._pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(server, signal.SIGKILL)
        assert lost._jail._process.wait(10.0)
        assert lost.run("echo here").status is Status.INFRA
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes._ForkServer, "wait", lambda self, seconds: False)  # before its end is seen
            with pytest.raises(SandboxBroken):
                Sandbox(limits=SMALL)
        time.sleep(0.5)
        with Sandbox(limits=SMALL) as next_one:
            assert output(next_one, "echo here") == "here\n"
    for remaining in own.values():
        remaining.close()


def test_agent_sees_only_listed_variables(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with Sandbox(limits=SMALL) as box:
        names = {line.partition("=")[0] for line in output(box, "env").splitlines()}
        allowed = {name.decode() for name in supervisor.ENVIRONMENT}
        assert allowed <= names <= allowed | {"PWD", "OLDPWD", "SHLVL", "_"}
        assert "hunter2" not in output(box, "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'")


def test_under_root_each_sandbox_is_a_user_of_its_own(box):
    def user(some):
        found = Path(f"/proc/{some._jail._pid}/status").read_text().split("Uid:")[1].split()[:4]
        assert len(set(found)) == 1
        return int(found[0])

    assert output(box, "id -u; id -g; id -G; whoami").split() == ["1000", "1000", "1000", "agent"]
    if sandbox._accepted("auto").apart:
        with Sandbox(limits=SMALL) as other:
            assert len({user(box), user(other), os.getuid()}) == 3
            owner = Path(f"/proc/{box._jail._pid}/root/work").stat().st_uid
            assert owner == user(box)
    else:
        assert user(box) == os.getuid()


def test_agent_does_not_see_host_processes(box):
    assert str(os.getpid()) not in output(box, "cat /proc/[0-9]*/status | grep NSpid").split()
    assert len(output(box, "echo /proc/[0-9]*").split()) == 2
    assert box.run(f"kill -0 {os.getpid()}").status is Status.NONZERO


def test_no_descriptor_is_inherited(box):
    with open(__file__) as held:
        os.set_inheritable(held.fileno(), True)
        with Sandbox(limits=SMALL) as other:
            names = output(other, "for f in /proc/$$/fd/*; do readlink $f; done").splitlines()
            assert len(names) == 3
            assert names[0] == "/dev/null"
            assert all(name.startswith("pipe:") for name in names[1:])
            assert "test_sandbox" not in output(other, "ls -l /proc/1/fd /proc/[0-9]*/fd 2>&1")


def test_no_capability_and_no_new_privileges(box):
    lines = output(box, "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status").split()
    status = dict(zip(lines[::2], lines[1::2], strict=True))
    assert {status[f"Cap{kind}:"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs:"], status["Seccomp:"]) == ("1", "2")
    assert box.run("unshare -U true").status is Status.NONZERO
    assert box.run("mount -t tmpfs none /tmp").status is Status.NONZERO


def test_host_files_are_absent(box):
    for path in ("/etc/shadow", "/root", "/home", str(Path(__file__).parents[2]), str(Path.home()), "/sys", "/boot"):
        assert box.run(f"ls {path}").exit_code == 2, path
    assert "echo_jax" not in output(box, "ls -R / 2> /dev/null | grep -x echo_jax", timeout=30)


def test_no_host_file_can_be_written(box):
    for path in ("/", "/usr", "/etc", "/dev", "/run", "/opt/python", "/opt/python/lib", "/proc", "/proc/sys/kernel"):
        assert box.run(f"touch {path}/new").status is not Status.OK, path
    # Opens without writing: a sandbox that fails here must not change the host.
    for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/usr/bin/bash", "/etc/passwd"):
        assert box.run(f"exec 3>> {path}").status is not Status.OK, path
    writable = "find / -xdev -writable ! -type l; find /proc -writable ! -type l ! -path '/proc/[0-9]*'"
    devices = (f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))
    assert set(output(box, f"({writable}) 2> /dev/null").split()) == {"/work", "/tmp", "/run/shell", *devices}


def test_the_supervisor_is_out_of_reach(box):
    inside = """
        import ctypes, os, resource
        libc = ctypes.CDLL(None, use_errno=True)
        def refused(action):
            try:
                action()
            except OSError:
                return True
        assert refused(lambda: resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)))
        assert refused(lambda: os.sched_setaffinity(1, {0}))
        assert refused(lambda: os.setpriority(os.PRIO_PROCESS, 1, 19))
        assert refused(lambda: os.setpriority(os.PRIO_USER, 0, 19))
        assert refused(lambda: os.setpriority(os.PRIO_PGRP, 0, 19))
        os.setpriority(os.PRIO_PROCESS, 0, 5)  # itself, as nice does
        for path in ("fd/0", "fd/1", "mem", "environ", "root", "oom_score_adj"):
            assert refused(lambda: open("/proc/1/" + path)), path
            assert refused(lambda: open("/proc/1/task/1/" + path)), path
        assert libc.ptrace(16, 1, 0, 0) == -1
        print("refused")
    """
    box.write_files({"try.py": textwrap.dedent(inside).encode()})
    assert output(box, "python3 try.py") == "refused\n"


def test_filter_refuses_what_namespaces_leave_open(box):
    inside = """
        import ctypes, errno, socket
        libc = ctypes.CDLL(None, use_errno=True)
        for family in (40, 38, 17, 16):  # vsock, kernel crypto, packets, netlink
            try:
                socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                assert error.errno == errno.EAFNOSUPPORT, error
            else:
                raise AssertionError(family)
        socket.socket(socket.AF_INET); socket.socket(socket.AF_INET6); socket.socket(socket.AF_UNIX)
        import platform
        numbers = {
            "x86_64": (250, 425, 29, 68, 438, 240, 206, 317),
            "aarch64": (219, 425, 194, 186, 438, 180, 0, 277),
        }[platform.machine()]
        for number in numbers:  # keyctl, io_uring_setup, shmget, msgget, pidfd_getfd, mq_open, io_setup, seccomp
            assert libc.syscall(number, 0, 0, 0, 0, 0) == -1
            assert ctypes.get_errno() == errno.EPERM
        assert libc.prctl(22, 2, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM  # PR_SET_SECCOMP
        plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for option in (26, 50, 51, 52):  # SO_ATTACH_FILTER and its like
            try:
                plain.setsockopt(socket.SOL_SOCKET, option, bytes(16))
            except PermissionError:
                continue
            raise AssertionError(option)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        socket.socket(socket.AF_INET6).setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # 26 of another level
        print("refused")
    """
    box.write_files({"try.py": textwrap.dedent(inside).encode()})
    assert output(box, "python3 try.py") == "refused\n"


def test_a_fork_server_that_cannot_fork_loses_one_start_and_no_sandbox():
    """A user's limit of processes may be reached by the agents of all its sandboxes together."""
    code = """
        import errno, os, socket, sys
        sys.path.insert(0, sys.argv[1])
        import fork_server
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.dup2(theirs.fileno(), 0)
        read, write = os.pipe()
        for _ in range(2):
            socket.send_fds(ours, [b"1"], [write, write])
        ours.shutdown(socket.SHUT_WR)
        def fork():
            raise BlockingIOError(errno.EAGAIN, "no process left")
        def ended(status):
            print(os.read(read, 1000).count(b"no process left"), status, flush=True)
            raise SystemExit
        fork_server.posix.fork, fork_server.posix._exit, fork_server.uncover = fork, ended, lambda: None
        fork_server.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(Path(supervisor.__file__).parent)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=30).stdout == "2 0\n"


def test_a_call_without_a_process_left_is_a_result():
    """With a group's limit below what the supervisor itself needs, no command starts."""
    with Sandbox(limits=SMALL) as box:
        if not box.limits_by.startswith("cgroup"):
            pytest.skip("needs control groups")
        limit = next(folder / "pids.max" for folder in box._jail._group.folders if (folder / "pids.max").exists())
        limit.write_text("1", encoding="ascii")
        for call in (box.run, box.run_python):
            result = call("1")
            assert result.status in (Status.LIMIT, Status.NONZERO), result
            assert result.exit_code == 126
            assert b"cannot start" in result.head
        limit.write_text("30", encoding="ascii")
        assert output(box, "echo here") == "here\n"
        assert box.run_python("1 + 1").head == b"2\n"


def test_the_number_of_files_is_limited(fresh):
    if sandbox._accepted("auto").forks:
        most = SMALL.disk_bytes >> 11
        made = int(output(fresh, f"for i in $(seq {2 * most}); do : > /tmp/$i; done 2> /dev/null; ls /tmp | wc -l"))
        assert 0.9 * most < made < most


def test_trainers_give_their_sandboxes_different_users():
    code = """
        from pathlib import Path
        from echo_jax.tools.sandbox import Limits, Sandbox
        with Sandbox(limits=Limits()) as box:
            print(Path(f"/proc/{box._jail._pid}/status").read_text().split("Uid:")[1].split()[0])
    """
    if sandbox._accepted("auto").apart:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        assert len({subprocess.check_output(command, timeout=60) for _ in range(2)}) == 2


def test_a_file_of_the_host_takes_no_lease_and_a_device_keeps_its_mode(box):
    """An open of a leased file waits up to 45 seconds, on the host too."""
    inside = """
        import fcntl, os, sys
        def refused(action):
            try:
                action()
            except OSError:
                return True
        own = os.open("/work/own", os.O_RDWR | os.O_CREAT)
        for path in ("/usr/bin/bash", "/usr/bin", sys.executable, os.__file__, "/dev/null"):
            fd = os.open(path, os.O_RDONLY)
            for command in (fcntl.F_SETLEASE, fcntl.F_NOTIFY):
                for argument in (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.DN_ACCESS):
                    assert refused(lambda: fcntl.fcntl(fd, command, argument)), path
        assert fcntl.fcntl(own, fcntl.F_GETFL) & os.O_RDWR
        fcntl.lockf(own, fcntl.LOCK_EX)
        for name in ("null", "zero", "full", "random", "urandom"):
            assert refused(lambda: os.chmod("/dev/" + name, 0o666)), name
            assert refused(lambda: os.utime("/dev/" + name)), name
        open("/dev/null", "wb").write(open("/dev/urandom", "rb").read(8) + open("/dev/zero", "rb").read(8))
        print("refused")
    """
    if not sandbox._accepted("auto").forks:
        inside = inside.replace("for name in (", "for name in () and (")  # see `sandbox.py`
    box.write_files({"try.py": textwrap.dedent(inside).encode()})
    assert output(box, "python3 try.py") == "refused\n"


def test_no_sandbox_uses_up_what_the_kernel_grants_a_user(box):
    quotas = output(box, "ulimit -q; ulimit -i; ulimit -l").split()
    assert quotas == ["0", "256", "64"]
    if sandbox._accepted("auto").forks:
        names = ("max_inotify_instances", "max_fanotify_groups", "max_user_namespaces")
        assert output(box, f"cd /proc/sys/user; cat {' '.join(names)}").split() == ["8", "0", "0"]
        code = "import ctypes; print(sum(ctypes.CDLL(None).inotify_init() >= 0 for _ in range(20)))"
        assert output(box, f'python3 -c "{code}"') == "8\n"


def test_a_command_about_to_start_holds_nothing_of_the_supervisors(box):
    """In that moment the agent's processes may take it over, and change the pipes that it shares."""
    watch = """
        import os, time
        most = 0
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                try:
                    names = open(f"/proc/{pid}/cmdline").read()
                    for fd in os.listdir(f"/proc/{pid}/fd") if "/run/" in names and pid != "1" else ():
                        os.readlink(f"/proc/{pid}/fd/{fd}")
                        most = max(most, int(fd))
                except OSError:
                    pass
        print("most", most, flush=True)
    """
    box.write_files({"watch.py": textwrap.dedent(watch).encode()})
    box.run("python3 watch.py > /tmp/most &")
    for _ in range(2000):
        if found := output(box, "cat /tmp/most"):
            break
    assert int(found.split()[1]) <= 3, found  # 3: its own, as when the command has just started


def test_every_machine_with_a_wheel_has_a_filter():
    assert len(seccomp.program("x86_64")) == len(seccomp.program("aarch64")) > 0
    with pytest.raises(OSError, match="no system call table for riscv64"):
        seccomp.program("riscv64")


# -- files ---------------------------------------------------------------------------------------------------------


def test_files_and_links_are_there_from_the_start():
    files = {f"d{i % 7}/e/f{i}": os.urandom(i * 100) for i in range(60)}
    with Sandbox(limits=SMALL, files={**files, "big": bytes(3 << 20)}, symlinks={"d0/link": "e/f7"}) as box:
        assert all(box.read_file(path, limit=1 << 20) == content for path, content in files.items())
        assert box.run("cat d0/link").head[:2048] == files["d0/e/f7"][:2048]
        assert output(box, "stat -c %s big") == f"{3 << 20}\n"


@pytest.mark.parametrize("path", ["../x", "/work/x", "a/../../x", "", ".", "a//b", "a/", "x\0y"])
def test_path_outside_the_work_directory_is_refused(box, path):
    with pytest.raises(ValueError, match="plain path"):
        box.write_files({path: b""})
    with pytest.raises(ValueError, match="plain path"):
        Sandbox(limits=SMALL, files={path: b""})
    with pytest.raises(SandboxError, match="plain path"):
        box.read_file(path, limit=10)


@pytest.mark.parametrize(
    ("setup", "path"),
    [
        ("ln -s /etc/passwd x", "x"),
        ("ln -s /etc x", "x/passwd"),
        ("mkdir d; ln -s ../d y; ln -s . d/x; echo > d/f", "y/f"),
        ("mkfifo x", "x"),
        ("mkdir x", "x"),
        ("true", "x"),
        ("ln -s /dev/zero x", "x"),
        ("head -c 1001 /dev/zero > x", "x"),
        ("truncate -s 8M x", "x"),
        ("python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('x')\"", "x"),
    ],
)
def test_only_a_regular_file_of_bounded_size_is_read(box, setup, path):
    assert box.run(setup).status is Status.OK
    with pytest.raises(SandboxError):
        box.read_file(path, limit=1000)


def test_link_swapped_in_during_a_read_is_not_followed(box):
    swap = """
        import os
        while True:
            os.rename("d", "real"); os.symlink("/etc", "d")
            os.unlink("d"); os.rename("real", "d")
    """
    box.write_files({"swap.py": textwrap.dedent(swap).encode(), "d/passwd": b"mine"})
    box.run("python3 swap.py > /dev/null 2>&1 &")
    seen = set()
    for _ in range(2000):
        try:
            seen.add(box.read_file("d/passwd", limit=10_000))
        except SandboxError:
            seen.add(None)
    assert seen == {b"mine", None}


def test_a_file_at_the_limit_is_read_whole(box):
    box.run("head -c 1000 /dev/zero > x")
    assert box.read_file("x", limit=1000) == bytes(1000)


def test_writing_does_not_follow_links_planted_by_the_agent(box):
    box.run("echo old > /tmp/target; ln -s /tmp/target link; ln -s /tmp folder; mkfifo p")
    box.write_files({"link": b"new", "p": b"new"})
    assert output(box, "cat /tmp/target link p") == "old\nnewnew"
    with pytest.raises(SandboxError):
        box.write_files({"folder/target": b"new"})
    assert output(box, "cat /tmp/target") == "old\n"


def test_writing_to_a_full_disk_is_an_error(box):
    with pytest.raises(SandboxError, match="No space"):
        box.write_files({"x": bytes(9 << 20)})


# -- state ---------------------------------------------------------------------------------------------------------


def test_directory_and_exported_variables_persist_between_calls(fresh):
    fresh.run("mkdir 'a b'; cd 'a b'; export V=$'one\\ntwo \"3\" $x `y`' W=1; X=2")
    result = fresh.run('printf "%s|%s|%s|" "$V" "$W" "$X"; pwd')
    assert result.head == b'one\ntwo "3" $x `y`|1||/work/a b\n'
    assert result.cwd == fresh.cwd == "/work/a b"
    fresh.run("unset W; exit 3")
    assert output(fresh, 'echo "[$W]"') == "[]\n"
    fresh.run("cd /tmp; kill -9 $$")
    assert fresh.run("pwd").head == b"/work/a b\n"
    fresh.run("cd /tmp; kill $$")
    assert fresh.run("pwd").head == b"/tmp\n"


def test_directory_forged_by_the_agent_is_ignored(fresh):
    for made_up in ("nonsense", "", "../x"):
        fresh.run(f"printf '%s\\n' '{made_up}' > /run/shell/cwd; kill -9 $$")
        assert fresh.run("pwd").head == b"/work\n"


@pytest.fixture
def watched():
    """A sandbox that notes where the shell stands."""
    with Sandbox(limits=SMALL, places=True) as box:
        yield box
        assert output(box, "cd /work; echo works") == "works\n"


def test_places_are_where_the_shell_stood_whatever_the_agent_writes(watched):
    watched.write_files({"a/b/f": b""}, {"link": "a/b"})
    lie = "echo /work/a > /run/shell/cwd"
    for command, place in (
        ("cd link; pwd", "/work/a/b"),
        (f"cd /tmp; {lie}; exit 3", "/tmp"),
        (f"cd /; {lie}; kill -9 $$", "/tmp"),  # it left no word
        (f"cd /work; {lie}; trap - EXIT", "/tmp"),
        (f"cd /work; {lie}; exec true", "/tmp"),
        ("kill -STOP $$; cd /usr", "/usr"),
        ("(cd /work); cd /tmp & wait", "/usr"),
        ("cd /work; sleep 60 &", "/work"),
    ):
        watched.run(command)
        assert watched.places[-1] == place, command
    watched.run("cd a", fresh=True)
    watched.run_python("import os; os.chdir('/tmp')")
    assert len(watched.places) == 8


def test_a_shell_stops_at_its_end_only_where_places_are_asked_for(fresh, watched):
    """A stop and its end cost a call about a millisecond. Going on after a stop is a signal that a shell can see."""
    command = "trap 'echo went on' CONT; cd /tmp"
    assert output(fresh, command) == ""
    assert output(watched, command) == "went on\n"
    assert watched.places == ["/tmp"]


def test_places_that_nobody_asked_for_are_an_error_not_an_empty_list(fresh):
    fresh.run("cd /tmp")
    with pytest.raises(RuntimeError, match="reads_places = True"):
        _ = fresh.places


def test_a_shell_that_stops_goes_on_whether_or_not_places_are_asked_for(fresh, watched):
    for sandbox_ in (fresh, watched):
        assert sandbox_.run("kill -STOP $$; echo on", timeout=1.0).head == b"on\n"


def test_full_disk_of_shell_state_is_reported_too(fresh):
    result = fresh.run("head -c 2M /dev/zero > /run/shell/x")
    assert (result.status, result.limit) == (Status.LIMIT, "disk")
    assert fresh.run("rm /run/shell/x; cd /tmp").status is Status.OK


def test_python_starts_in_the_shells_directory(fresh):
    fresh.run("mkdir d; cd d")
    assert fresh.run_python("import os; os.getcwd()").head == b"'/work/d'\n"


def test_many_open_pipes_do_not_close_the_interpreters_pipe():
    count = supervisor.MAX_BACKGROUND_PIPES + 8
    with Sandbox(limits=dataclasses.replace(SMALL, processes=2 * count)) as box:
        box.run_python("x = 7")
        for _ in range(count):
            assert box.run("sleep 60 &").status is Status.OK
        assert box.run_python("x").head == b"7\n"


def test_call_makes_room_when_processes_run_out_and_says_so(fresh):
    fill = """
        import os, time
        while True:
            try:
                child = os.fork()
            except BlockingIOError:
                child = 0
            if child == 0:
                time.sleep(60)
    """
    fresh.write_files({"fill.py": textwrap.dedent(fill).encode()})
    fresh.run("python3 fill.py > /dev/null 2>&1 &")
    time.sleep(0.7)
    result = fresh.run("echo here")
    assert result.head.endswith(b"here\n")
    if fresh.limits_by.startswith("cgroup"):  # a per-user limit is that of the command, which starts none here
        assert b"no process was left for this command" in result.head


def test_deleted_directory_leads_back_to_work(fresh):
    fresh.run("mkdir d; cd d")
    fresh.run("rmdir ../d")
    assert fresh.run("pwd").cwd == "/work"


def test_fresh_call_ignores_the_agents_environment(fresh):
    fresh.run("mkdir d; cd d; export PATH=/work/evil X=1; export BASH_ENV=/work/evil")
    assert output(fresh, "echo [$X] $PWD; ls -d d; cd /tmp", fresh=True) == "[] /work\nd\n"
    assert output(fresh, "echo $X $PATH; pwd") == "1 /work/evil\n/work/d\n"


def test_corrupt_state_harms_only_the_agents_shell(fresh):
    fresh.run("trap - EXIT; rm -f /run/shell/*; mkfifo /run/shell/cwd /run/shell/env; rm /run/shell/rc")
    assert output(fresh, "pwd") == "/work\n"
    fresh.run("trap - EXIT; rm -f /run/shell/cwd; ln -s /dev/zero /run/shell/cwd")
    assert output(fresh, "pwd", fresh=True) == "/work\n"


# -- ends ----------------------------------------------------------------------------------------------------------


def _leftovers():
    """Returns counts of our child processes, open descriptors, and control groups."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    groups = [folder for _, parents in cgroup.choices() for p in parents for folder in p.glob("*sandbox*")]
    mine = [folder for folder in groups if f"-{os.getpid()}-" in folder.name]
    return len(children), len(os.listdir("/proc/self/fd")), len(mine)


def test_closing_leaves_no_process_descriptor_or_control_group(shared):
    before = _leftovers()

    def episode(i):
        with Sandbox(limits=SMALL, files={"f": b"1\n"}) as box:
            for _ in range(4):
                assert box.run(f"sleep 60 & setsid sleep 60 & echo {i}").head == b"%d\n" % i

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(episode, range(24)))
    assert _leftovers() == before


def test_a_sandbox_outlives_the_thread_that_opened_it():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        box = pool.submit(Sandbox, limits=SMALL).result()
    with box:
        time.sleep(0.1)
        assert output(box, "echo here") == "here\n"


def test_closing_twice_is_harmless():
    box = Sandbox(limits=SMALL)
    box.close()
    box.close()
    result = box.run("echo x")
    assert result.status is Status.INFRA
    assert b"closed" in result.head
    with pytest.raises(SandboxBroken, match="closed"):
        box.read_file("x", limit=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_supervisor_that_does_not_answer_is_an_infrastructure_fault(monkeypatch, number):
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", 0.3)
    before = _leftovers()
    box = Sandbox(limits=SMALL)
    box.run("sleep 60 &")
    os.kill(box._jail._pid, number)
    result = box.run("echo x", timeout=0.2)
    assert (result.status, result.exit_code) == (Status.INFRA, None)
    assert result.seconds < 4
    assert box.run("echo x").status is Status.INFRA
    with pytest.raises(SandboxBroken, match="dead"):
        box.kill_processes()
    box.close()
    assert _leftovers() == before


def test_sandboxes_die_with_their_killed_parent():
    mark = f"9{os.getpid()}"
    code = f"""
        import time
        from echo_jax.tools.sandbox import Limits, Sandbox
        box = Sandbox(limits=Limits())
        box.run("setsid sleep {mark} & sleep {mark} &")
        print("ready", flush=True)
        box.run("sleep {mark}")
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 3
        while _running(mark) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _running(mark) == 3
        parent.kill()
    deadline = time.monotonic() + 3
    while _running(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _running(mark) == 0
    # The kernel may hold a group of killed processes busy for a moment; whoever sweeps next removes it.
    parents = tuple(folder for _, choice in cgroup.choices() for folder in choice)
    while _groups_of(parent.pid, parents) and time.monotonic() < deadline:
        cgroup.sweep(parents)
        time.sleep(0.02)
    assert not _groups_of(parent.pid, parents)


def _groups_of(owner, parents):
    return [folder for parent in parents for folder in parent.glob(f"*sandbox-{owner}-*")]


def _running(mark):
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += path.read_bytes() == b"sleep\0" + mark.encode() + b"\0"
        except (FileNotFoundError, ProcessLookupError):
            continue
    return count


# -- the choice of a backend ---------------------------------------------------------------------------------------


def test_an_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match="auto, bubblewrap"):
        Sandbox(limits=SMALL, backend="docker")


def test_auto_and_the_name_find_the_same_bwrap():
    assert sandbox.probe("auto") == sandbox.probe("bubblewrap")


def test_without_a_working_backend_the_error_names_the_remedy(tmp_path):
    with pytest.raises(SandboxUnavailable, match="apt install bubblewrap"):
        sandbox.probe(candidates=[])
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho setting up uid map: Permission denied >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SandboxUnavailable, match="uid map: Permission denied"):
        sandbox.probe(candidates=[broken, tmp_path / "missing"])


def test_a_program_that_isolates_nothing_is_not_accepted(tmp_path):
    pretender = tmp_path / "bwrap"
    pretender.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n')
    pretender.chmod(0o755)
    with pytest.raises(SandboxUnavailable):
        sandbox.probe(candidates=[pretender])


def test_threads_count_as_processes_when_polled(monkeypatch):
    found = sandbox._accepted("auto")
    monkeypatch.setattr(sandbox, "_accepted", lambda backend: dataclasses.replace(found, groups=None))
    many = """
        import threading, time
        threading.stack_size(1 << 16)
        for _ in range(200):
            threading.Thread(target=time.sleep, args=(20,)).start()
        time.sleep(20)
    """
    with Sandbox(limits=SMALL) as box:
        box.write_files({"many.py": textwrap.dedent(many).encode()})
        polled = box.limits_by.endswith("polled")
        assert box.run("python3 many.py", timeout=4).seconds < (3.5 if polled else 5)
        assert output(box, "echo next") == "next\n"


@pytest.mark.parametrize("plan", ["groups", "rlimits"])
def test_every_way_to_limit_ends_a_fork_bomb_and_a_hog(monkeypatch, plan):
    found = sandbox._accepted("auto")
    chosen = found if plan == "groups" else dataclasses.replace(found, groups=None)
    monkeypatch.setattr(sandbox, "_accepted", lambda backend: chosen)
    with Sandbox(limits=SMALL) as box:
        assert box.limits_by == chosen.limits_by
        assert box.run(":(){ :|:& };:; sleep 9", timeout=1.0).seconds < 6
        box.kill_processes()
        assert output(box, "echo next") == "next\n"
        assert box.run("python3 -c 'bytearray(1 << 30)'").status in (Status.NONZERO, Status.OOM)
        assert output(box, "echo next") == "next\n"


def test_messages_round_trip_and_malformed_ones_are_refused():
    for fields in ([], [b""], [b"a", b"", bytes(1000)]):
        packed = supervisor.pack(fields)
        assert int.from_bytes(packed[:4], "little") == len(packed) - 4
        assert supervisor.unpack(packed[4:]) == fields
    with pytest.raises(ValueError, match="of 5 bytes"):
        supervisor.unpack(b"\xff\0\0\0a")


@pytest.mark.parametrize(
    ("controllers_of", "expected"), [("scope", "scope"), ("slice", ""), ("", None)], ids=["own", "parent", "none"]
)
def test_version_2_groups_are_made_where_controllers_are_enabled(tmp_path, controllers_of, expected):
    """Uses the layout under `systemd-run --user --scope`, as the kernel's tables show it."""
    (tmp_path / "mnt/slice/scope").mkdir(parents=True)
    for folder, name in ((tmp_path / "mnt/slice", "slice"), (tmp_path / "mnt/slice/scope", "scope")):
        content = "cpu memory pids\n" if name == controllers_of else "\n"
        (folder / "cgroup.subtree_control").write_text(content)
    (tmp_path / "cgroup").write_text("0::/slice/scope\n")
    (tmp_path / "mountinfo").write_text(
        "23 1 0:20 / /proc rw,relatime shared:5 - proc proc rw\n"
        "24 1 0:21 / /media/caf\udce9\x85 rw - vfat /dev/sdb1 rw\n"  # the kernel writes bytes: this name is Latin-1
        f"30 23 0:26 / {tmp_path}/mnt rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
        encoding="utf-8",
        errors="surrogateescape",
    )
    found = list(cgroup.choices(tmp_path))
    assert found == ([] if expected is None else [(2, (tmp_path / "mnt/slice" / expected,))])


def test_a_group_that_the_kernel_does_not_let_go_is_tried_again(tmp_path, monkeypatch):
    refusals = []

    def rmdir(folder):
        if len(refusals) < 3:
            refusals.append(folder)
            raise OSError(errno.EBUSY, "busy")
        remove(folder)

    remove = Path.rmdir
    monkeypatch.setattr(cgroup, "REMOVE_SECONDS", 0.0)
    monkeypatch.setattr(cgroup, "_left", [])
    monkeypatch.setattr(Path, "rmdir", rmdir)
    busy = cgroup.Cgroup.__new__(cgroup.Cgroup)
    busy.folders = [tmp_path / "busy"]
    busy.folders[0].mkdir()
    busy.remove()
    assert cgroup._left == busy.folders
    refusals.extend([None] * 3)
    with pytest.raises(OSError, match="No such file"):  # no control group can be made there
        cgroup.Cgroup(2, (tmp_path / "none",), memory_bytes=1, processes=1)
    assert not busy.folders[0].exists()
    assert cgroup._left == []


def test_a_sandbox_starts_when_no_descriptor_can_be_sent(monkeypatch):
    """One sandbox of an ordinary user can use up what the kernel lets that user have in flight."""

    def full(*_):
        raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")

    sandbox.probe()
    monkeypatch.setattr(socket, "send_fds", full)
    with Sandbox(limits=SMALL, files={"f": b"1\n"}) as box:
        assert output(box, "cat f; echo $PPID") == "1\n1\n"
