"""A file imports only files of lower ranks, so the code reads in one direction."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "echo_jax"

# rank -> modules, dotted below echo_jax; a folder's modules may import each other
RANKS = [
    {
        "",
        "roles",
        "config",
        "metrics",
        "progress",
        "provenance",
        "checkpoint",
        "sharding",
        "cli",
        "hlo",
        "profiler",
        "peers",
    },
    {"batch", "tokenizer", "tools", "kernels"},
    {"calls"},
    {"trajectory", "render", "models"},
    {"flops"},
    {"tasks", "advantages", "policy_loss", "optimizer"},
    {"selection"},
    {"objective"},
    {"packing", "loss"},
    {"engine", "episode", "train_step", "environment", "rollout_metrics"},
    {"rollout", "training"},
    {"runtime"},
    {"world_model", "update", "policy"},
    {"evaluate"},
    {"trainer"},
    {"train", "sweep", "view", "compile", "export", "tasks.__main__"},
]
RANK_OF = {module: rank for rank, modules in enumerate(RANKS) for module in modules}


def unit(path: Path) -> str:
    """The file's name in RANKS: a folder counts as one, but for a program in it."""
    if path.name == "__main__.py":
        return f"{path.parent.name}.__main__"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


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
        assert imported == own or RANK_OF[imported] < RANK_OF[own], f"{own} imports {imported}"


def test_every_file_has_a_rank_and_every_rank_a_file():
    assert {unit(path) for path in FILES} == set(RANK_OF)
