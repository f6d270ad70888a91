"""Each field under `loss` has its effect: the loss and its weights use the values of the config."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from synthetic import varied

from configs import maze, qwen3_8b, tiny
from echo_jax.config import ConfigError
from echo_jax.learner.learner import build_learner
from echo_jax.objective.advantages import ADVANTAGES, LengthPenalty, advantages_of
from echo_jax.objective.policy_losses import POLICY_LOSSES
from echo_jax.run import build as build_lib
from echo_jax.run.build import build
from echo_jax.run.validate import validate
from echo_jax.tasks import FAMILIES
from echo_jax.tasks.lookup import LookupFamily
from echo_jax.tools import bubblewrap, sandbox

BUILT = build(tiny.get_config()).learner


def with_fields(**fields):
    config = tiny.get_config()
    config.num_steps, config.loss.kl_weight = 100, 0.0
    config.update_from_flattened_dict({f"loss.{name}": value for name, value in fields.items()})
    validate(config)
    return dataclasses.replace(BUILT, config=config)


def keep_nothing(trajectory, mask):
    return np.zeros_like(mask)


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("mode", "env_only", "mode", "env_only"),
        ("observation_weight", 0.3, "observation_weight", 0.3),
        ("observation_normalizer", "token", "observation_normalizer", "token"),
        ("observation_constant", 7, "observation_constant", 7),
        ("policy_normalizer", "constant", "policy_normalizer", "constant"),
        ("policy_constant", 9, "policy_constant", 9),
        ("mask_overlong", True, "mask_overlong", True),
        ("policy", "dapo", "filter_zero_variance", True),
        ("policy", "dapo", "policy_normalizer", "token"),
        ("reward_adaptive", True, "reward_adaptive", True),
        ("kl_weight", 0.25, "kl_weight", 0.25),
        ("entropy_weight", 0.25, "entropy_weight", 0.25),
        ("filter_zero_variance", True, "filter_zero_variance", True),
        ("policy", "dppo", "every_action", True),
        ("observation_epsilon", 0.001, "observation_epsilon", 0.001),
        ("observation_temperature", "sampling", "observation_temperature", 0.8),
        ("tool_weights.bash", 0.5, "selection.tool_weights", {"bash": 0.5}),
        ("top_entropy", 0.75, "selection.top_entropy", 0.75),
        ("dedupe", True, "selection.dedupe", True),
        ("observation_filter", f"{__name__}:keep_nothing", "selection.keep.__name__", "keep_nothing"),
    ],
)
def test_a_field_reaches_the_objective(field, value, attribute, expected):
    found = with_fields(**{field: value}).objective(0)
    before = BUILT.objective(0)
    for part in attribute.split("."):
        found, before = getattr(found, part), getattr(before, part, None)
    assert found == expected != before


def test_a_filter_of_zero_variance_can_be_turned_off_where_the_paper_has_it():
    assert not with_fields(policy="dapo", filter_zero_variance=False).objective(0).filter_zero_variance


def test_class_weights_and_env_only_filters_reach_the_objective():
    objective = with_fields(**{"class_weights.warning": 0.5, "mode": "env_only", "min_valid_calls": 0.5}).objective(0)
    assert objective.selection.class_weights["warning"] == 0.5
    assert objective.min_valid_calls == 0.5
    assert with_fields(mode="env_only", clean_parse=True).objective(0).clean_parse
    assert BUILT.objective(0).temperature == tiny.get_config().rollout.temperature == 0.8


def test_schedule_and_modes_follow_the_step():
    built = with_fields(observation_weight=0.2, observation_schedule="linear", mode_changes=((30, "grpo"),))
    assert [built.objective(step).observation_weight for step in (0, 50, 100)] == [0.2, 0.1, 0.0]
    assert [built.objective(step).mode for step in (0, 29, 30)] == ["echo", "echo", "grpo"]
    sooner = with_fields(observation_weight=0.2, observation_schedule="linear", observation_schedule_steps=50)
    assert sooner.objective(25).observation_weight == 0.1
    ends = {"observation_schedule": "linear", "observation_schedule_end": 0.5}
    assert with_fields(observation_weight=0.2, **ends).objective(50).observation_weight == pytest.approx(0.15)
    points = {"observation_schedule": "piecewise", "observation_schedule_points": ((0, 1.0), (10, 0.0))}
    assert with_fields(observation_weight=0.2, **points).objective(5).observation_weight == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("fields", "attribute", "expected"),
    [
        ({"clip_low": 0.1, "clip_high": 0.4}, "policy_options", (("clip_high", 0.4), ("clip_low", 0.1))),
        ({"policy_options": {"dual_clip": 2.0}}, "policy_options", (("dual_clip", 2.0),)),
        ({"dual_clip": 3.0}, "policy_options", (("dual_clip", 3.0),)),
        ({"policy": "gspo"}, "policy", "gspo"),
        ({"old_logprobs": "recomputed"}, "importance_cap", 2.0),
        ({"old_logprobs": "recomputed", "importance_cap": 1.5}, "importance_cap", 1.5),
        ({"observation_clip": 0.2}, "observation_clip", 0.2),
        ({"kl_estimator": "k1"}, "kl_estimator", "k1"),
        ({"kl_weight": 0.1, "kl_clamp": 10.0}, "kl_clamp", 10.0),
        ({"old_logprobs": "recomputed", "importance_correction": "token_mask"}, "importance_correction", "token_mask"),
        ({"entropy_weight": 0.1}, "entropy_bonus", True),
        ({"token_block": 32, "vocab_block": 48, "score_all": False}, "head.score_all", False),
    ],
)
def test_a_field_reaches_the_loss(fields, attribute, expected):
    options = with_fields(**fields).loss_options()
    for part in attribute.split("."):
        options = getattr(options, part)
    assert options == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"advantage": "group", "advantage_options": {"ddof": 1}},
            dict(estimator=functools.partial(ADVANTAGES["group"], ddof=1)),
        ),
        ({"length_penalty.output": 0.5}, dict(penalty=LengthPenalty(0.5, 0.0, 0.0, max_tokens=64, max_turns=2))),
    ],
)
def test_a_field_reaches_the_advantages(fields, expected):
    found = with_fields(**fields).advantages(varied())
    np.testing.assert_array_equal(found, advantages_of(varied(), **expected))
    assert (found != BUILT.advantages(varied())).any()


def of_two_environments(**own):
    config = tiny.get_config()
    config.task.mixture = {"maze": 1.0, "lookup": 1.0, "shell": 0.0}
    config.loss.policy_normalizer = "sequence"
    config.environments.maze = own
    return config


def test_an_environment_has_an_objective_of_its_own_and_the_others_the_runs():
    config = of_two_environments(
        loss={
            "policy": "cispo",
            "policy_options": {"clip_high": 2.0},
            "mode": "env_only",
            "observation_weight": 0.3,
            "class_weights": {"warning": 0.5},
            "advantage": "group_mean",
            "kl_weight": 0.0,
            "min_valid_calls": 0.25,
        },
        rollout={"temperature": 0.7},
    )
    validate(config)
    learner = build_learner(config, 512, jax.devices()[:1])
    assert learner.policies == (("grpo", ()), ("cispo", (("clip_high", 2.0),)))
    assert learner.loss_options().other_policies == learner.policies[1:]
    run, own = learner.objective(0), learner.objective(0, "maze")
    assert learner.objective(0, "lookup") == run
    assert own == dataclasses.replace(
        run,
        policy=1,
        mode="env_only",
        observation_weight=0.3,
        temperature=0.7,
        kl_weight=0.0,
        min_valid_calls=0.25,
        selection=dataclasses.replace(
            run.selection, class_weights=dict(run.selection.class_weights) | {"warning": 0.5}
        ),
    )
    chosen = [dataclasses.replace(t, environment="maze" if t.group == 1 else "lookup") for t in varied()]
    mine = [i for i, t in enumerate(chosen) if t.environment == "maze"]
    others = [i for i, t in enumerate(chosen) if t.environment == "lookup"]
    advantages = learner.advantages(chosen)
    for members, estimator in ((mine, "group_mean"), (others, "group")):
        expected = advantages_of([chosen[i] for i in members], ADVANTAGES[estimator])
        np.testing.assert_array_equal(advantages[members], expected)
    weights = learner.weigh(chosen, 0)
    assert all((weights[i].policy == 1).all() and not weights[i].policy_weight.any() for i in mine)
    assert all((weights[i].policy == 0).all() for i in others)


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"loss": {"policy": "cispo", "token_block": 8}}, r"maze\.loss\.token_block = 8: an environment has"),
        ({"loss": {"observation_wieght": 0.1}}, r"maze\.loss\.observation_wieght = 0\.1: an environment has"),
        ({"loss": {"observation_weight": "much"}}, r"observation_weight = 'much': it must be like the default, 0\.05"),
        ({"loss": {"observation_weight": -0.1}}, r"config\.environments\.maze: .*must not be neg"),
        ({"loss": {"policy": "cispoo"}}, r"config\.environments\.maze: .*choose one of grpo"),
        ({"loss": {"mode": "grpo", "clean_parse": True}}, r"config\.environments\.maze: .*no effect in the mode grpo"),
        ({"loss": {"mode": "env_only", "kl_weight": 0.2}}, r"environments\.maze: .*kl_weight = 0\.2, parts of the"),
        ({"loss": {"filter_zero_variance": 0.5}}, r"filter_zero_variance = 0\.5: it must be a bool, or None"),
        ({"loss": {"clip_low": True}}, r"clip_low = True: it must be a float, or None"),
        ({"rollout": {"temperature": 0.0}}, r"environments\.maze: .*temperature = 0\.0: it must be above 0"),
    ],
)
def test_a_setting_of_an_environment_that_cannot_work_is_named(own, named):
    with pytest.raises(ConfigError, match=named):
        validate(of_two_environments(**own))


def test_parts_of_the_policy_term_that_only_an_environment_has_are_in_the_batch():
    config = of_two_environments(
        loss={"kl_weight": 0.2, "entropy_weight": 0.1, "length_penalty": {"output": 0.5}}, rollout={"temperature": 0.7}
    )
    config.loss.kl_weight, config.loss.observation_temperature = 0.0, "sampling"
    validate(config)
    learner = build_learner(config, 512, jax.devices()[:1])
    assert learner.has_kl
    assert learner.reference_bytes > 0
    assert learner.loss_options().entropy_bonus
    assert learner.objective(0, "maze").observation_temperature == 0.7
    assert learner.objective(0, "lookup").observation_temperature == 0.8
    penalized = learner.advantages([dataclasses.replace(t, environment="maze") for t in varied()])
    penalty = LengthPenalty(0.5, 0.0, 0.0, max_tokens=64, max_turns=2)
    np.testing.assert_array_equal(penalized, advantages_of(varied(), penalty=penalty))
    plain = learner.advantages([dataclasses.replace(t, environment="lookup") for t in varied()])
    np.testing.assert_array_equal(plain, advantages_of(varied()))
    assert (plain != penalized).any()


def test_the_readmes_example_of_an_environments_policy_loss_needs_no_other_field():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"environments\.maze\.loss\.policy=(\w+)` is enough .*while `(\w+)`", text, re.DOTALL)
    enough, needs_more = example.groups()
    config = of_two_environments(loss={"policy": enough})
    config.loss.policy_normalizer = "auto"
    validate(config)
    config.environments.maze.loss.policy = needs_more
    with pytest.raises(ConfigError, match=r"set config\.loss\.policy_normalizer"):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({"kl_weight": 0.1, "filter_zero_variance": True, "length_penalty.turns": 0.1}, {"mode": "env_only"}),
        ({"min_valid_calls": 0.5, "clean_parse": True}, {"mode": "grpo"}),
    ],
)
def test_what_the_run_sets_for_others_does_not_rule_out_a_mode_of_an_environment(fields, own):
    config = of_two_environments(loss=own)
    config.loss.update_from_flattened_dict(fields)
    validate(config)


def test_an_environment_with_another_loss_advantage_or_filter_has_not_the_options_of_the_runs():
    config = of_two_environments(
        loss={"policy": "ipo", "policy_options": {"threshold": 0.2}, "advantage": "group_mean", "dual_clip": 0.0}
    )
    config.loss.policy, config.loss.policy_options = "dppo", {"mask_low": 0.1}
    config.loss.advantage, config.loss.advantage_options = "batch", {"ddof": 1}
    validate(config)
    learner = build_learner(config, 512, jax.devices()[:1])
    assert learner.policies == (("dppo", (("mask_low", 0.1),)), ("ipo", (("threshold", 0.2),)))
    config.loss.policy, config.loss.policy_options, config.loss.clip_high = "grpo", {}, 0.28
    config.environments.maze.loss = {"policy": "gspo"}  # whose bounds are a thousand times closer
    validate(config)
    assert build_learner(config, 512, jax.devices()[:1]).policies == (("grpo", (("clip_high", 0.28),)), ("gspo", ()))
    config.environments.maze.loss = {"policy": "grpo", "clip_low": 0.1}  # the same: what it does not set is the run's
    own = build_learner(config, 512, jax.devices()[:1]).policies[1]
    assert own == ("grpo", (("clip_high", 0.28), ("clip_low", 0.1)))


def test_the_cross_entropy_has_the_sampling_temperature_if_any_environment_samples_at_another_than_1():
    config = of_two_environments(rollout={"temperature": 1.0})
    config.loss.observation_temperature = "sampling"
    for run, own in ((0.8, 1.0), (1.0, 0.8)):
        config.rollout.temperature, config.environments.maze.rollout.temperature = run, own
        validate(config)
    config.environments.maze.rollout.temperature = 1.0
    with pytest.raises(ConfigError, match="'sampling' has no effect"):
        validate(config)


def test_settings_of_no_environment_in_the_mixture_are_an_error():
    config = of_two_environments(loss={"observation_weight": 0.1})
    config.environments.shell = {"loss": {"observation_weight": 0.1}}
    with pytest.raises(ConfigError, match=r"environments\.shell is no entry of config\.task\.mixture"):
        validate(config)


def test_losses_of_environments_must_agree_on_the_policy_terms_normaliser():
    config = of_two_environments(loss={"policy": "cispo"})
    validate(config)
    config.loss.policy_normalizer = "auto"
    with pytest.raises(
        ConfigError, match=r"lookup has policy_normalizer sequence, maze has policy_normalizer token .*set config"
    ):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"loss.importance_correction": "token_mask"}, "importance_correction = 'token_mask' has no effect with old"),
        ({"loss.kl_clamp": 10.0}, "kl_clamp = 10.0 has no effect without a KL: set kl_weight"),
        ({"loss.mode": "env_only", "loss.entropy_weight": 0.1}, "entropy_weight = 0.1, parts of the policy term"),
        (
            {"loss.mode": "env_only", "loss.length_penalty.turns": 0.1},
            "length_penalty.turns = 0.1, parts of",
        ),
        ({"loss.mode": "env_only", "loss.filter_zero_variance": True}, "filter_zero_variance = True, parts of the"),
        ({"loss.mode": "grpo", "loss.clean_parse": True}, "no effect in the mode grpo.*set loss.mode to echo"),
        ({"loss.observation_schedule_end": 0.5}, "observation_schedule_end = 0.5, which the schedule 'constant'"),
        ({"loss.observation_schedule": "piecewise"}, "the schedule piecewise needs points"),
        ({"loss.observation_schedule_points": ((0, 1.0),)}, "no other uses them"),
        (
            {"loss.observation_schedule": "piecewise", "loss.observation_schedule_points": ((0, 1.0), (0, 0.5))},
            "every step once",
        ),
        (
            {
                "loss.observation_schedule": "piecewise",
                "loss.observation_schedule_points": ((0, 1.0),),
                "loss.observation_schedule_steps": 9,
            },
            "observation_schedule_steps = 9, which the schedule 'piecewise'",
        ),
        (
            {"loss.observation_normalizer": "token", "loss.observation_epsilon": 0.1},
            "observation_epsilon = 0.1 has no effect with observation_normalizer = 'token'",
        ),
        ({"loss.observation_temperature": "sampling"}, "'sampling' has no effect with rollout.temperature = 1"),
        ({"loss.observation_target_gain": 0.1}, "observation_target_gain = 0.1, but no observation_target_ratio"),
        ({"loss.observation_target_of": "terms"}, "observation_target_of = 'terms', but no observation_target_ratio"),
        ({"loss.mode": "grpo", "loss.observation_target_ratio": 0.1}, "ratio of two terms, but no step has both"),
        ({"loss.observation_weight": 0.0, "loss.observation_target_ratio": 0.1}, "where lambda starts, above 0"),
        ({"optimizer.mini_batches": 999}, "mini_batches = 999 is more than the 4 rollouts of a step"),
        ({"loss.advantage": "group", "loss.advantage_options": {"batch": 1}}, "has batch, but group_normalized takes"),
    ],
)
def test_a_field_of_the_objective_that_would_do_nothing_is_refused(fields, named):
    config = tiny.get_config()
    config.rollout.temperature, config.loss.kl_weight = 1.0, 0.0
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=named):
        validate(config)


def test_every_mini_batch_has_a_rollout_whichever_environment_has_the_smallest_groups():
    config = of_two_environments(rollout={"group_size": 1})
    config.optimizer.mini_batches = 2
    validate(config)
    config.optimizer.mini_batches = 3
    with pytest.raises(ConfigError, match="mini_batches = 3 is more than the 2 rollouts of a step"):
        validate(config)


@pytest.mark.parametrize("preset", ["", ":paper", ":released"])
def test_configs_with_a_preset_are_valid(preset):
    config = qwen3_8b.get_config(f"/weights{preset}")
    assert config.model.weights == "/weights"
    validate(config)
    chosen = (config.loss.clip_high, config.loss.observation_temperature, config.optimizer.b2)
    assert chosen == ((0.2, "sampling", 0.999) if preset == ":released" else (0.28, "1", 0.95))


def test_warm_start_does_not_depend_on_rl_settings():
    other = with_fields(
        observation_normalizer="token", observation_clip=0.2, policy="dapo", clip_low=0.1, dedupe=True, top_entropy=0.5
    )
    assert other.imitation_objective() == BUILT.imitation_objective()
    assert other.imitation_options() == BUILT.imitation_options()


@pytest.mark.parametrize("policy", sorted(set(POLICY_LOSSES) - {"imitation"}))
def test_policy_loss_sets_advantage_and_normaliser_by_default(policy):
    chosen, loss = varied(), POLICY_LOSSES[policy]
    built = with_fields(policy=policy)
    np.testing.assert_array_equal(built.advantages(chosen), advantages_of(chosen, ADVANTAGES[loss.advantage]))
    assert built.objective(0).policy_normalizer == loss.normalizer
    told = with_fields(policy=policy, advantage="reward", policy_normalizer="token")
    np.testing.assert_array_equal(told.advantages(chosen), advantages_of(chosen, ADVANTAGES["reward"]))
    assert told.objective(0).policy_normalizer == "token"


class NoSuchTool(LookupFamily):
    def make(self, split, index):
        return dataclasses.replace(super().make(split, index), tools=("bash", "browser"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task.mixture": {"shel": 1.0}}, "task.mixture = 'shel': choose one of lookup, rooms, shell, "),
        ({"task.mixture": {"shell": 1.0}, "task.shell.level": 9}, "task.shell.level = 9: choose 1 to 3"),
        ({"task.mixture": {"maze": 1.0}, "task.maze.width": 1}, "task.maze: 1 × 6 cells"),
        ({"task.mixture": {"shell": 1.0}}, "leaves of config.rollout.max_tokens = 64|no room in rollout.max_tokens"),
        ({"rollout.grammar": "xml"}, "choose one of plain, json"),
        ({"sandbox.disk_bytes": 1 << 40}, "disk_bytes"),
        ({"sandbox.backend": "docker"}, "auto, bubblewrap"),
        ({"rollout.max_seconds": 0.0}, "max_seconds = 0.0: it must be above 0"),
    ],
)
def test_impossible_task_tool_or_limit_is_named_before_any_episode(fields, named):
    config = tiny.get_config()
    for name, value in fields.items():
        if name == "task.mixture":
            config.task.mixture = value
        else:
            config.update_from_flattened_dict({name: value})
    with pytest.raises(ConfigError, match=named):
        build(config)


def test_task_with_an_unknown_tool_is_named(monkeypatch):
    monkeypatch.setitem(FAMILIES, "lookup", NoSuchTool)
    with pytest.raises(ConfigError, match=r"lookup/train/0 names unknown tools: browser; choose from bash, python"):
        build(tiny.get_config())


@pytest.mark.parametrize(("given", "threads"), [(0, 4), (3, 3)])
def test_every_open_rollout_has_a_tool_thread_unless_the_config_says_how_many(monkeypatch, given, threads):
    config = tiny.get_config()
    config.rollout.tool_threads, config.rollout.max_sandboxes = given, 7
    parts = build(config)
    monkeypatch.setattr(build_lib, "Collector", lambda *arguments: arguments)
    assert parts.make_collector()[3:] == (threads, 7)
    assert parts.learner.rollouts_at_once == 4


def test_tasks_that_run_no_subprocess_need_no_sandbox(monkeypatch):
    monkeypatch.setattr(bubblewrap, "candidates", lambda: [])
    sandbox._accepted.cache_clear()
    try:
        assert build(maze.get_config()).heldout_tasks[0].tools == ("go",)
        with pytest.raises(sandbox.SandboxUnavailable, match="configs/maze.py"):
            build(tiny.get_config())
    finally:
        sandbox._accepted.cache_clear()


def test_a_config_that_names_the_dense_engine_says_what_took_its_place():
    config = tiny.get_config()
    config.rollout.engine = "dense"
    with pytest.raises(ConfigError, match="the paged engine took its place, set 'paged'"):
        validate(config)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_engine_leaves_room_for_the_reference_of_the_kl(monkeypatch, weight):
    config = tiny.get_config()
    config.loss.kl_weight = weight
    parts, made = build(config), []
    monkeypatch.setattr(build_lib, "find_engine", lambda *_: lambda setup, **options: made.append(setup))
    with pytest.raises(ConfigError, match="lacks"):
        parts.make_engine()
    trained = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parts.learner.abstract_trained))
    assert made[0].reserved_bytes == (trained if weight else 0)
