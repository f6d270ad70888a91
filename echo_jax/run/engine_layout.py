"""The shapes that a config's engine has, for a run and for its compilation ahead of time.

In: a learner and an engine's mesh. Out: a `Layout`, or an error that names the config's field.
"""

from jax.sharding import Mesh

from echo_jax.config import ConfigError
from echo_jax.learner.learner import Learner
from echo_jax.rollout.engine.layout import Layout, PoolTooSmall, plan_layout


def engine_layout(learner: Learner, mesh: Mesh, free_bytes: int | None = None) -> Layout:
    """Returns the layout of a process's engine, whose devices have so much memory left; None: enough.

    Raises:
      PoolTooSmall: for one session.
      ConfigError: the engine's options cannot work.
    """
    rollout = learner.config.rollout
    sizes = {"sessions": learner.rollouts_at_once, "max_tokens": rollout.max_tokens, "free_bytes": free_bytes}
    try:
        return plan_layout(learner.model_config, mesh, **sizes, **rollout.engine_options)
    except ValueError as error:
        if isinstance(error, PoolTooSmall) and free_bytes is not None:
            raise
        raise ConfigError(f"config.rollout.engine_options: {error}") from error
