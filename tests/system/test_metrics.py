import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from echo_jax.system.metrics import MetricsError, MetricsWriter, read_metrics


def values(step: int) -> dict:
    return {"rollout/solve_rate": step / 7, "loss/total": jnp.float32(1 / (step + 1)), "pack/rows": np.int64(step)}


def write(workdir: Path, steps: range, resume_step: int) -> None:
    with MetricsWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, values(step))


def read_events(workdir: Path) -> list[Event]:
    """TensorBoard's records: length, its checksum, data, its checksum; file by file, in the order of writing."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_interrupted_and_resumed_file_equals_the_uninterrupted_one(tmp_path: Path):
    write(tmp_path / "straight", range(10), resume_step=0)
    write(tmp_path / "resumed", range(7), resume_step=0)
    with (tmp_path / "resumed" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"loss/total": 0.12')  # killed in the middle of a line
    write(tmp_path / "resumed", range(4, 6), resume_step=4)  # resumed from a checkpoint before, and killed again
    write(tmp_path / "resumed", range(4, 10), resume_step=4)
    straight, resumed = (tmp_path / name / "metrics.jsonl" for name in ("straight", "resumed"))
    assert resumed.read_bytes() == straight.read_bytes()
    assert [record["step"] for record in read_metrics(resumed)] == list(range(10))


def test_tensorboard_records_where_the_run_resumed(tmp_path: Path):
    write(tmp_path, range(3), resume_step=0)
    write(tmp_path, range(1, 3), resume_step=1)
    events = read_events(tmp_path)
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert starts == [0, 1]
    rows = [event.step for event in events for value in event.summary.value if value.tag == "pack/rows"]
    assert rows == [0, 1, 2, 1, 2]


def test_record_is_on_disk_when_write_returns(tmp_path: Path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write(5, {"loss/total": 1.5})
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"loss/total": 1.5, "step": 5}\n'
        assert read_events(tmp_path)[-1].summary.value[0].simple_value == 1.5


def test_keys_are_sorted_integers_stay_integers_and_floats_keep_every_bit(tmp_path: Path):
    given = {
        "z": 0.1 + 0.2,
        "b": np.int32(3),
        "a": jnp.int32(4),
        "f": np.float32(0.1),
        "h": jnp.bfloat16(1.5),
        "t": True,
    }
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write(0, given)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert list(record) == sorted(record)
    assert record == {"a": 4, "b": 3, "f": float(np.float32(0.1)), "h": 1.5, "step": 0, "t": 1, "z": 0.1 + 0.2}
    assert [type(record[name]) for name in "abtz"] == [int, int, int, float]


def test_non_finite_values_are_null_so_every_line_is_json(tmp_path: Path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write(0, {"nan": float("nan"), "inf": jnp.float32(-jnp.inf), "one": 1.0})

    def refuse(constant: str):
        raise AssertionError(constant)

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"inf": None, "nan": None, "one": 1.0, "step": 0}


def test_arrays_and_a_metric_named_step_are_refused(tmp_path: Path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        with pytest.raises(ValueError, match=r"loss/total is not a scalar: its shape is \(2,\)"):
            writer.write(0, {"loss/total": np.ones(2)})
        with pytest.raises(ValueError, match="'step'"):
            writer.write(0, {"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_only_the_last_line_may_be_incomplete(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 0}\n{"st')
    assert read_metrics(path) == [{"step": 0}]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2 is not a record"):
        read_metrics(path)


def test_killed_rewrite_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, range(5), resume_step=0)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(source: Path, target: Path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsWriter(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    MetricsWriter(tmp_path, resume_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before.splitlines(keepends=True)[:2])


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_full_disk_says_what_to_do(tmp_path: Path, name: str):
    writer = MetricsWriter(tmp_path, resume_step=0)
    for descriptor in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd") / descriptor
        if link.exists() and str(link.resolve()).startswith(str(tmp_path / name)):
            full = os.open("/dev/full", os.O_WRONLY)
            kept = os.dup(int(descriptor))
            os.dup2(full, int(descriptor))
            with pytest.raises(
                MetricsError, match=rf"{tmp_path}: No space left on device.* run the same command again"
            ):
                writer.write(0, {"loss/total": 1.0})
            os.dup2(kept, int(descriptor))
            os.close(full)
            os.close(kept)
            break
    else:
        pytest.fail(f"no open file {name}")
    writer.close()
