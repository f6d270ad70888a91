"""The scripts for TPU pods, with a fake gcloud that records its calls and runs the workers' commands locally."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
AWKWARD = [
    *("--config.a=two words", "--config.b=$(touch broken)'\"", "--config.c=", "--config.d=*", "--config.e=(1, 2)"),
    *("--config.f=Zürich → 東京", "--config.g=`id`;#!", "--config.h=back\\slash ~ $HOME"),
]
# $CLOUD/POD holds the states of the queued resource and of the node; $CLOUD/POD.next holds later ones, one line per
# query. A worker's home is $CLOUD/POD.W, and its processes die with the pod.
GCLOUD = r"""
    import os, pathlib, shutil, signal, subprocess, sys, threading, time

    cloud = pathlib.Path(os.environ["CLOUD"])
    with (cloud / "calls").open("a") as file:
        file.write("\0".join(sys.argv[1:]) + "\n\n")
    what, verb, *rest = sys.argv[3:]
    flags = {}
    names = []
    while rest:
        word = rest.pop(0)
        if word in ("--zone", "--project"):
            flags[word] = rest.pop(0)
        elif word.startswith("--"):
            name, _, flags[name] = word.partition("=")
        else:
            names.append(word)
    if (cloud / "down").exists():
        sys.exit("ERROR: (gcloud) There was a problem refreshing your current auth tokens")
    assert flags.get("--zone"), sys.argv
    pod = names[-1].split(":")[0] if names else ""
    state = cloud / pod

    def missing():
        sys.exit(f"ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource '{pod}' was not found")

    def words():
        try:
            return state.read_text().split()
        except FileNotFoundError:
            return ["MISSING", "MISSING"]

    def advance():
        following = cloud / f"{pod}.next"
        if state.exists() and following.exists() and (lines := following.read_text().splitlines()):
            state.write_text(lines[0])
            following.write_text("\n".join(lines[1:]))

    def homes():
        return [cloud / f"{pod}.{i}" for i in range(int((cloud / "workers").read_text()))]

    def kill(home):
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if f"HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                pass

    # Imitates a gcloud that repeats the command whenever the connection is lost.
    patient = (cloud / "patient").exists()

    def cut(i):
        return (cloud / f"cut.{pod}.{i}").exists() and "--logs=" in flags["--command"]

    def ssh(i, home, statuses):
        keep = ("PATH", "PLAN", "POLL_SECONDS", "CLOUD")
        environment = {k: os.environ[k] for k in keep} | {"HOME": str(home), "TPU_WORKER_ID": str(i)}
        environment["PATH"] = f"{cloud}/image:" + environment["PATH"]
        home.mkdir(exist_ok=True)
        while True:
            while patient and cut(i):
                time.sleep(0.02)
            shell = subprocess.Popen(
                ["bash", "-c", flags["--command"]],
                **dict(env=environment, cwd=home, stdin=subprocess.DEVNULL, start_new_session=True),
            )
            while shell.poll() is None and words()[1] == "READY" and not cut(i):
                time.sleep(0.02)
            if shell.poll() is None:
                shell.kill()
                print("Connection closed by remote host", file=sys.stderr)
            statuses[i] = shell.wait() if shell.wait() >= 0 else 255
            if statuses[i] != 255 or not patient:
                return

    if (what, verb) == ("queued-resources", "describe"):
        advance()
        if words()[0] == "MISSING":
            missing()
        print(f"name: {pod}\nspot: {{}}\nstate:\n  state: {words()[0]}\n  stateInitiator: SERVICE\ntpu:\n  nodeSpec:")
        print("  - node:\n      acceleratorType: v6e-16\n      runtimeVersion: v2-alpha-tpuv6e\n    nodeId: " + pod)
    elif (what, verb) == ("queued-resources", "create"):
        assert flags["--node-id"] == pod and flags["--accelerator-type"] and flags["--runtime-version"], flags
        if state.exists():
            sys.exit("ERROR: ALREADY_EXISTS")
        state.write_text("ACTIVE READY")
        advance()
    elif (what, verb) == ("queued-resources", "delete"):
        if not state.exists():
            missing()
        assert "--force" in flags and "--quiet" in flags
        state.unlink()
        for home in homes():
            kill(home)
            shutil.rmtree(home, ignore_errors=True)
    elif (what, verb) == ("tpu-vm", "describe"):
        print(words()[1])
    elif words()[1] != "READY":
        sys.exit(f"ERROR: TPU is in state {words()[1]}")
    elif (what, verb) == ("tpu-vm", "scp"):
        for home in homes():
            home.mkdir(exist_ok=True)
            shutil.copy(names[0], home / names[1].split(":")[1])
    elif (what, verb) == ("tpu-vm", "ssh"):
        chosen = list(enumerate(homes()))
        if flags["--worker"] != "all":
            chosen = [chosen[int(flags["--worker"])]]
        statuses = {}
        threads = [threading.Thread(target=ssh, args=(i, home, statuses)) for i, home in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if words()[1] != "READY":
            for home in homes():
                kill(home)
        sys.exit(next((status for _, status in sorted(statuses.items()) if status), 0))
    else:
        sys.exit(f"gcloud does not know {what} {verb}")
"""
UV = """\
    #!/usr/bin/env bash
    echo "$*" >>"$HOME/uv"
    if [[ $1 == venv ]]; then
      mkdir -p "${@: -1}/bin"
      printf '#!/bin/sh\\nexec %s "$@"\\n' PYTHON >"${@: -1}/bin/python"
      chmod +x "${@: -1}/bin/python"
    fi
"""
# Replaces echo_jax.train: records its arguments, honours --owner, then executes the plan.
TRAIN = r"""
    import os, pathlib, signal, sys, time

    worker = int(os.environ["TPU_WORKER_ID"])
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    workdir = pathlib.Path(flags["workdir"])
    assert os.environ["ECHO_JAX_CLUSTER"] == "auto"
    assert os.environ["PYTHONPATH"] == os.getcwd()
    workdir.mkdir(parents=True, exist_ok=True)
    if owner := flags.get("owner"):
        if worker == 0:
            try:
                with (workdir / "owner").open("x") as file:
                    file.write(owner)
            except FileExistsError:
                if (workdir / "owner").read_text() != owner:
                    sys.exit(69)
        else:
            time.sleep(0.3)
            if (workdir / "owner").read_text() != owner:
                sys.exit(75)
    with (workdir / f"started-{worker}").open("a") as file:
        file.write("\0".join(sys.argv[1:]) + "\n\n")
    starts = (workdir / f"started-{worker}").read_text().count("\n\n")
    print(f"worker {worker} says hello", flush=True)

    def wait(status_of_sigterm=75):
        def stop(number, _):
            (workdir / f"signal-{worker}").write_text(signal.Signals(number).name)
            os._exit({signal.SIGTERM: status_of_sigterm, signal.SIGINT: 130}[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        (workdir / f"waiting-{worker}-{starts}").touch()
        while not (workdir / "go").exists():
            time.sleep(0.02)

    exec(pathlib.Path(os.environ["PLAN"]).read_text())
    if worker == 0:
        (workdir / "DONE").touch()
"""
CONFIG = """
    import ml_collections

    def get_config(arg=None):
        return ml_collections.ConfigDict({"seed": 0}).lock()

    def sweep():
        yield from ({"seed": seed} for seed in range(4))
"""


class Cloud:
    """A repository to launch from, a cloud with pods of two workers, and a shared file system."""

    def __init__(self, folder: Path):
        self.folder, self.cloud, self.repository = folder, folder / "cloud", folder / "repository"
        self.workdir, self.scripts = folder / "shared" / "the run", self.repository / "tpu_scripts"
        self.plan("")
        package = self.repository / "echo_jax"
        (package / "tools").mkdir(parents=True)
        for name in ("__init__", "sweep", "config"):
            shutil.copy(ROOT / "echo_jax" / f"{name}.py", package)
        for name in ("system", "run"):
            shutil.copytree(ROOT / "echo_jax" / name, package / name)
        shutil.copytree(ROOT / "tpu_scripts", self.scripts)
        shutil.copy(ROOT / "setup.py", self.repository)
        (package / "tools" / "__init__.py").touch()
        (package / "tools" / "sandbox.py").write_text("def probe(backend): ...\n")
        (package / "train.py").write_text(textwrap.dedent(TRAIN))
        (self.repository / "c.py").write_text(textwrap.dedent(CONFIG))
        (self.repository / ".gitignore").write_text("/runs/\n__pycache__/\n")
        self.git("init", "-q")
        self.commit()
        (self.cloud / "image").mkdir(parents=True)
        (self.cloud / "workers").write_text("2")
        self.program(self.cloud / "image" / "uv", textwrap.dedent(UV).replace("PYTHON", sys.executable))
        self.program(folder / "bin" / "gcloud", f"#!{sys.executable} -IS\n" + textwrap.dedent(GCLOUD))

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def git(self, *arguments: str) -> str:
        command = ["git", "-C", self.repository, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def plan(self, code: str) -> None:
        (self.folder / "plan.py").write_text(textwrap.dedent(code))

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("-c", "user.name=me", "-c", "user.email=me@example.org", "commit", "-qm", "change")

    def pod(self, name: str = "p", state: str = "ACTIVE READY", following: tuple[str, ...] = ()) -> None:
        (self.cloud / name).write_text(state)
        (self.cloud / f"{name}.next").write_text("\n".join(following))

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "PYTHON", "JAX_"))}
        settings = {"POLL_SECONDS": "0.05", "WAIT_SECONDS": "0.05", "PYTHON": sys.executable}
        folders = {"HOME": self.folder / "user", "CLOUD": self.cloud, "PLAN": self.folder / "plan.py"}
        return kept | settings | {"PATH": f"{self.folder}/bin:{kept['PATH']}"} | {k: str(v) for k, v in folders.items()}

    @contextlib.contextmanager
    def start(self, script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        command = [self.scripts / script, *arguments]
        with subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes) as process:
            try:
                yield process
            except BaseException:
                self.kill()
                raise

    def run(self, script: str, *arguments: str) -> tuple[int, str]:
        with self.start(script, *arguments) as process:
            output = process.communicate(timeout=90)[0]
        return process.returncode, output

    def launch(self, *arguments: str) -> tuple[int, str]:
        return self.run("launch.sh", *self.arguments(*arguments))

    def arguments(self, *arguments: str, pod: str = "p") -> tuple[str, ...]:
        return ("--pod", pod, "--zone", "z", "--config=c.py", f"--workdir={self.workdir}", *arguments)

    def calls(self, *words: str) -> list[list[str]]:
        """Returns the calls of gcloud that contain all these words, without `compute tpus`."""
        path = self.cloud / "calls"
        calls = [call.split("\0")[2:] for call in path.read_text().split("\n\n")[:-1]] if path.exists() else []
        return [call for call in calls if all(word in call for word in words)]

    def started(self, worker: int, run: str = "") -> list[list[str]]:
        path = self.workdir / run / f"started-{worker}"
        return [start.split("\0") for start in path.read_text().split("\n\n")[:-1]] if path.exists() else []

    def log(self, worker: int) -> str:
        return (self.workdir / "launch" / f"worker-{worker}.log").read_text()

    def kill(self) -> None:
        """Kills processes that a failed test has left."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"CLOUD={self.cloud}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)

    def left_behind(self) -> list[str]:
        found = subprocess.run(["pgrep", "-af", str(self.folder)], capture_output=True, text=True).stdout
        return [line for line in found.splitlines() if "pytest" not in line]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.kill()


def test_commands_of_the_readme(cloud):
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "pod.sh create" in b]
    (cloud.repository / "configs").mkdir()
    shutil.move(cloud.repository / "c.py", cloud.repository / "configs" / "NAME.py")
    cloud.commit()
    for line in block.splitlines():
        script, *arguments = shlex.split(line.replace("/mnt/shared/NAME", shlex.quote(str(cloud.workdir))))
        status, output = cloud.run(script.removeprefix("tpu_scripts/"), *arguments)
        assert status == 0, output
    assert (cloud.workdir / "DONE").exists()
    assert len(cloud.started(0)) == len(cloud.started(1)) == 1


# pod.sh


@pytest.mark.parametrize(
    ("flags", "created"),
    [
        ((), ["--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite"]),
        (("--type", "v5p-128", "--spot"), ["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--spot"]),
        (("--type", "v6e-32"), ["--accelerator-type=v6e-32", "--runtime-version=v2-alpha-tpuv6e"]),
        (
            ("--type", "v7-8", "--version", "own", "--project", "q", "--", "--internal-ips"),
            ["--accelerator-type=v7-8", "--runtime-version=own", "--internal-ips"],
        ),
    ],
)
def test_created_pod_has_the_software_of_its_type_and_is_waited_for(cloud: Cloud, flags, created: list[str]):
    (cloud.cloud / "p.next").write_text(
        "WAITING_FOR_RESOURCES -\nWAITING_FOR_RESOURCES -\nPROVISIONING -\nACTIVE READY"
    )
    status, output = cloud.run("pod.sh", "create", "p", "--zone", "z", *flags)
    assert status == 0, output
    ((*call, quiet),) = cloud.calls("create")
    place = ["--zone=z", *(["--project=q"] if "--project" in flags else [])]
    assert [*call, quiet] == ["queued-resources", "create", "p", *place, "--node-id=p", *created, "--quiet"]
    assert re.findall(r"p is (\S+)", output) == ["WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]


def test_existing_pod_is_waited_for_and_not_created_again(cloud: Cloud):
    cloud.pod(state="ACCEPTED -", following=("PROVISIONING -", "ACTIVE CREATING", "ACTIVE READY"))
    status, output = cloud.run("pod.sh", "create", "p", "--zone", "z")
    assert (status, cloud.calls("create")) == (0, [])
    assert output.startswith("pod.sh: p exists\n")
    assert output.endswith("pod.sh: p is READY\n")


def test_waiting_ends_when_it_is_hopeless_or_takes_too_long(cloud: Cloud):
    cloud.pod(state="WAITING_FOR_RESOURCES -", following=("WAITING_FOR_RESOURCES -", "FAILED -"))
    assert cloud.run("pod.sh", "create", "p", "--zone", "z")[0] == 1
    cloud.pod(state="WAITING_FOR_RESOURCES -")
    assert cloud.run("pod.sh", "create", "p", "--zone", "z", "--timeout", "0")[0] == 75


@pytest.mark.parametrize(
    ("state", "word"), [("ACTIVE READY", "READY"), ("ACTIVE PREEMPTED", "PREEMPTED"), ("SUSPENDED -", "SUSPENDED")]
)
def test_status_is_one_word(cloud: Cloud, state: str, word: str):
    assert cloud.run("pod.sh", "status", "p", "--zone", "z") == (0, "MISSING\n")
    cloud.pod(state=state)
    assert cloud.run("pod.sh", "status", "p", "--zone", "z") == (0, f"{word}\n")


@pytest.mark.parametrize(
    "state",
    ["ACTIVE PREEMPTED", *(pytest.param(other, marks=pytest.mark.variant) for other in ("SUSPENDED -", "FAILED -"))],
)
def test_restored_pod_is_what_it_was(cloud: Cloud, state: str):
    cloud.run("pod.sh", "create", "p", "--zone", "z", "--type", "v5p-8", "--spot", "--", "--network=n")
    cloud.pod(state=state)
    assert cloud.run("pod.sh", "restore", "p", "--zone", "z")[0] == 0
    first, second = cloud.calls("create")
    assert first == second
    assert len(cloud.calls("delete")) == 1


def test_pod_created_elsewhere_is_restored_from_its_description(cloud: Cloud):
    cloud.pod(state="SUSPENDED -")
    assert cloud.run("pod.sh", "restore", "p", "--zone", "z")[0] == 0
    ((*call, _),) = cloud.calls("create")
    assert sorted(call[-3:]) == ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"]


def test_unknown_pod_is_not_restored_with_defaults(cloud: Cloud):
    assert cloud.run("pod.sh", "restore", "p", "--zone", "z") == (2, "pod.sh: p is unknown; set --type\n")
    assert not cloud.calls("create")


def test_restore_leaves_working_and_unreachable_pods_alone(cloud: Cloud):
    cloud.pod(state="ACTIVE REPAIRING", following=("ACTIVE REPAIRING", "ACTIVE READY"))
    assert cloud.run("pod.sh", "restore", "p", "--zone", "z")[0] == 0
    (cloud.cloud / "down").touch()
    status, output = cloud.run("pod.sh", "restore", "p", "--zone", "z")
    assert status == 1
    assert "refreshing your current auth tokens" in output
    assert not cloud.calls("delete")
    assert not cloud.calls("create")


def test_deleting_twice_is_harmless_and_list_works(cloud: Cloud):
    cloud.pod()
    for _ in range(2):
        assert cloud.run("pod.sh", "delete", "p", "--zone", "z") == (0, "")
    cloud.run("pod.sh", "list", "--zone", "z", "--dry-run")
    assert not (cloud.cloud / "p").exists()


@pytest.mark.parametrize("action", ["create", "status", "restore", "delete", "list"])
def test_dry_run_of_pod_only_prints_commands(cloud: Cloud, action: str):
    name = [] if action == "list" else ["p"]
    status, output = cloud.run("pod.sh", action, *name, "--zone", "z", "--type", "v5p-8", "--dry-run")
    assert status == 0
    assert all(line.startswith("gcloud compute tpus ") for line in output.splitlines())
    assert output
    assert not cloud.calls()
    assert not (cloud.folder / "user").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make", "p", "--zone", "z"], "the action must be create, status, restore, delete or list"),
        (["create", "--zone", "z"], "the NAME of the pod is missing"),
        (["create", "p"], "--zone ZONE is missing"),
        (["create", "p", "--zone"], "--zone needs a value"),
        (["create", "p", "q", "--zone", "z"], "unexpected q"),
        (["create", "p", "--zone", "z", "--cheap"], "unknown option --cheap"),
        (["create", "p", "--zone", "z", "--type", "v9-8"], "no default software version for v9-8; set --version"),
    ],
)
def test_wrong_use_of_a_pod_is_explained(cloud: Cloud, arguments: list[str], message: str):
    assert cloud.run("pod.sh", *arguments) == (2, f"pod.sh: {message}\n")
    assert not cloud.calls()


