"""Laws of the bash tool and of the table of tools."""

import subprocess
import sys

from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import Limits, Sandbox, Status


def test_every_tool_is_listed_under_its_own_name():
    assert all(tool.name == name for name, tool in TOOLS.items())


def test_bash_gives_back_what_the_command_printed_and_keeps_no_state():
    with Sandbox(limits=Limits(), files={"notes.txt": b"one\ntwo\n"}) as sandbox:
        assert TOOLS["bash"]().run(sandbox, "export N=$(wc -l < notes.txt)").status is Status.OK
        result = TOOLS["bash"]().run(sandbox, "echo $N; exit 4")
    assert (result.status, result.exit_code, result.head) == (Status.NONZERO, 4, b"2\n")


def test_importing_the_tools_starts_no_process_and_loads_no_jax():
    code = (
        "import sys, subprocess; subprocess.Popen = None; import echo_jax.tools, threading; "
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules and threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
