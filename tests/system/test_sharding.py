"""Which process supplies which rows of a batch."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny
from echo_jax.config import ConfigError
from echo_jax.learner import learner as learner_lib
from echo_jax.system import sharding
from echo_jax.system.sharding import MESH_AXES, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """A stand-in for a device of another process, which a single process lacks."""

    id: int
    process_index: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """A stand-in for a mesh of such devices."""

    devices: np.ndarray

    @property
    def shape(self):
        return dict(zip(MESH_AXES, self.devices.shape, strict=True))

    @property
    def size(self):
        return self.devices.size


@pytest.fixture
def grid(monkeypatch):
    """Returns a function of mesh sizes and each device's process, in the order in which JAX lists the devices."""
    monkeypatch.setattr(sharding, "Mesh", lambda devices, axes, axis_types: Grid(devices))

    def make(data, fsdp, tensor, processes):
        return make_mesh(data, fsdp, tensor, [Device(i, p) for i, p in enumerate(processes)])

    return make


def test_devices_of_a_process_are_adjacent(grid):
    """As on a v5p, where ids run along rows of chips that several hosts share."""
    mesh = grid(1, 4, 2, [0, 0, 1, 1, 0, 0, 1, 1])
    assert [d.id for d in mesh.devices.flat] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert sharding.processes_of(mesh) == 2


def test_tensor_axis_across_processes_is_refused_with_both_numbers(grid):
    with pytest.raises(ValueError, match="mesh.tensor = 8 would span processes of 4 devices each"):
        sharding.processes_of(grid(1, 1, 8, [0] * 4 + [1] * 4))


def test_processes_with_unequal_shares_are_refused(grid):
    with pytest.raises(ValueError, match=r"uses \[4, 2\] data shards"):
        sharding.processes_of(grid(1, 6, 1, [0] * 4 + [1] * 4))


def test_every_process_must_be_in_the_mesh():
    built = learner_lib.build_learner(tiny.get_config(), 1280, jax.devices())
    others = [Device(i, i // 4) for i in range(8)]
    with pytest.raises(ConfigError, match="from only 1 of 2 processes"):
        learner_lib._check_processes(built, others)