# launch.sh --pod


def test_run_on_a_pod_has_the_committed_tree_the_arguments_and_a_log_per_worker(cloud: Cloud):
    cloud.pod()
    (cloud.repository / "c.py").write_text("changed")
    status, output = cloud.launch(*AWKWARD, "--project", "q")
    assert status == 0, output
    given = ["--config=c.py", f"--workdir={cloud.workdir}", *AWKWARD]
    sha = cloud.git("rev-parse", "HEAD")
    for i in (0, 1):
        assert cloud.started(i) == [given]
        assert cloud.log(i) == f"worker {i} says hello\n"
        assert f"[{i}] worker {i} says hello\n" in output
        tree = cloud.cloud / f"p.{i}" / "echo_jax" / sha
        assert (tree / "c.py").read_text() == textwrap.dedent(CONFIG)
        assert (tree / ".shipped" / "commit").read_text() == f"{sha}\n"
        assert "+changed" in (tree / ".shipped" / "diff").read_text()
        assert not (tree / "broken").exists()
    assert f"local changes that are not in {sha} will not run" in output
    kept = (cloud.workdir / "launch" / "command.txt").read_text()
    assert subprocess.run(["bash", "-c", f"printf '%s\\0' {kept}"], capture_output=True).stdout == b"".join(
        word.encode() + b"\0"
        for word in [f"{cloud.cloud}/p.0/echo_jax/venv/bin/python", "-m", "echo_jax.train", *given]
    )
    assert all("--project=q" in call for call in cloud.calls())
    assert not cloud.left_behind()


