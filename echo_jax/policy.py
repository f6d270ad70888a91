"""The parameters of a run: those that it begins with, and those that a checkpoint of it holds.

In: a `Runtime`, which says where weights come from. Out: the trained and the frozen part (see models/lora.py). A
checkpoint keeps what is trained; what is frozen is read again from where it came, and must be the same bit for bit.
"""

from typing import NamedTuple

from rich.console import Console

from echo_jax.checkpoint import Checkpointer, CheckpointError, fingerprint
from echo_jax.models import lora
from echo_jax.models.families import tensor_names
from echo_jax.models.pretrained import load_params
from echo_jax.models.sources import WeightsError
from echo_jax.models.transformer import init_adapters, init_params
from echo_jax.progress import Progress
from echo_jax.runtime import Runtime
from echo_jax.train_step import TrainState


def begin(runtime: Runtime) -> tuple[dict, dict]:
    """Returns what is trained and what is frozen, as a run begins: published weights, or random ones."""
    config, seed, mesh = runtime.model_config, runtime.config.seed, runtime.mesh
    if runtime.source is None:
        return lora.split(init_params(config, seed, mesh)[1])
    base = _published(runtime)
    return (init_adapters(config, seed, mesh), base) if config.lora.rank else (base, {})


def _published(runtime: Runtime) -> dict:
    total, console = len(tensor_names(runtime.model_config)), Console(quiet=not runtime.peers.is_first)
    with Progress("reading tensors", total=total, console=console) as progress:
        return load_params(runtime.source, runtime.model_config, runtime.mesh, on_tensor=progress.update)


class Restored(NamedTuple):
    state: TrainState
    frozen: dict
    step: int

    @property
    def params(self) -> dict:
        return lora.join(self.state.params, self.frozen)


def save(checkpointer: Checkpointer, step: int, state: TrainState, frozen: dict) -> None:
    checkpointer.save(step, state, {"step": step, "frozen": fingerprint(frozen)})


def restore(checkpointer: Checkpointer, runtime: Runtime) -> Restored:
    """Returns the newest checkpoint of a run.

    Raises:
      CheckpointError: there is none, or it cannot be used.
      WeightsError: what it trains beside is no longer what it was.
    """
    state, saved = checkpointer.restore(runtime.abstract_state())
    frozen = {}
    if runtime.model_config.lora.rank:
        frozen = begin(runtime)[1] if runtime.source is None else _published(runtime)
    if "frozen" not in saved:
        raise CheckpointError(
            f"the checkpoint of step {saved['step']} is of an earlier version, without a fingerprint of what is "
            "frozen; choose a new --workdir"
        )
    if fingerprint(frozen) != saved["frozen"]:
        raise WeightsError(
            f"the weights of {runtime.config.model.weights or 'the seed'} are not those that the adapters of step "
            f"{saved['step']} were trained on; bring those back"
        )
    return Restored(state, frozen, saved["step"])
