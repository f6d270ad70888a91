"""Code reads in one direction: a folder imports only folders before it, and programs hold only flags and `main`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "echo_jax"

# The parts of the package in the order of the data flow; each may import those before it. Within a folder any import is
# allowed.
ORDER = [
    "__init__",
    "roles",
    "system",
    "config",
    "presets",
    "tokenizer",
    "tools",
    "render",
    "kernels",
    "models",
    "tasks",
    "rollout",
    "objective",
    "learner",
    "run",
]
PROGRAMS = {"train", "evaluate", "sweep", "view", "export", "compile", "tasks.__main__"}
RANK = {name: rank for rank, name in enumerate(ORDER)} | dict.fromkeys(PROGRAMS, len(ORDER))


def unit(path: Path) -> str:
    """Returns the file's name in RANK: that of its folder, unless it is a program."""
    if path.name == "__main__.py":
        return f"{path.parent.name}.__main__"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports here are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("echo_jax.") and "." in name)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = unit(path)
    for imported in imports(path):
        assert imported == own or RANK[imported] < RANK[own], f"{own} imports {imported}"


def test_files_and_ranks_match():
    assert {unit(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", [path for path in FILES if unit(path) in PROGRAMS], ids=unit)
def test_program_holds_only_flags_and_main(path):
    functions = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert functions == ["main"]


@pytest.mark.parametrize("folder", sorted({p.parent for p in FILES}), ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_every_folder_states_its_input_and_output(folder):
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert folder == PACKAGE or ("In: " in docstring and "Out: " in docstring)