def test_second_start_installs_nothing(cloud: Cloud):
    cloud.pod()
    for _ in range(2):
        assert cloud.launch()[0] == 0
    lines = (cloud.cloud / "p.1" / "uv").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["venv", "--quiet"], ["pip", "install"]]
    assert lines[1].endswith(f"-e {cloud.cloud}/p.1/echo_jax/{cloud.git('rev-parse', 'HEAD')}[tpu]")


def test_setup_continues_without_a_sandbox_and_says_so(cloud: Cloud):
    (cloud.repository / "echo_jax" / "tools" / "sandbox.py").write_text(
        "def probe(backend): raise OSError('no bwrap')\n"
    )
    cloud.program(cloud.cloud / "image" / "sysctl", "#!/bin/sh\n")
    cloud.program(cloud.cloud / "image" / "sudo", '#!/bin/sh\necho "$*" >>"$HOME/sudo"\n')
    cloud.commit()
    cloud.pod()
    status, output = cloud.launch()
    assert status == 0
    assert "OSError: no bwrap\n" in output
    assert output.count("setup.sh: the sandbox does not work here") == 2
    setting = "-n sysctl -w kernel.apparmor_restrict_unprivileged_userns=0\n"
    assert (cloud.cloud / "p.0" / "sudo").read_text() == setting


