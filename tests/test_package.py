"""The package's exports, for use in other trainers; importing it has no side effects."""

import ast
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "echo_jax").rglob("*.py")
)


def loaded_by(code: str) -> set[str]:
    """Returns the modules that a fresh interpreter has loaded after some code."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_and_each_name_only_what_it_needs():
    assert {name for name in loaded_by("import echo_jax") if name.startswith(("jax", "echo_jax."))} == set()
    role = loaded_by("from echo_jax import Role; assert Role.ACTION == 3")
    assert {name for name in role if name.startswith(("jax", "echo_jax."))} == {"echo_jax.roles"}
    all_names = loaded_by("from echo_jax import *; assert callable(echo_loss) and callable(pack) and fused_logprobs")
    assert not {name for name in all_names if name.startswith(("echo_jax.tools", "echo_jax.tasks", "echo_jax.run."))}


def test_unknown_name_is_reported_with_the_available_ones():
    import echo_jax

    assert {"Role", "echo_loss", "fused_logprobs", "pack"} <= set(dir(echo_jax))
    with pytest.raises(AttributeError, match="'pak'; it has Role, echo_loss, fused_logprobs, pack"):
        _ = echo_jax.pak


def test_compiling_ahead_of_time_loads_no_task_tool_or_collector():
    loaded = loaded_by("import echo_jax.compile")
    assert "echo_jax.learner.learner" in loaded
    parts = ("echo_jax.tasks", "echo_jax.tools", "echo_jax.rollout.collector", "echo_jax.rollout.world")
    assert {name for name in loaded if name.startswith(parts)} == set()


def test_importing_any_module_touches_no_device():
    """JAX creates its backends only when a device is first requested."""
    modules = [name for name in MODULES if not name.endswith(("supervisor", "fork_server"))]  # they run in the sandbox
    code = "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in modules)
    code += "from jax._src import xla_bridge; assert not xla_bridge._backends, xla_bridge._backends"
    assert "echo_jax.run.trainer" in loaded_by(code)


@pytest.mark.parametrize("script", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda path: path.stem)
def test_scripts_of_the_experiments_import_what_exists(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("echo_jax"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(below), below


@pytest.mark.slow
def test_a_wheel_works_from_any_folder(tmp_path):
    """Installed without the checkout in sight: the package's data, the first steps of a run, and programs on it."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    )
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", str(source)], check=True)
    (wheel,) = tmp_path.glob("echo_jax-*.whl")
    subprocess.run([*pip, "install", "--no-deps", f"--target={tmp_path / 'site'}", str(wheel)], check=True)
    shutil.rmtree(source)
    folder = tmp_path / "anywhere"
    folder.mkdir()
    shutil.copy(ROOT / "configs" / "tiny.py", folder)

    def python(*arguments):
        run = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment(1) | {"PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    assert str(tmp_path / "site") in python("-c", "import echo_jax; print(echo_jax.__file__)")
    steps = ["--config.warm_start.num_steps=2", "--config.num_steps=1"]
    assert "complete" in python("-m", "echo_jax.train", "--config=tiny.py", "--workdir=w", *steps)
    assert "1 rollouts" not in python("-m", "echo_jax.view", "--workdir=w", "--show=1")
    assert json.loads(python("-m", "echo_jax.evaluate", "--workdir=w"))["step"] == 3
    assert "solved by the script: 2 of 2" in python("-m", "echo_jax.tasks", "--task=python", "--count=2", "--show=1")
