"""Published weights, from their files into sharded arrays.

In: a `Source`, a model's config, a mesh. Out: parameters on the mesh. A process reads only the slices that its devices
hold, one layer of one parameter at a time, so the host never holds more than the largest tensor.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echo_jax.models import lora
from echo_jax.models.families import TOP_NAMES, FamilyError, model_fields, published_shape, tensor_names
from echo_jax.models.sources import Slices, Source, WeightsError, open_source
from echo_jax.models.transformer import MATRICES, ModelConfig, abstract_params

SHOWN = 8  # problems listed in a message


def fields_of(path: str | Path) -> dict:
    """Returns the fields of `config.model` that published weights determine, for a config file to assign.

    Raises:
      WeightsError: there are no weights at `path`, or transformer.py does not support their model.
    """
    return _fields(open_source(Path(path)), Path(path))


def _fields(source: Source, path: Path) -> dict:
    try:
        return model_fields(source.config)
    except FamilyError as error:
        raise WeightsError(f"{path}: {error}") from error


def check_fields(source: Source, path: Path, model: ml_collections.ConfigDict) -> int:
    """Returns how many rows the embedding has; raises `WeightsError`, listing the fields, if `config.model` contradicts
    the weights."""
    fields = _fields(source, path)
    if fields["rope_scaling"]["kind"] == "none":
        del fields["rope_scaling"]  # the config may add one to a model without, as Qwen does for long contexts
    given = model.to_dict() | {"vocab_size": model.vocab_size or fields["vocab_size"]}
    differing = [
        f"config.model.{name} = {given[name]!r}, but the weights have {value!r}"
        for name, value in fields.items()
        if given[name] != value
    ]
    if differing:
        raise WeightsError(_listed(f"{path} holds a different model than config.model describes", differing))
    return fields["vocab_size"]


def check_tensors(source: Source, path: Path, config: ModelConfig) -> None:
    """Raises `WeightsError`, listing the tensors, if any are missing, unknown or have the wrong shape."""
    wanted = tensor_names(config)
    problems = []
    for name, (parameter, _) in wanted.items():
        shape = published_shape(config, parameter)
        if name not in source.tensors:
            problems.append(f"{name} is missing; it should have the shape {list(shape)}")
        elif (found := source.tensors[name]).shape != shape:
            problems.append(f"{found.file.name}: {name} has the shape {list(found.shape)}, not {list(shape)}")
    head, embedding = TOP_NAMES["lm_head"], TOP_NAMES["embedding"]
    for name, tensor in source.tensors.items():
        if name == head and config.tie_embeddings:
            if not _same(source, head, embedding):
                problems.append(
                    f"{tensor.file.name}: {head} differs from {embedding}, but config.json ties them: set "
                    '"tie_word_embeddings": false there'
                )
        elif name not in wanted and not name.endswith("rotary_emb.inv_freq"):
            problems.append(f"{tensor.file.name}: {name} is not a tensor of this model")
    if problems:
        raise WeightsError(_listed(f"{path} does not fit this model", problems))


def _same(source: Source, first: str, second: str) -> bool:
    """Returns whether two tensors are equal; reads a few rows at a time."""
    shape = source.tensors[first].shape
    if second not in source.tensors or source.tensors[second].shape != shape:
        return False
    with source.open(first) as a, source.open(second) as b:
        blocks = (slice(start, min(start + 4096, shape[0])) for start in range(0, shape[0], 4096))
        return all((a[block, :] == b[block, :]).all() for block in blocks)


def _listed(head: str, problems: list[str]) -> str:
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([f"{head}:", *problems[:SHOWN], *more])


def load_params(
    source: Source,
    config: ModelConfig,
    mesh: Mesh,
    on_tensor: Callable[[int], None] = lambda done: None,
) -> dict:
    """Returns the parameters, without adapters, of a source that passed `check_tensors`.

    Args:
      on_tensor: called with the number of tensors read so far.
    """
    abstract = lora.without(abstract_params(config, mesh)[1])
    names = tensor_names(config)
    layers: dict[str, jax.Array] = {}
    top: dict[str, jax.Array] = {}
    for done, (name, (parameter, index)) in enumerate(names.items(), start=1):
        if not index:
            leaf = abstract[parameter]
            top[parameter] = _cast(leaf)(_place(source, name, parameter, leaf.shape, leaf.sharding))
        else:
            leaf = abstract["layers"][parameter]
            if parameter not in layers:
                layers[parameter] = _zeros(leaf)
            one = NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[len(index) :]))
            value = _place(source, name, parameter, leaf.shape[len(index) :], one)
            layers[parameter] = _put(leaf.sharding)(layers[parameter], value, index)
        on_tensor(done)
    return top | {"layers": layers}


def _place(source: Source, name: str, parameter: str, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Returns one tensor as an array of `shape`; each slice is read once, however many devices hold it."""
    read: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in read:
            read[key] = _read(tensor, parameter, shape, index)
        return read[key]

    with source.open(name) as tensor:
        return jax.make_array_from_callback(shape, sharding, part)


def _read(tensor: Slices, parameter: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """Reads the slice `index` of a parameter from its published tensor. A published matrix is transposed: its input
    dimensions are flattened into one, and so are its output dimensions."""
    bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
    sizes = tuple(stop - start for start, stop in bounds)
    if parameter not in MATRICES:
        matrix = parameter in ("embedding", "lm_head")
        published = tuple(slice(*b) for b in bounds) if matrix else (_flat(bounds, shape),)
        return tensor[published].reshape(sizes)
    split = len(MATRICES[parameter][0])
    ins, outs = _flat(bounds[:split], shape[:split]), _flat(bounds[split:], shape[split:])
    return tensor[outs, ins].T.reshape(sizes)


def _flat(bounds: list[tuple[int, int]], shape: tuple[int, ...]) -> slice:
    """Returns the slice of several dimensions flattened into one; only the first of them is ever sharded."""
    inner = int(np.prod(shape[1:]))
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jax.numpy.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def _cast(leaf: jax.ShapeDtypeStruct):
    return jax.jit(lambda x: x.astype(leaf.dtype), out_shardings=leaf.sharding)


@functools.cache
def _put(sharding: NamedSharding):
    """Returns the jitted write of one matrix into a stack. It donates the stack, so that no second stack is made."""

    def put(stack, x, index):
        return stack.at[index].set(x.astype(stack.dtype))

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