def test_packages_are_not_changed_during_a_run(cloud: Cloud):
    cloud.pod()
    cloud.plan("wait()")
    with cloud.start("launch.sh", *cloud.arguments()) as process:
        wait_for(lambda: len(list(cloud.workdir.glob("waiting-*"))) == 2)
        (cloud.repository / "setup.py").write_text("changed")
        cloud.commit()
        status, output = cloud.launch()
        assert status == 1
        assert "setup.py has changed, but a run is active here: " in output
        (cloud.workdir / "go").touch()
        assert process.wait(timeout=60) == 0
    assert cloud.launch()[0] == 0


def test_dry_run_of_setup_does_nothing(cloud: Cloud):
    status, output = cloud.run("setup.sh", "--dry-run")
    assert status == 0
    assert "https://astral.sh/uv/install.sh" in output
    assert not (cloud.folder / "user").exists()


def test_dry_run_on_a_pod_prints_commands_that_do_the_same(cloud: Cloud):
    cloud.pod()
    status, output = cloud.launch("--dry-run", *AWKWARD)
    assert (status, cloud.calls()) == (0, [])
    assert not (cloud.folder / "user").exists()
    assert not cloud.workdir.exists()
    result = subprocess.run(["bash", "-ec", output], env=cloud.environment, cwd=cloud.folder, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert [cloud.started(i) for i in (0, 1)] == [[["--config=c.py", f"--workdir={cloud.workdir}", *AWKWARD]]] * 2


def test_failed_worker_stops_the_run_without_a_restart(cloud: Cloud):
    cloud.pod()
    cloud.plan("if worker == 1: print('no such luck'); sys.exit(1)\ntime.sleep(0.3); sys.exit(75)")
    status, output = cloud.launch()
    assert status == 1
    assert f"worker 1 ended with status 1; its log on the pod: {cloud.workdir}/launch/worker-1.log" in output
    assert "[1] no such luck" in output
    assert len(cloud.started(0)) == 1


def test_run_that_stopped_on_a_ready_pod_is_restarted(cloud: Cloud):
    cloud.pod()
    cloud.plan("if starts == 1: sys.exit(75)")
    status, output = cloud.launch()
    assert status == 0
    assert "restart 1 of 10 after status 75: it was stopped" in output
    assert "p is READY" in output
    assert [len(cloud.started(i)) for i in (0, 1)] == [2, 2]
    assert not cloud.calls("delete")


def test_run_that_keeps_stopping_is_given_up(cloud: Cloud):
    cloud.pod()
    cloud.plan("if worker == 0: os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(75)")
    status, output = cloud.launch("--restarts", "1")
    assert status == 75
    assert "gave up after status 75" in output
    assert len(cloud.started(0)) == 2


@pytest.mark.parametrize(
    "state",
    ["ACTIVE PREEMPTED", *(pytest.param(other, marks=pytest.mark.variant) for other in ("SUSPENDED -", None))],
    ids=str,
)
def test_preempted_pod_is_restored_and_the_run_resumes(cloud: Cloud, state: str | None):
    cloud.run("pod.sh", "create", "p", "--zone", "z", "--type", "v5p-16", "--spot")
    cloud.plan("if starts == 1: wait()")
    with cloud.start("launch.sh", *cloud.arguments()) as process:
        wait_for(lambda: len(list(cloud.workdir.glob("waiting-*"))) == 2)
        # A commit made meanwhile does not change what runs.
        sha = cloud.git("rev-parse", "HEAD")
        (cloud.repository / "echo_jax" / "train.py").write_text("sys.exit(1)")
        cloud.commit()
        if state:
            cloud.pod(state=state)
        else:
            (cloud.cloud / "p").unlink()
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    first, second = cloud.calls("create")
    assert first == second
    assert [len(cloud.started(i)) for i in (0, 1)] == [2, 2]
    assert all((cloud.cloud / f"p.{i}" / "echo_jax" / sha).exists() for i in (0, 1))
    assert re.search("restart 1 of 10 after the connection was lost; p is (PREEMPTED|SUSPENDED|MISSING)", output), (
        output
    )


def test_run_survives_a_lost_connection_and_is_found_again(cloud: Cloud):
    cloud.pod()
    cloud.plan("wait(); print('the end')")
    with cloud.start("launch.sh", *cloud.arguments()) as process:
        wait_for(lambda: len(list(cloud.workdir.glob("waiting-*"))) == 2)
        for i in (0, 1):
            (cloud.cloud / f"cut.p.{i}").touch()
        wait_for(lambda: len(cloud.calls("tpu-vm", "describe")) == 1)
        for i in (0, 1):
            (cloud.cloud / f"cut.p.{i}").unlink()
        wait_for(lambda: len(cloud.calls("ssh")) == 4)
        time.sleep(1)
        (cloud.workdir / "go").touch()
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "[0] this run is already active here" in output
    assert "[1] the end" in output
    assert [len(cloud.started(i)) for i in (0, 1)] == [1, 1]


@pytest.mark.parametrize("signals", [pytest.param([], marks=pytest.mark.variant), [signal.SIGINT]])
def test_command_repeated_by_gcloud_starts_nothing_twice(cloud: Cloud, signals: list[int]):
    cloud.pod()
    cloud.plan("wait()")
    (cloud.cloud / "patient").touch()
    with cloud.start("launch.sh", *cloud.arguments()) as process:
        wait_for(lambda: len(list(cloud.workdir.glob("waiting-*"))) == 2)
        (cloud.cloud / "cut.p.1").touch()
        time.sleep(0.5)
        for number in signals:
            os.killpg(process.pid, number)
        (cloud.workdir / "go").touch()
        wait_for(lambda: all((cloud.cloud / f"p.{i}" / "echo_jax" / "state" / "status").exists() for i in (0, 1)))
        (cloud.cloud / "cut.p.1").unlink()
        output = process.communicate(timeout=60)[0]
    assert process.returncode == (130 if signals else 0), output
    assert [len(cloud.started(i)) for i in (0, 1)] == [1, 1]


def test_worker_not_reached_before_a_stop_starts_nothing_after_it(cloud: Cloud):
    cloud.pod()
    cloud.plan("wait()")
    (cloud.cloud / "patient").touch()
    (cloud.cloud / "cut.p.1").touch()
    with cloud.start("launch.sh", *cloud.arguments()) as process:
        wait_for(lambda: list(cloud.workdir.glob("waiting-0-1")))
        os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda: (cloud.cloud / "p.1" / "echo_jax" / "state" / "stopped").exists())
        (cloud.cloud / "cut.p.1").unlink()
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert cloud.started(1) == []


