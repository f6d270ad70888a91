"""The package's exports, for use in other trainers; importing it has no side effects."""

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    modules = [name for name in MODULES if not name.endswith("supervisor")]  # it runs inside the sandbox
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
