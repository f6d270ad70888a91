"""Every test sees eight CPU devices; a test that wants one makes its mesh from one of them."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # tests that compile for TPU have no TPU to ask about
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and compute little: compiling without optimisation makes them several times faster.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
