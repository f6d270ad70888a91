"""Three updates on recorded trajectories, with any number of processes and devices.

For each mesh: loss, gradients and parameters, which must be equal for all of them.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from synthetic import ECHO, OPTIONS, TINY, varied

from echo_jax.learner.step import abstract_state, init_state, loss_and_grads, make_train_step
from echo_jax.models.transformer import init_params
from echo_jax.objective.advantages import advantages_of
from echo_jax.objective.batch import to_mesh
from echo_jax.objective.packing import pack
from echo_jax.objective.selection import Selection
from echo_jax.objective.weights import weigh
from echo_jax.system.peers import Peers
from echo_jax.system.sharding import make_mesh, processes_of, replicated

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2))
ROWS, LENGTH, MICRO_BATCHES = 8, 48, 4
# All rules that look beyond one rollout: uncertain turns of the update, rewards of a group, repetitions in it.
OBJECTIVE = dataclasses.replace(
    ECHO, selection=Selection(top_entropy=0.6, dedupe=True), reward_adaptive=True, observation_weight=0.5
)


def three_updates(mesh, peers: Peers) -> dict[str, np.ndarray]:
    """Returns loss and gradients of the first update, and the parameters after three of plain gradient descent."""
    recorded = varied()
    # Uneven, and splits groups: process 1 gets rollouts 1 and 7, process 0 all others.
    own = recorded if peers.count == 1 else [t for t in recorded if (t.rollout in (1, 7)) == (peers.index == 1)]
    weights = weigh(own, advantages_of(own, pool=peers.join), OBJECTIVE, peers.join)
    rows = ROWS // processes_of(mesh)
    batch = to_mesh(pack(own, weights, length=LENGTH, rows=rows, micro_batches=MICRO_BATCHES).batch, mesh)
    graphdef, params = init_params(TINY, 0, mesh)
    head = dataclasses.replace(OPTIONS.head, mesh=mesh if mesh.size > 1 else None)
    options = dataclasses.replace(OPTIONS, head=head)
    first = jax.jit(
        lambda params, batch: loss_and_grads(graphdef, params, {}, batch, mesh, options), out_shardings=replicated(mesh)
    )
    sums, grads = first(params, batch)
    found = {f"gradient/{name}": value for name, value in _named(grads).items()}
    optimizer = optax.sgd(0.5)
    step = make_train_step(graphdef, abstract_state(params, optimizer, mesh), optimizer, mesh, options)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, mesh)
    for _ in range(3):
        state, _ = step(state, {}, batch)
    everywhere = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    found |= {f"parameters/{name}": value for name, value in _named(everywhere(state.params)).items()}
    return jax.device_get(found | {"loss": sums["loss/total"]})


def _named(tree) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def write(path: str, peers: Peers, shapes: Sequence[tuple[int, int, int]]) -> None:
    found = {}
    for shape in shapes:
        found |= {f"{shape}/{name}": value for name, value in three_updates(make_mesh(*shape), peers).items()}
    if peers.is_first:
        np.savez(path, **found)
