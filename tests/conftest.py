"""Every test sees eight CPU devices; a test that needs one makes its mesh from one of them."""

import importlib.util
import mmap
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # tests that compile for TPU have no TPU to query
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and compute little, so compiling without optimisation makes them several times faster.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)


def xla_has(flag: str) -> bool:
    """Returns whether this jaxlib knows a flag of XLA; XLA ends a process that sets an unknown one."""
    for path in Path(importlib.util.find_spec("jaxlib").origin).parent.glob("*.so"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            if library.find(flag.encode()) >= 0:
                return True
    return False


if xla_has("xla_cpu_use_fusion_emitters"):  # they take half of the compile time
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if xla_has("xla_cpu_parallel_codegen_split_count"):  # to compile a program in 32 parts takes a sixth more CPU time
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

# All processes of this pytest run share compiled programs: xdist's workers and the runs that tests start. An entry
# that another process is still writing, or was killed while writing, is read as a miss (see filterwarnings). `.ci/run`
# names a folder, which its two runs of pytest share.
if "PYTEST_XDIST_WORKER" not in os.environ:
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = tempfile.TemporaryDirectory(prefix="echo_jax_compiled_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Each worker takes whole files. The longest go first, so that no worker ends with one of them alone.
LONGEST = (
    "models/test_smollm2.py",
    "run/test_lifecycle.py",
    "system/test_peers.py",
    "tpu_scripts/test_local_runs.py",
    "models/test_parity.py",
    "objective/test_loss.py",
    "kernels/test_fused_logprobs.py",
    "learner/test_parameters.py",
    "tasks/test_procedural.py",
)


def pytest_collection_modifyitems(items):
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
