"""Overrides of a config on the command line: entries of open sections, None, fractions."""

import keyword

import ml_collections
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from echo_jax.config import OPEN_SECTIONS, default_config, flat, may_add
from echo_jax.run.validate import validate
from echo_jax.system.overrides import define_config, literal, plain

METHODS = (*dir(ml_collections.ConfigDict), *keyword.kwlist)  # no entry of a section can have such a name


def overridden(*arguments: str, config: ml_collections.ConfigDict | None = None) -> ml_collections.ConfigDict:
    values, argv = flags.FlagValues(), ["program", *arguments]
    config = default_config() if config is None else config
    define_config(config, may_add, "", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("task.mixture.maze=1", 1),
        ("task.mixture.maze=0.5", 0.5),
        ("task.sums.family=sums:SumFamily", "sums:SumFamily"),
        ("loss.policy_options.beta=0.1", 0.1),
        ("loss.tool_weights.python=0", 0),
        ("loss.class_weights.feedback=1", 1.0),
        ("rollout.engine_options.admission=optimistic", "optimistic"),
        ("rollout.engine_options.rows=64", 64),
        ("tools.count=mine:Count", "mine:Count"),
        ("loss.observation_filter_options.flag=true", True),
        ("loss.advantage_options.none=None", None),
    ],
)
def test_an_entry_of_an_open_section_can_be_set_whether_it_exists_or_not(argument, value):
    config = overridden(f"--config.{argument}")
    assert flat(config)[argument.partition("=")[0]] == value
    changed = {name for name, one in flat(config).items() if flat(default_config()).get(name, config) != one}
    assert changed == {argument.partition("=")[0]}


@settings(deadline=None)
@given(
    st.sampled_from(OPEN_SECTIONS),
    st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True).filter(lambda name: name not in METHODS),
    st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()),
)
def test_any_entry_takes_any_value(section, name, value):
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict({section: {}})
    assert flat(overridden(f"--config.{section}.{name}={value}", config=config))[f"{section}.{name}"] == value


def test_a_section_of_several_levels_is_made():
    config = overridden("--config.tools.count.tool=mine:Count", "--config.tools.count.least=3")
    assert config.tools.count.to_dict() == {"tool": "mine:Count", "least": 3}


@pytest.mark.parametrize(
    ("field", "section"),
    [
        ("task.sums", {"family": "sums:SumFamily", "most": 9}),
        ("tools.count", {"tool": "mine:Count", "unit": "words"}),
        ("environments.lookup", {"loss": {"policy": "cispo"}}),
        ("environments.lookup.loss", {"clip_low": None}),
        ("rollout.engine_options.layout", {}),
    ],
)
@pytest.mark.parametrize("before", [None, "text"])
def test_an_entry_that_is_a_section_can_be_written_whole(field, section, before):
    config = default_config()
    if before is not None and field.startswith("tools"):
        config.tools = {"count": before}
    config = overridden(f"--config.{field}={section!r}", config=config)
    for name in field.split("."):
        config = config[name]
    assert isinstance(config, ml_collections.ConfigDict)
    assert config.to_dict() == section


@pytest.mark.parametrize("value", ["{[]: 1}", "{{}}", "(" * 300 + ")" * 300])
def test_a_value_that_no_literal_can_be_is_text(value):
    assert literal(value) == value


@pytest.mark.parametrize("field", ["loss.clip_low", "loss.clip_high"])
def test_a_field_that_may_be_none_can_be_set_to_it_and_to_a_number(field):
    config = default_config()
    config.update_from_flattened_dict({field: 0.3})
    assert flat(overridden(f"--config.{field}=None", config=config))[field] is None
    assert flat(overridden(f"--config.{field}=0.1"))[field] == 0.1
    assert type(flat(overridden(f"--config.{field}=1"))[field]) is float


def test_a_weight_that_a_config_file_wrote_as_an_integer_takes_a_fraction():
    config = default_config()
    config.task.mixture = {"maze": 1}
    assert overridden("--config.task.mixture.maze=0.5", config=config).task.mixture.maze == 0.5


@pytest.mark.parametrize(
    "argument", ["loss.clip_lo=0.1", "task.lookup.wrods=3", "num_stepz=3", "los.clip_low=None", "num_steps=None"]
)
def test_a_misspelt_field_or_a_wrong_type_is_still_refused(argument):
    with pytest.raises((AttributeError, KeyError, flags.Error)):
        overridden(f"--config.{argument}")


def test_an_entry_after_its_whole_section_is_refused_with_advice():
    with pytest.raises(ValueError, match="task.mixture replaces the whole section: write task.mixture.maze into it"):
        overridden("--config.task.mixture={'lookup': 1.0}", "--config.task.mixture.maze=1")


@pytest.mark.parametrize("argument", ["task.mixture.maze=many", "loss.tool_weights.bash=None", "task.mixture.maze=nan"])
def test_a_weight_that_is_no_number_is_named(argument):
    config = default_config()
    config.loss.tool_weights = {}
    with pytest.raises(ValueError, match=f"config.{argument.partition('=')[0]} = "):
        validate(overridden(f"--config.{argument}", config=config))


def test_overrides_are_recorded_as_given():
    values, argv = flags.FlagValues(), ["program", "--config.task.mixture.maze=1", "--config.loss.clip_low=None"]
    define_config(default_config(), may_add, "", flag_values=values, sys_argv=argv)
    values(argv)
    assert config_flags.get_override_values(values["config"]) == {"task.mixture.maze": 1, "loss.clip_low": None}
    assert plain(values.config.task.mixture) == {"lookup": 1.0, "maze": 1}
