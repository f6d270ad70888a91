"""The optimizer: a clip of the global gradient norm, then one of `OPTIMIZERS`, at a rate that follows a schedule.

In: the fields of `config.optimizer` and the rate of a phase of the run. Out: an optax transformation, and its schedule.
Weight decay is decoupled from the gradient (arXiv 1711.05101) and applies to matrices, not to the scales of norms or to
biases.
"""

from collections.abc import Callable

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from echo_jax.models import lora
from echo_jax.models.transformer import MATRICES

# What follows the warm-up: (learning rate, updates that the decay takes, share of the rate at its end) -> schedule.
DECAYS: dict[str, Callable[[float, int, float], optax.Schedule]] = {
    "linear": lambda rate, steps, end_share: optax.linear_schedule(rate, end_share * rate, steps),
    "cosine": optax.cosine_decay_schedule,
}
SCHEDULES = ("constant", *DECAYS)


def make_schedule(
    learning_rate: float, *, warmup_steps: int, kind: str = "constant", steps: int = 0, end_share: float = 0.0
) -> optax.Schedule:
    """Returns the rate of each update, counted from 0: a linear warm-up, then a constant rate or a decay.

    Args:
      kind: one of SCHEDULES.
      steps: updates until a decay ends, with the rate at `end_share` of the learning rate; the warm-up counts.
    """
    # Update n of the warm-up has n / (warmup_steps + 1) of the learning rate, so that no update has a rate of 0.
    warmup = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    if kind == "constant":
        return warmup
    decay = DECAYS[kind](learning_rate, steps - warmup_steps, end_share)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    clip_norm: float,
    weight_decay: float,
    name: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    momentum: float = 0.0,
) -> optax.GradientTransformation:
    """Returns the optimizer of this name, a key of OPTIMIZERS. It ignores what it has no use for: see `USES`."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        OPTIMIZERS[name](schedule, b1=b1, b2=b2, momentum=momentum, weight_decay=weight_decay),
    )


def _adamw(schedule, *, b1, b2, weight_decay, **_):
    """AdamW (arXiv 1711.05101, algorithm 2)."""
    return optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=_decays)


def _sgd(schedule, *, momentum, weight_decay, **_):
    """SGD with heavy-ball momentum and decoupled weight decay (arXiv 1711.05101, algorithm 1)."""
    return optax.chain(
        optax.trace(momentum) if momentum else optax.identity(),
        optax.add_decayed_weights(weight_decay, mask=_decays),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(schedule, *, b1, b2, weight_decay, **_):
    """Muon (Jordan 2024, kellerjordan.github.io/posts/muon, momentum 0.95) for the matrices of the layers, AdamW for
    all else. Muon's updates are scaled to the size of AdamW's, so that one rate and decay suit both (arXiv 2502.16982,
    section 2.2)."""
    return optax.partition(
        {
            "muon": optax.contrib.muon(
                schedule,
                weight_decay=weight_decay,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=lambda params: _by_name(params, matrix_axes),
            ),
            "adamw": _adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay),
        },
        lambda params: _by_name(params, lambda name: "adamw" if matrix_axes(name) is None else "muon"),
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": _adamw, "sgd": _sgd, "muon": _muon}
# The fields of config.optimizer that not every optimizer uses.
USES = {"adamw": ("b1", "b2"), "sgd": ("momentum",), "muon": ("b1", "b2")}


def matrix_axes(name: str) -> MuonDimensionNumbers | None:
    """Returns which axes of a layer's parameter are the inputs and which the outputs of its matrix, counted from the
    last; None for a parameter that is no matrix of a layer. Axes before these count matrices: layers and experts."""
    base = name.removesuffix(lora.A).removesuffix(lora.B)
    if base not in MATRICES:
        return None
    inputs, outputs = map(len, MATRICES[base])
    if name.endswith(lora.A):
        outputs = 1  # the rank
    elif name.endswith(lora.B):
        inputs = 1
    return MuonDimensionNumbers(tuple(range(-inputs - outputs, -outputs)), tuple(range(-outputs, 0)))


def updates_made(opt_state: optax.OptState) -> int:
    """Returns how many updates an optimizer has made: all counters of its state hold that."""
    return int(optax.tree.get_all_with_path(opt_state, "count")[0][1])


def _decays(params):
    return _by_name(params, lambda name: not name.endswith(("_norm", "_bias")))


def _by_name(params, value):
    """Returns a tree like the parameters' with `value(name)` for each."""
    return jax.tree_util.tree_map_with_path(lambda path, _: value(path[-1].key), params)
