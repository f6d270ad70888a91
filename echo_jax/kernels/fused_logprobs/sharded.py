"""The XLA implementation on a mesh: which shard holds what, for `jax.shard_map`.

Rows of hidden are spread over the data axes, the head's vocabulary over the tensor axis and its embedding over the fsdp
axis, which is one of the data axes too. Each shard sorts and skips its own rows. Forward and backward are mapped one by
one, with the derivative defined around both, so every collective of either is the one written in xla.py.
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
    """Raises ValueError where the axes are not the mesh's, or an array cannot be spread evenly over them; it names both
    numbers."""
    axes = options.axes
    named = [*axes.tokens, *(name for name in (axes.vocab, axes.embed) if name is not None)]
    if isinstance(axes.tokens, str) or not set(named) <= set(mesh.axis_names):
        raise ValueError(f"{axes}: tokens is a tuple, and all axes are of the mesh's {mesh.axis_names}")
    if axes.vocab in axes.tokens or axes.embed not in (None, *axes.tokens):
        raise ValueError(f"{axes}: the axis `vocab` may not be one of `tokens`, and `embed` must be")
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
