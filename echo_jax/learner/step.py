"""One optimizer update, jitted and donated; and the same forward pass without an update.

In: a `TrainState` and a `Batch` on the mesh. Out: the next state and metric sums.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from echo_jax.models import lora
from echo_jax.models.transformer import bind
from echo_jax.objective.batch import Batch, micro_batches_in_use
from echo_jax.objective.loss import HeadOptions, LossOptions, Sums, add_sums, denominators, echo_loss, score
from echo_jax.system.sharding import replicated, sharding_of


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes. With adapters, `params` holds only these; frozen parameters are passed
    separately."""

    step: jax.Array  # int32: number of updates, counted from the `step` of `init_state`
    params: dict
    opt_state: optax.OptState


def init_state(params, optimizer: optax.GradientTransformation, mesh: Mesh, step: int = 0) -> TrainState:
    """Returns a state with a fresh optimizer, its moments laid out like the parameters."""
    shardings = opt_state_shardings(params, optimizer, mesh)
    opt_state = jax.jit(_initial(optimizer), out_shardings=shardings)(params)
    start = jax.jit(lambda: jnp.int32(step), out_shardings=replicated(mesh))()
    return TrainState(step=start, params=params, opt_state=opt_state)


def _in_float32(params):
    """Returns float32 copies: gradients, moments and updates are float32, whatever the dtype of the parameters."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _initial(optimizer: optax.GradientTransformation):
    return lambda params: optimizer.init(_in_float32(params))


def opt_state_shardings(params, optimizer: optax.GradientTransformation, mesh: Mesh):
    """Returns the optimizer state's shardings: a moment is sharded like its parameter, all else is replicated."""
    abstract = jax.eval_shape(_initial(optimizer), params)
    missing = lambda moment: isinstance(moment, optax.MaskedNode)  # of a parameter that another optimizer has  # noqa: E731
    return optax.tree.map_params(
        optimizer,
        lambda moment, param: moment if missing(moment) else param.sharding,
        abstract,
        params,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=missing,
    )