def test_second_launch_on_a_busy_pod_is_refused(cloud: Cloud):
    cloud.pod()
    cloud.plan("wait()")
    with cloud.start("launch.sh", *cloud.arguments()) as process:
        wait_for(lambda: len(list(cloud.workdir.glob("waiting-*"))) == 2)
        status, output = cloud.launch("--config.seed=1")
        assert status == 1
        assert "another run is active on worker 1: " in output
        assert f"--config=c.py {str(cloud.workdir).replace(' ', chr(92) + ' ').join(('--workdir=', ''))}" in output
        assert "to stop it, run on all workers: " in output
        (cloud.workdir / "go").touch()
        assert process.wait(timeout=60) == 0
    assert [len(cloud.started(i)) for i in (0, 1)] == [1, 1]


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [(signal.SIGINT, "SIGINT", 130), pytest.param(signal.SIGTERM, "SIGTERM", 75, marks=pytest.mark.variant)],
)
def test_signal_reaches_all_workers_once_without_a_restart(cloud: Cloud, number, name: str, status: int):
    cloud.pod()
    cloud.plan("wait()")
    with cloud.start("launch.sh", *cloud.arguments()) as process:
        wait_for(lambda: len(list(cloud.workdir.glob("waiting-*"))) == 2)
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == status
    assert [(cloud.workdir / f"signal-{i}").read_text() for i in (0, 1)] == [name, name]
    assert [len(cloud.started(i)) for i in (0, 1)] == [1, 1]
    assert not cloud.left_behind()


