"""A folder as published models come in: weights, configuration and tokenizer."""

import json
from pathlib import Path

from echo_jax.learner import parameters
from echo_jax.models.families import published_config
from echo_jax.models.save_pretrained import write_weights
from echo_jax.run.build import build


def write_model(folder: Path, config) -> Path:
    """Writes the random weights of a config with seed 7; returns the folder."""
    config = config.copy_and_resolve_references()
    config.seed = 7
    built = build(config)
    folder.mkdir()
    write_weights(parameters.begin(built.learner, built.source)[0], built.learner.model_config, folder, dtype="float32")
    built.renderer.tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(published_config(built.learner.model_config, max_length=64)))
    return folder
