"""What may change when a run goes on is one table, and a workdir gives back the config that it was made with."""

import json
import shutil
from pathlib import Path

import pytest

from configs import quickstart, tiny
from echo_jax.config import ConfigError, default_config, flat
from echo_jax.run import workdir as workdir_lib
from echo_jax.run.revisions import settle_revisions
from echo_jax.run.workdir import (
    MAY_CHANGE,
    check_workdir,
    claim_workdir,
    differences,
    may_change,
    record_config,
    recorded_config,
    starting_point,
)
from echo_jax.tasks import FAMILIES
from echo_jax.tasks.stream import make_families

WORKDIRS = Path(__file__).parents[1] / "fixtures" / "workdirs"


def another(value):
    """Returns another value of the same type."""
    if isinstance(value, bool):
        return not value
    if value is None:  # a number that may be left out
        return 0.5
    change = {int: lambda x: x + 1, float: lambda x: x + 0.5, str: lambda x: x + "x", tuple: lambda x: (*x, 1)}
    return change[type(value)](value)


@pytest.mark.parametrize("name", flat(default_config()))
def test_every_field_either_may_change_or_is_refused_with_both_values(name, tmp_path):
    config = default_config()
    claim_workdir(config, tmp_path)
    before = flat(config)[name]
    changed = True if name == "loss.filter_zero_variance" else another(before)
    config.update_from_flattened_dict({name: changed})
    before, after = (json.loads(json.dumps(value)) for value in (before, changed))
    if may_change(name):
        claim_workdir(config, tmp_path)
        record_config(config, tmp_path)
        assert flat(recorded_config(tmp_path)) == flat(config)
        return
    with pytest.raises(ConfigError) as error:
        claim_workdir(config, tmp_path)
    assert f"  {name}: the run has {before!r}, this config {after!r}\n" in str(error.value)
    assert "or another --workdir for a new run" in str(error.value)
    assert flat(recorded_config(tmp_path)) == flat(default_config())


def test_the_table_names_only_fields_that_exist():
    fields = flat(default_config())
    for key in MAY_CHANGE:
        assert any(name.startswith(key) if key.endswith(".") else name == key for name in fields), key


@pytest.mark.parametrize(
    ("field", "schedule"),
    [
        ("loss.observation_schedule", "linear"),
        ("loss.observation_schedule", "cosine"),
        ("optimizer.schedule", "cosine"),
    ],
)
def test_a_run_whose_schedule_depends_on_its_length_is_not_extended(field, schedule, tmp_path):
    config = default_config()
    config.update_from_flattened_dict({field: schedule})
    claim_workdir(config, tmp_path)
    config.num_steps = 150
    with pytest.raises(ConfigError, match=rf"num_steps: the run has 100, this config 150\nIts {field} = '{schedule}'"):
        claim_workdir(config, tmp_path)
    config.update_from_flattened_dict({"num_steps": 100, f"{field}_steps": 50})
    shutil.rmtree(tmp_path)
    claim_workdir(config, tmp_path)
    config.num_steps = 150
    claim_workdir(config, tmp_path)


def test_a_workdir_gives_back_the_config_of_its_run(tmp_path):
    config = quickstart.get_config()
    config.task.mine = {"family": "mine:Family", "size": 3, "names": ("a", "b")}
    config.task.mixture = {"mine": 1.0}
    config.tools = {"count": {"tool": "mine:Count", "limit": 2}}
    config.loss.class_weights = {"body": 1.0}
    config.loss.mode_changes = ((2, "grpo"), (5, "echo"))
    claim_workdir(config, tmp_path)
    found = recorded_config(tmp_path)
    assert flat(found) == flat(config)
    assert not differences(found, tmp_path)
    with pytest.raises(AttributeError):
        found.loss.nothing = 1


def test_an_older_workdir_gives_back_its_config_with_defaults_for_later_fields():
    first = {f"task.{name}.revision": 1 for name in FAMILIES}
    expected = flat(tiny.get_config()) | first
    for name in ("user", "system"):  # not fields but entries: a class that the run did not name weighs 0
        assert expected.pop(f"loss.class_weights.{name}") == 0.0
    assert flat(recorded_config(WORKDIRS / "tiny")) == expected