def test_second_signal_kills_the_run_on_the_pod(cloud: Cloud):
    cloud.pod()
    cloud.plan("signal.signal(signal.SIGINT, signal.SIG_IGN); (workdir / f'waiting-{worker}').touch(); time.sleep(60)")
    with cloud.start("launch.sh", *cloud.arguments()) as process:
        wait_for(lambda: len(list(cloud.workdir.glob("waiting-*"))) == 2)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 137
    assert not cloud.left_behind()


def test_pod_with_unknown_state_is_not_recreated(cloud: Cloud):
    cloud.pod()
    (cloud.cloud / "down").touch()
    status, output = cloud.launch()
    assert status == 75
    assert "the state of the pod is unknown; the same command resumes" in output
    (cloud.cloud / "down").unlink()
    assert not cloud.calls("create")
    assert not cloud.calls("delete")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=c.py", "--workdir=w"], "--workdir=w is not absolute; all workers of the pod must share it"),
        (["--config=new.py", "--workdir=/w"], "new.py is not committed in"),
    ],
)
def test_paths_that_the_pod_would_not_find_are_refused(cloud: Cloud, arguments: list[str], message: str):
    (cloud.repository / "new.py").touch()
    status, output = cloud.run("launch.sh", "--pod", "p", "--zone", "z", *arguments)
    assert status == 2
    assert output.startswith(f"launch.sh: {message}")
    assert not cloud.calls()


