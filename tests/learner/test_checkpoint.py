import asyncio
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from echo_jax.learner import checkpoint
from echo_jax.learner.checkpoint import Checkpointer, CheckpointError, check_free_space


def make_mesh(data: int, tensor: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_state(seed: int = 0, mesh: jax.sharding.Mesh | None = None) -> dict:
    """Returns what a run saves: parameters, an optax state with its empty containers, a count, a typed key, odd
    dtypes."""
    normal = jax.random.normal
    params = {
        "embed": normal(jax.random.key(seed), (64, 16), jnp.bfloat16),
        "layers": [{"w": normal(jax.random.key(seed + 1), (8, 300)), "bias": jnp.zeros(8)}],
    }
    state = {
        "params": params,
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params),
        "key": jax.random.key(seed),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
        "mask": jnp.array([True, False]),
        "small": jnp.arange(-4, 4).astype(jnp.float8_e4m3fn),
        "empty": jnp.zeros((0, 3), jnp.int8),
    }
    return jax.device_put(state, shardings(state, mesh or make_mesh(4, 2)))


def shardings(state: dict, mesh: jax.sharding.Mesh) -> dict:
    def sharding(x: jax.Array) -> NamedSharding:
        fits = x.ndim == 2 and x.size and not x.shape[0] % 4
        return NamedSharding(mesh, PartitionSpec("data", None) if fits else PartitionSpec())

    return jax.tree.map(sharding, state)


def abstract(state: dict, mesh: jax.sharding.Mesh | None = None) -> dict:
    targets = shardings(state, mesh or make_mesh(4, 2))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, targets)


def bits(x: jax.Array) -> bytes:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def assert_same_bits(actual: dict, expected: dict) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert bits(a) == bits(b), path


def saved(directory: Path, *steps: int, keep: int = 2) -> dict:
    state = make_state()
    with Checkpointer(directory, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, state, {"step": step})
    return state


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (1, 1)])
def test_state_is_restored_bit_for_bit_on_any_mesh(tmp_path: Path, shape: tuple[int, int]):
    metadata = {"step": 7, "config": "d1ge5t", "policy_version": 3, "stream": {"next": [1, 2.5, None]}}
    state = make_state()
    mesh = make_mesh(*shape)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(7, state, metadata)
        restored, found = checkpointer.restore(abstract(state, mesh))
    assert_same_bits(restored, state)
    assert found == metadata
    equivalent = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, shardings(state, mesh))
    assert all(jax.tree.leaves(equivalent))


def test_state_donated_right_after_save_is_saved_as_it_was(tmp_path: Path):
    state = {"w": jnp.arange(4_000_000, dtype=jnp.float32)}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    expected = {"w": np.arange(4_000_000, dtype=np.float32)}
    step = jax.jit(lambda s: {"w": s["w"] * -1 - 1}, donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        for _ in range(5):
            state = step(state)
        restored, _ = checkpointer.restore(target)
    np.testing.assert_array_equal(restored["w"], expected["w"])


def test_newest_are_kept_and_any_of_them_can_be_restored(tmp_path: Path):
    state = saved(tmp_path, 10, 20, 30)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 30
        assert sorted(os.listdir(tmp_path)) == ["20", "30"]
        _, metadata = checkpointer.restore(abstract(state), step=20)
        assert metadata == {"step": 20}
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 10 .*its steps are: \[20, 30\]"):
            checkpointer.restore(abstract(state), step=10)


def test_reading_does_not_change_the_disk(tmp_path: Path):
    half_written = tmp_path / "30.orbax-checkpoint-tmp"
    half_written.mkdir()
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(CheckpointError, match="its steps are: none"):
            checkpointer.restore({})
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
    assert sorted(tmp_path.iterdir()) == [half_written]


def test_saving_an_old_step_is_refused(tmp_path: Path):
    state = saved(tmp_path, 20, 40)
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match=r"delete .*/40 to resume from step 20"),
    ):
        checkpointer.save(30, state, {})


