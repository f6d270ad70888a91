"""AdamW after a global-norm clip, with a linear warm-up to a constant learning rate. Weight decay applies to matrices,
not to the scales of norms or to biases."""

import jax
import optax


def make_optimizer(
    *, learning_rate: float, warmup_steps: int, b1: float, b2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    # Update n of the warm-up has n / (warmup_steps + 1) of the learning rate, so that no update has a rate of 0.
    schedule = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=_decays),
    )


def _decays(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("_norm", "_bias")), params)