# A sweep on pods


@pytest.mark.slow
def test_two_pods_share_a_sweep_and_run_nothing_twice(cloud: Cloud):
    cloud.pod("a")
    cloud.pod("b")
    # No run ends before both pods own one.
    cloud.plan("""
        def owners():
            return {file.read_text() for file in workdir.parent.glob("*/owner")}

        while len(owners() - {""}) < 2:
            time.sleep(0.02)
    """)
    first, second = (cloud.start("launch.sh", *cloud.arguments("--sweep", pod=pod)) for pod in "ab")
    with first as a, second as b:
        outputs = [process.communicate(timeout=120)[0] for process in (a, b)]
    assert (a.returncode, b.returncode) == (0, 0), outputs
    owners = [(cloud.workdir / f"seed={seed}" / "owner").read_text() for seed in range(4)]
    assert set(owners) == {"a", "b"}
    for seed in range(4):
        for i in (0, 1):
            ((*arguments, override),) = cloud.started(i, f"seed={seed}")
            assert f"--owner={owners[seed]}" in arguments
            assert override == f"--config.seed={seed}"
    for pod, output in zip("ab", outputs, strict=True):
        skipped = output.count("belongs to another owner, left alone") + output.count("done before")
        assert skipped == owners.count("b" if pod == "a" else "a")
        logs = cloud.repository / "runs" / "pods" / pod / cloud.workdir.name
        for seed in range(4):
            assert (logs / f"seed={seed}" / "log.txt").exists() or owners[seed] != pod
    # The table is made on a machine that sees the workdirs; that of the pod that finishes last is complete.
    assert max(output.count("yes") for output in outputs) == 4
    assert (cloud.workdir / "results.csv").read_text().count("yes") >= 3