DAMAGES = {
    "largest file missing": lambda folder: largest(folder).unlink(),
    "largest file cut": lambda folder: os.truncate(largest(folder), largest(folder).stat().st_size // 2),
    "largest file overwritten": lambda folder: largest(folder).write_bytes(b"\xa5" * largest(folder).stat().st_size),
    "one bit flipped": lambda folder: flip_bit(largest(folder)),
    "manifest emptied": lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b""),
    "tree description missing": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "tree description overwritten": lambda folder: (folder / "state" / "_METADATA").write_text("not JSON"),
    "metadata missing": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "metadata cut": lambda folder: os.truncate(folder / "_CHECKPOINT_METADATA", 100),
    "arrays missing": lambda folder: shutil.rmtree(folder / "state"),
}
COMMON_DAMAGES = ("largest file cut", "one bit flipped", "manifest emptied", "metadata missing")


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    saved(directory, 20, 40)
    return directory


# When one read of orbax fails, its abandoned reads report a closed event loop; let them do so within this test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [pytest.param(damage, marks=[] if damage in COMMON_DAMAGES else pytest.mark.variant) for damage in DAMAGES],
)
def test_damage_is_reported_with_the_folder_and_the_remedy(tmp_path: Path, two_checkpoints: Path, damage: str):
    directory = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    DAMAGES[damage](directory / "40")
    state = make_state()
    with Checkpointer(directory) as checkpointer:
        with pytest.raises(CheckpointError) as error:
            checkpointer.restore(abstract(state))
        gc.collect()
        time.sleep(0.05)
        assert f"{directory}/40 is damaged" in str(error.value)
        assert f"delete {directory}/40 to resume from step 20" in str(error.value)
        shutil.rmtree(directory / "40")
        restored, _ = checkpointer.restore(abstract(state))
    assert_same_bits(restored, state)


def test_another_shape_dtype_or_tree_is_named_and_not_cast(tmp_path: Path, two_checkpoints: Path):
    def complaint(change) -> str:
        target = abstract(make_state())
        change(target)
        with Checkpointer(two_checkpoints) as checkpointer, pytest.raises(CheckpointError) as error:
            checkpointer.restore(target)
        assert f"{two_checkpoints}/40" in str(error.value)
        assert "to resume from step 20" in str(error.value)
        return str(error.value)

    def leaf(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(make_mesh(4, 2), PartitionSpec()))

    assert "params/embed: bfloat16[64, 16] in the checkpoint, float32[64, 16] in this run" in complaint(
        lambda state: state["params"].update(embed=leaf(64, 16))
    )
    assert "params/layers/0/w: float32[8, 300] in the checkpoint, float32[8, 301] in this run" in complaint(
        lambda state: state["params"]["layers"][0].update(w=leaf(8, 301))
    )
    assert "params/layers/0/bias: only in the checkpoint, float32[8]" in complaint(
        lambda state: state["params"]["layers"][0].pop("bias")
    )
    assert "params/head: not in the checkpoint, this run has float32[2]" in complaint(
        lambda state: state["params"].update(head=leaf(2))
    )


def test_fingerprint_depends_on_every_bit_and_position_but_not_on_sharding():
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    whole = int(checkpoint._fingerprint(jnp.asarray(x)))
    sharded = jax.device_put(x, NamedSharding(make_mesh(4, 2), PartitionSpec("data", "tensor")))
    assert int(checkpoint._fingerprint(sharded)) == whole
    changed = [x.T.reshape(x.shape), x[::-1], np.where(np.indices(x.shape)[0] < 2, -x, x)]
    for place, bit in ((0, 0), (7, 31), (383, 12)):
        flipped = x.copy()
        flipped.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
        changed.append(flipped)
    assert len({whole, *(int(checkpoint._fingerprint(jnp.asarray(y))) for y in changed)}) == 1 + len(changed)


