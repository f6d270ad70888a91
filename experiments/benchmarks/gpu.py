"""What the benchmarks on a GPU say about where they ran."""

import platform
import subprocess

import jax


def machine() -> str:
    """Returns the GPU, its driver, and the versions."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    except FileNotFoundError:
        return f"{jax.devices()[0].device_kind}, Python {platform.python_version()}, jax {jax.__version__}"
    cuda = int(jax.devices()[0].client.platform_version.split()[-1])  # such as "cuda 13000"
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    return f"one {name}, driver {driver}, {versions}"