@pytest.mark.slow
def test_sweep_finds_its_own_runs_again(cloud: Cloud):
    cloud.pod()
    cloud.plan("if starts == 1 and 'config.seed' in flags and flags['config.seed'] == '1': sys.exit(75)")
    status, output = cloud.launch("--sweep", "--restarts=0", "--only=seed=[01]")
    assert status == 1
    assert "[2/2] seed=1: FAILED with status 75 (the same command resumes it)" in output
    assert cloud.launch("--sweep", "--only=seed=[01]")[0] == 0
    assert [len(cloud.started(0, f"seed={seed}")) for seed in (0, 1, 2)] == [1, 2, 0]


@pytest.mark.variant  # each of its halves has a test: a dry run's commands, a sweep on a pod
def test_dry_run_of_a_sweep_on_a_pod_prints_every_run_and_the_table(cloud: Cloud):
    cloud.pod()
    status, output = cloud.launch("--sweep", "--dry-run")
    lines = output.splitlines()
    assert (status, len(lines), cloud.calls()) == (0, 5, [])
    assert not (cloud.repository / "runs").exists()
    for line in lines:
        assert subprocess.run(["bash", "-c", line], env=cloud.environment, cwd=cloud.repository).returncode == 0
    assert all((cloud.workdir / f"seed={seed}" / "DONE").exists() for seed in range(4))
    assert (cloud.workdir / "results.csv").read_text().count("yes") == 4


def test_commit_can_be_chosen(cloud: Cloud):
    cloud.pod()
    sha = cloud.git("rev-parse", "HEAD")
    (cloud.repository / "c.py").unlink()
    cloud.commit()
    assert cloud.launch("--commit", "HEAD~1")[0] == 0
    assert (cloud.cloud / "p.0" / "echo_jax" / sha / "c.py").exists()
    assert cloud.launch("--commit", "nothing") == (2, "launch.sh: there is no commit nothing\n")


@pytest.mark.variant
def test_report_of_a_sweep_on_a_pod_starts_nothing(cloud: Cloud):
    cloud.pod()
    status, output = cloud.launch("--sweep", "--report")
    assert status == 0
    assert "results.csv" in output
    assert not list(cloud.workdir.glob("seed=*"))