def test_a_run_from_before_revisions_keeps_the_first_and_a_new_one_has_the_newest(tmp_path):
    """Also an entry that names a built-in family without a revision."""
    old, new = tiny.get_config(), tiny.get_config()
    for config in (old, new):
        config.task.deep = {"family": "shell", "level": 3}
        config.task.mixture = {"lookup": 1.0, "deep": 1.0}
    claim_workdir(old, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    fields = {name: value for name, value in json.loads(path.read_text()).items() if not name.endswith(".revision")}
    path.write_text(json.dumps(fields))
    for config, workdir, revision in ((old, tmp_path / "old", 1), (new, tmp_path / "new", 2)):
        settle_revisions(config, workdir)
        assert {section.revision for name, section in config.task.items() if name != "mixture"} == {revision}
        claim_workdir(config, workdir)
        record_config(config, workdir)
        assert flat(recorded_config(workdir)) == flat(config)
        again = tiny.get_config()
        again.task.deep, again.task.mixture = {"family": "shell", "level": 3}, config.task.mixture
        settle_revisions(again, workdir)
        assert flat(again) == flat(config)


def test_another_revision_than_the_runs_is_refused(tmp_path):
    config = tiny.get_config()
    settle_revisions(config, tmp_path)
    claim_workdir(config, tmp_path)
    config.task.lookup.revision = 1
    settle_revisions(config, tmp_path)
    with pytest.raises(ConfigError, match=r"task.lookup.revision: the run has 2, this config 1"):
        claim_workdir(config, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("revision", [3, 99])
def test_an_unknown_revision_is_refused(family, revision):
    section = {**default_config().task[family], "revision": revision}
    with pytest.raises(ConfigError, match=f"task.{family}.revision = {revision}: choose 1 to 2, or 0 for the newest"):
        make_families({family: 1.0}, {family: section})


def test_a_run_of_the_engine_that_is_gone_goes_on_with_the_one_in_its_place(tmp_path):
    config = tiny.get_config()
    claim_workdir(config, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"rollout.engine": "dense"}))
    check_workdir(config, tmp_path)
    assert recorded_config(tmp_path).rollout.engine == config.rollout.engine == "paged"


def test_a_field_of_a_later_version_is_named(tmp_path):
    claim_workdir(default_config(), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"rollout.patience": 7}))
    with pytest.raises(ConfigError, match=r"has the field rollout\.patience, which this version"):
        recorded_config(tmp_path)


def test_evaluation_may_change_anything_but_what_the_parameters_are(tmp_path):
    config = default_config()
    claim_workdir(config, tmp_path)
    config.rollout.temperature = 0.3
    config.task.mixture = {"maze": 1.0}
    check_workdir(config, tmp_path, only_parameters=True)
    assert differences(config, tmp_path).keys() == {"rollout.temperature", "task.mixture.lookup", "task.mixture.maze"}
    config.model.num_layers = 5
    with pytest.raises(ConfigError, match=r"model.num_layers: the run has 3, this config 5\nRemove these overrides"):
        check_workdir(config, tmp_path, only_parameters=True)


def test_no_task_of_a_refill_is_used_twice_by_a_run_that_starts_from_another(tmp_path, monkeypatch):
    config = default_config()
    config.rollout.refill_tries = 1
    claim_workdir(config, tmp_path)
    monkeypatch.setattr(workdir_lib, "_saved_steps", lambda workdir: {200, 210})
    for step, tries, refused in ((210, 2, True), (210, 1, False), (210, 0, False), (200, 2, False)):
        config.init_from, config.rollout.refill_tries = f"{tmp_path}:{step}", tries
        if refused:
            with pytest.raises(ConfigError, match="steps with rollout.refill_tries = 1, this config has 2, so tasks"):
                starting_point(config)
        else:
            assert starting_point(config) == (tmp_path, step)