def test_failed_save_is_raised_by_the_next_call_and_later_saves_work(tmp_path: Path):
    state = {"w": jax.random.normal(jax.random.key(0), (200_000,))}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(30, state, {})
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        try:
            checkpointer.save(40, state, {})
            with pytest.raises(CheckpointError, match=r"step 40 could not .*File too large.*resumes from step 30"):
                checkpointer.save(50, state, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        checkpointer.save(50, state, {})
        checkpointer.wait()
        assert sorted(os.listdir(tmp_path)) == ["30", "50"]


def test_abandoned_writes_of_orbax_print_no_traceback(monkeypatch: pytest.MonkeyPatch):
    """A write that ends after another failed reports to an event loop that orbax has closed."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(str(unraisable.exc_value)))
    checkpoint._quiet_orbax.cache_clear()
    try:
        checkpoint._quiet_orbax()
        promise, write = tensorstore.Promise.new()

        async def late():
            await write

        async def failing():
            await asyncio.sleep(0)
            raise OSError("no space left")

        async def both():
            await asyncio.gather(late(), failing())

        loop = asyncio.new_event_loop()
        with pytest.raises(OSError, match="no space left"):
            loop.run_until_complete(both())
        loop.close()
        ended = threading.Thread(target=promise.set_result, args=(None,))
        ended.start()
        ended.join()
        assert printed == []

        class Unraisable:
            def __del__(self):
                raise RuntimeError("another")

        Unraisable()
        assert printed == ["another"]
    finally:
        checkpoint._quiet_orbax.cache_clear()  # its effect ends with the patch


CHILD = """
    import sys, time
    from pathlib import Path
    import numpy as np, jax.numpy as jnp
    from echo_jax.learner.checkpoint import Checkpointer, CheckpointError
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=%d).astype(np.float32))}
    checkpointer = Checkpointer(Path(sys.argv[1]))
    checkpointer.save(1, state, {})
    checkpointer.wait()
"""


def child(code: str, size: int) -> list[str]:
    strict = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache entry"]  # as all tests are
    return [sys.executable, *strict, "-c", textwrap.dedent(CHILD) % size + textwrap.dedent(code)]


def test_killed_save_is_never_the_latest_and_is_cleaned_up(tmp_path: Path):
    code = """
        checkpointer.save(2, state, {})
        print("saving", flush=True)
        time.sleep(60)
    """
    size = 8_000_000
    with subprocess.Popen([*child(code, size), str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"saving\n"
        process.send_signal(signal.SIGKILL)
    assert any(name.startswith("2.") for name in os.listdir(tmp_path)), "the kill came too late to interrupt the save"
    w = jnp.asarray(np.random.default_rng(0).normal(size=size).astype(np.float32))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored, _ = checkpointer.restore({"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)})
        np.testing.assert_array_equal(restored["w"], w)
        checkpointer.save(2, {"w": jnp.ones(3)}, {})
        checkpointer.wait()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_full_disk_says_what_to_free_and_where_the_run_resumes(tmp_path: Path):
    """On a separate disk of 16 MiB, in a mount namespace; only this message may appear."""
    code = """
        try:
            for step in range(2, 9):
                checkpointer.save(step, state, {})
                checkpointer.wait()
        except CheckpointError as error:
            print(error)
    """
    script = 'mount -t tmpfs -o size=16m tmpfs "$1" && shift && exec "$@"'
    isolated = ["unshare", "-rm", "sh", "-c", script, "-", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("needs an unprivileged mount namespace")
    command = [*isolated, *child(code, 1_800_000)]  # 6 MiB each: two fit, a third does not
    result = subprocess.run([*command, str(tmp_path / "checkpoints")], capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    assert result.stdout.startswith(
        f"no space left on the disk of {tmp_path}/checkpoints for the checkpoint of step 3: free 7 MiB"
    )
    assert result.stdout.endswith("then run the same command again: it resumes from step 2\n")


def test_lack_of_free_space_is_found_before_the_work_starts(tmp_path: Path):
    directory = tmp_path / "not" / "yet" / "there"
    free = shutil.disk_usage(tmp_path).free
    check_free_space(directory, free // 8, keep=2)
    with pytest.raises(CheckpointError, match=rf"need .* \({free * 3} bytes: 2 kept .* bytes\) are free"):
        check_free_space(directory, free, keep=2)
    saved(tmp_path, 1, 2)
    check_free_space(tmp_path, free // 2, keep=2)  # the two existing checkpoints need no more space


def test_orbax_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture):
    with caplog.at_level("DEBUG"):
        state = saved(tmp_path, 1)
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.restore(abstract(state))
    assert [record.getMessage() for record in caplog.records if "/orbax/" in record.pathname] == []
    assert capfd.readouterr().err == ""
