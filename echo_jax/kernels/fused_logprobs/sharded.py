"""The XLA implementation on a mesh: which shard holds what, for `jax.shard_map`.

Rows of hidden are sharded over the data axes, the head's vocabulary over the tensor axis and its embedding over the
fsdp axis, which is also one of the data axes. Each shard sorts and skips its local rows. Forward and backward are
mapped separately, and the derivative is defined around both, so xla.py writes out every collective of either pass.
"""

import jax
from jax.sharding import Mesh, PartitionSpec

from echo_jax.kernels.fused_logprobs import xla
from echo_jax.kernels.fused_logprobs.xla import Inputs, Options, Scores


def forward(inputs: Inputs, options: Options, mesh: Mesh) -> Scores:
    rows = PartitionSpec(options.axes.tokens)
    return jax.shard_map(
        lambda inputs: xla.forward(inputs, options),
        mesh=mesh,
        in_specs=(_specs(options),),
        out_specs=Scores(*(rows,) * len(Scores._fields)),
        check_vma=False,
    )(inputs)


def backward(inputs: Inputs, scores: Scores, cotangents: Scores, options: Options, mesh: Mesh):
    rows, specs = PartitionSpec(options.axes.tokens), _specs(options)
    per_row = Scores(*(rows,) * len(Scores._fields))
    return jax.shard_map(
        lambda inputs, scores, cotangents: xla.backward(inputs, scores, cotangents, options),
        mesh=mesh,
        in_specs=(specs, per_row, per_row),
        out_specs=(specs.hidden, specs.head),
        check_vma=False,
    )(inputs, scores, cotangents)


def check(inputs: Inputs, options: Options, mesh: Mesh) -> None:
    """Raises ValueError, naming both numbers, if the axes are not the mesh's or do not divide an array evenly."""
    axes = options.axes
    named = [*axes.tokens, *(name for name in (axes.vocab, axes.embed) if name is not None)]
    if isinstance(axes.tokens, str) or not set(named) <= set(mesh.axis_names):
        raise ValueError(f"{axes}: tokens must be a tuple, and all axes must be among the mesh's {mesh.axis_names}")
    if axes.vocab in axes.tokens or axes.embed not in (None, *axes.tokens):
        raise ValueError(f"{axes}: the axis `vocab` must not be one of `tokens`, and `embed` must be")
    size = lambda names: _product(mesh.shape[name] for name in names if name is not None)  # noqa: E731
    wanted = [
        ("rows of hidden", inputs.hidden.shape[0], axes.tokens),
        ("vocabulary entries", inputs.head.shape[options.vocab_axis], (axes.vocab,)),
        ("embedding dimensions", inputs.head.shape[1 - options.vocab_axis], (axes.embed,)),
    ]
    for what, length, names in wanted:
        if length % size(names):
            raise ValueError(f"{length} {what} are not divisible by {size(names)}, the size of the mesh axes {names}")


def _specs(options: Options) -> Inputs:
    axes = options.axes
    rows = PartitionSpec(axes.tokens)
    head = (axes.embed, axes.vocab) if options.vocab_axis else (axes.vocab, axes.embed)
    return Inputs(PartitionSpec(axes.tokens, None), PartitionSpec(*head), rows, rows, rows)


def _product(sizes) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
