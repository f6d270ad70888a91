"""The limit of open files is raised as far as it may be, or the run says before it starts that it does not suffice."""

import subprocess
import sys

import pytest

CODE = """
import resource
from echo_jax.system.descriptors import allow_sandboxes
from echo_jax.system.errors import ConfigError
try:
    allow_sandboxes(128, 3)
    print("allowed", *resource.getrlimit(resource.RLIMIT_NOFILE))
except ConfigError as error:
    print(error)
"""


def under(soft: int, hard: int) -> str:
    command = f"ulimit -Sn {soft}; ulimit -Hn {hard}; exec \"{sys.executable}\" -c '{CODE}'"
    return subprocess.run(["bash", "-c", command], check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout.strip()


@pytest.mark.parametrize(("soft", "hard", "raised"), [(256, 1000, 1000), (600, 600, 600), (256, 4096, 4096)])
def test_the_soft_limit_is_raised_to_the_hard_one(soft, hard, raised):
    assert under(soft, hard) == f"allowed {raised} {hard}"


def test_a_hard_limit_that_does_not_suffice_is_named_with_what_would():
    said = under(256, 256)
    assert said.startswith("128 sandboxes are open at once and take 384 file descriptors, the rest of the run ")
    assert "this process may have 256" in said
    fitting = int(said.rsplit(" ", 1)[1])
    assert 60 < fitting < 75
    assert "max_sandboxes" not in under(34, 34)
