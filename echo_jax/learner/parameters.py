"""The parameters of a run: the initial ones, and those of a checkpoint.

In: a seed or published weights. Out: the trained and the frozen parameters (see models/lora.py). A checkpoint holds
only the trained ones; the frozen ones are read or drawn again and must be the same bit for bit.
"""

from typing import NamedTuple

from rich.console import Console

from echo_jax.learner.checkpoint import Checkpointer, CheckpointError, fingerprint
from echo_jax.learner.learner import Learner
from echo_jax.learner.step import TrainState
from echo_jax.models import lora
from echo_jax.models.families import tensor_names
from echo_jax.models.pretrained import load_params
from echo_jax.models.sources import Source, WeightsError
from echo_jax.models.transformer import init_adapters, init_params
from echo_jax.system.progress import Progress


def begin(learner: Learner, source: Source | None, *, quiet: bool = False) -> tuple[dict, dict]:
    """Returns the (trained, frozen) parameters at the start of a run: published weights, or random ones.

    Args:
      source: the published weights; None for random ones.
      quiet: show no progress.
    """
    config, seed, mesh = learner.model_config, learner.config.seed, learner.mesh
    if source is None:
        return lora.split(init_params(config, seed, mesh)[1])
    base = _published(learner, source, quiet)
    return (init_adapters(config, seed, mesh), base) if config.lora.rank else (base, {})


def _published(learner: Learner, source: Source, quiet: bool) -> dict:
    total, console = len(tensor_names(learner.model_config)), Console(quiet=quiet)
    with Progress("reading tensors", total=total, console=console) as progress:
        return load_params(source, learner.model_config, learner.mesh, on_tensor=progress.update)


class Restored(NamedTuple):
    state: TrainState
    frozen: dict
    step: int
    observation_factor: float = 1.0  # of the controller, see objective/control.py

    @property
    def params(self) -> dict:
        return lora.join(self.state.params, self.frozen)


def save(
    checkpointer: Checkpointer, step: int, state: TrainState, frozen: dict, observation_factor: float = 1.0
) -> None:
    record = {"step": step, "frozen": fingerprint(frozen), "observation_factor": observation_factor}
    checkpointer.save(step, state, record)


def restore(
    checkpointer: Checkpointer,
    learner: Learner,
    source: Source | None,
    *,
    step: int | None = None,
    quiet: bool = False,
) -> Restored:
    """Returns a checkpoint of a run: that of `step` or, by default, the newest.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be used.
      WeightsError: the frozen parameters have changed since.
    """
    state, saved = checkpointer.restore(learner.abstract_state(), step)
    frozen = {}
    if learner.model_config.lora.rank:
        if "frozen" not in saved:
            raise CheckpointError(
                f"the checkpoint of step {saved['step']} is of an earlier version, which kept no fingerprint of frozen "
                "weights; choose a new --workdir"
            )
        frozen = begin(learner, None)[1] if source is None else _published(learner, source, quiet)
    # Checkpoints from before adapters existed have no entry for frozen parameters: there were none.
    if fingerprint(frozen) != saved.get("frozen", ""):
        raise WeightsError(
            f"the weights of {learner.config.model.weights or 'the seed'} are not those that the adapters of step "
            f"{saved['step']} were trained on; restore those"
        )
    return Restored(state, frozen, saved["step"], saved.get("observation_factor", 1.0))