def abstract_state(abstract_params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state as ShapeDtypeStructs with shardings, to restore a checkpoint into."""
    shapes = jax.eval_shape(_initial(optimizer), abstract_params)
    shardings = opt_state_shardings(abstract_params, optimizer, mesh)
    opt_state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(step=step, params=abstract_params, opt_state=opt_state)


def micro_batch(batch: Batch, i: jax.Array, mesh: Mesh) -> Batch:
    """Returns micro-batch `i`, fields [B, T], with its rows sharded over the data axes."""
    rows = sharding_of(mesh, ("batch", "time"))
    take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)  # noqa: E731
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(take(x), rows), batch)


def _forward(graphdef, params, micro: Batch, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """Returns hidden states [B, T, D] of a micro-batch, and the LM head [V, D]."""
    model = bind(graphdef, params)
    return model(micro.tokens, micro.positions, micro.segment_ids, mesh), model.head()


def loss_and_grads(graphdef, params, frozen, batch: Batch, mesh: Mesh, options: LossOptions):
    """Returns (metric sums, gradients f32) of a whole update, accumulated over its micro-batches, batch [M, B, T].

    `frozen`: parameters without a gradient, see `lora.split`.
    The loop runs over the micro-batches in use, the most of any process; its shapes are fixed.
    """
    inverse_denominators = denominators(batch)

    def micro_loss(params, micro):
        hidden, head_weights = _forward(graphdef, lora.join(params, frozen), micro, options.head.mesh)
        return echo_loss(hidden, head_weights, micro, inverse_denominators, options)

    def accumulate(i, carry):
        sums, grads = carry
        micro = micro_batch(batch, i, mesh)
        (_, more_sums), more_grads = jax.value_and_grad(micro_loss, has_aux=True)(params, micro)
        return add_sums(sums, more_sums), jax.tree.map(jnp.add, grads, more_grads)

    shapes = jax.eval_shape(micro_loss, params, jax.tree.map(lambda x: x[0], batch))[1]
    no_grads = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    zeros = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), no_grads)
    return jax.lax.fori_loop(0, micro_batches_in_use(batch), accumulate, zeros)


def make_train_step(
    graphdef, abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh, options: LossOptions
) -> Callable[[TrainState, dict, Batch], tuple[TrainState, Sums]]:
    """Returns the jitted update, (state, frozen parameters, batch) -> (next state, metric sums). It donates the state
    and shards the next one like `abstract`, so it compiles once."""

    def train_step(state: TrainState, frozen, batch: Batch):
        sums, grads = loss_and_grads(graphdef, state.params, frozen, batch, mesh, options)
        updates, opt_state = optimizer.update(grads, state.opt_state, _in_float32(state.params))
        params = optax.apply_updates(state.params, updates)
        sums["train/gradient_norm"] = optax.tree.norm(grads)
        sums["train/update_norm"] = optax.tree.norm(updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), sums

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_term_gradients(graphdef, mesh: Mesh, options: LossOptions) -> Callable[..., dict[str, jax.Array]]:
    """Returns the jitted comparison of the two terms' gradients, (params, frozen parameters, batch) -> norms and
    cosine. It costs two more backward passes, so use it occasionally."""

    def term_gradients(params, frozen, batch: Batch):
        nothing = jnp.zeros_like(batch.policy_weight)
        parts = {
            "policy": batch.replace(observation_weight=nothing),
            "observation": batch.replace(policy_weight=nothing, kl_weight=nothing, entropy_weight=nothing),
        }
        grads = {name: loss_and_grads(graphdef, params, frozen, part, mesh, options)[1] for name, part in parts.items()}
        norms = {name: optax.tree.norm(grad) for name, grad in grads.items()}
        product = norms["policy"] * norms["observation"]
        dot = optax.tree.vdot(grads["policy"], grads["observation"])
        cosine = jnp.where(product > 0, dot / jnp.maximum(product, 1e-30), 0.0)
        return {f"{name}/gradient_norm": norm for name, norm in norms.items()} | {"loss/gradient_cosine": cosine}

    return jax.jit(term_gradients, out_shardings=replicated(mesh))


def make_term_values(graphdef, mesh: Mesh, options: LossOptions) -> Callable[..., dict[str, jax.Array]]:
    """Returns the jitted (params, frozen parameters, batch) -> sizes of the two terms, each with the absolute values of
    its tokens' losses; it has no backward pass. On rollouts of the same policy the policy losses are advantages, whose
    plain sum is rounding noise."""
    options = dataclasses.replace(options, measures_size=True)

    def term_values(params, frozen, batch: Batch):
        inverse_denominators = denominators(batch)

        def add(i, values):
            micro = micro_batch(batch, i, mesh)
            hidden, head_weights = _forward(graphdef, lora.join(params, frozen), micro, options.head.mesh)
            sums = echo_loss(hidden, head_weights, micro, inverse_denominators, options)[1]
            return {
                "policy": values["policy"] + sums["policy/size"],
                "observation": values["observation"] + sums["loss/observation"],
            }

        zero = jnp.float32(0.0)
        return jax.lax.fori_loop(0, micro_batches_in_use(batch), add, {"policy": zero, "observation": zero})

    return jax.jit(term_values, out_shardings=replicated(mesh))


def make_logprobs(graphdef, mesh: Mesh, head: HeadOptions) -> Callable[[dict, Batch], jax.Array]:
    """Returns the jitted (params, batch) -> f32 [M, B, T], the targets' log-probs at their temperatures; 0 in
    unused micro-batches."""

    def logprobs(params, batch: Batch):
        def fill(i, values):
            micro = micro_batch(batch, i, mesh)
            hidden, head_weights = _forward(graphdef, params, micro, head.mesh)
            scored = score(hidden, head_weights, micro, head).logprob
            return jax.lax.dynamic_update_index_in_dim(values, scored, i, 0)

        return jax.lax.fori_loop(0, micro_batches_in_use(batch), fill, jnp.zeros_like(batch.old_logprob))

    return jax.jit(logprobs, out_shardings=sharding_of(mesh, ("micro", "batch", "time")))


def make_score(graphdef, mesh: Mesh, head: HeadOptions, tools: tuple[str, ...] = ()) -> Callable[[dict, Batch], Sums]:
    """Returns the jitted forward pass over one micro-batch [B, T]: metric sums without gradients. `tools`: see
    `LossOptions`."""
    options = LossOptions(policy="imitation", head=head, tools=tools)

    def metric_sums(params, micro: Batch):
        hidden, head_weights = _forward(graphdef, params, micro, head.mesh)
        ones = dict.fromkeys(micro.denominators, jnp.float32(1.0))
        return echo_loss(hidden, head_weights, micro, ones, options)[1]

    return jax.jit(metric_sums, out_shardings=replicated(mesh))
