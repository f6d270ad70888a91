"""Config files only assign; a workdir belongs to one config."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_jax.config import ConfigError, default_config, flat, of_environment
from echo_jax.run.ranges import FLOAT32
from echo_jax.run.validate import check_tools, validate
from echo_jax.run.workdir import MAY_CHANGE, PLACEMENT, claim_workdir, recorded_config
from echo_jax.system import named
from echo_jax.tools import TOOLS

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_says_how_to_run_it(path):
    module = load(path)
    validate(module.get_config())
    programs = ["sweep"] if hasattr(module, "sweep") else ["train", "compile"]
    place = path.relative_to(path.parents[len(path.parts) - 1 - path.parts.index("configs")])
    assert any(f"python -m echo_jax.{program} --config={place}" in module.__doc__ for program in programs)


@pytest.mark.parametrize(
    ("name", "base", "varied"),
    [
        ("observation_weight", "rooms", "loss.observation_weight"),
        ("learning_rate", "quickstart", "optimizer.learning_rate"),
    ],
)
def test_an_ablation_differs_from_its_base_in_one_declared_place(name, base, varied):
    by_stem = {path.stem: path for path in CONFIGS}
    ablation = load(by_stem[name])
    assert flat(ablation.get_config()) == flat(load(by_stem[base]).get_config())
    runs = list(ablation.sweep())
    assert all(set(run) == {varied, "seed"} for run in runs)
    assert len({tuple(run.items()) for run in runs}) == len(runs)


def test_released_default_does_not_change():
    """A run from before a field existed resumes with its default, so a default must not change, unless it only decides
    where a run is computed."""
    released = json.loads((Path(__file__).parent / "fixtures" / "released_defaults.json").read_text())
    today = json.loads(json.dumps(flat(default_config())))
    assert MAY_CHANGE["rollout.tool_threads"] == PLACEMENT
    assert {name: today.get(name) for name in released} == released | {"rollout.tool_threads": 0}


def test_a_workdir_from_before_a_field_existed_is_the_same_run(tmp_path):
    config = default_config()
    claim_workdir(config, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    del record["rollout.engine"], record["loss.kl_weight"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    claim_workdir(config, tmp_path)
    config.loss.kl_weight = 0.5
    with pytest.raises(ConfigError, match=r"loss.kl_weight: the run has 0.0, this config 0.5"):
        claim_workdir(config, tmp_path)


def test_entry_missing_from_a_recorded_mixture_is_not_filled_in(tmp_path):
    config = default_config()
    config.task.mixture = {"maze": 1.0}
    claim_workdir(config, tmp_path)
    claim_workdir(config, tmp_path)
    config.task.mixture = {"maze": 1.0, "lookup": 1.0}
    with pytest.raises(ConfigError, match=r"task.mixture.lookup: the run has '\(no such field\)', this config 1.0"):
        claim_workdir(config, tmp_path)


def test_section_for_a_mixture_entry_needs_no_unlocking():
    config = default_config()
    config.task.sums = {"family": "somewhere:SumFamily", "numbers": 0}
    config.task.mixture = {"sums": 1.0}
    validate(config)
    with pytest.raises(AttributeError, match="wrods"):
        config.task.lookup.wrods = 3


def test_unknown_field_cannot_be_set():
    with pytest.raises((AttributeError, KeyError), match="observation_weight"):
        default_config().loss.observation_wieght = 1.0


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("num_steps", -1, "num_steps = -1"),
        ("model.num_layers", 0, "num_layers = 0"),
        ("model.head_dim", 33, "head_dim = 33"),
        ("model.num_kv_heads", 3, "num_kv_heads = 3"),
        ("model.compute_dtype", "float16", "bfloat16"),
        ("optimizer.learning_rate", -1.0, "learning_rate = -1.0"),
        ("loss.mode", "echoo", "grpo, echo, env_only"),
        ("loss.mode", "sft", "grpo, echo, env_only"),
        ("loss.mode_changes", ((0, "ehco"),), r"\(0, 'ehco'\).*grpo, echo, env_only"),
        ("loss.mode_changes", ("echo",), "'echo'"),
        ("loss.policy", "ppo", "grpo, dr_grpo, dapo, gspo, cispo, dppo, ipo, sapo, rloo, reinforce"),
        ("loss.policy", "imitation", "warm start; choose another"),
        ("loss.policy", "no.such:loss", "'no.such:loss': No module named 'no'"),
        ("loss.policy", "math:pi", "'math:pi' is a float; it must be a function"),
        ("loss.policy_options", {"beta": 1.0}, "policy_options has beta, but clipped_ratio takes clip_low, clip_high"),
        ("loss.advantage", "math:no", "has no attribute 'no'"),
        ("loss.advantage_options", {"beta": 1.0}, "advantage_options = .*set config.loss.advantage"),
        ("rollout.tool_threads", -1, "tool_threads = -1"),
        ("rollout.max_sandboxes", -1, "max_sandboxes = -1"),
        ("rollout.engine", "vllm", "'vllm': choose one of paged, or write your own"),
        ("rollout.engine_options", {"lanes": 3}, "engine_options has lanes, but PagedEngine takes rows, page"),
        ("loss.advantage", "median", "group, group_mean, batch, mean, leave_one_out, reward"),
        ("loss.policy_normalizer", "mean", "auto, sequence, token, constant"),
        ("loss.observation_normalizer", "mean", "observation, selected, token, constant"),
        ("loss.observation_schedule", "sine", "constant, linear, cosine, step, warmup, piecewise"),
        ("loss.old_logprobs", "both", "sampler, recomputed"),
        ("loss.kl_estimator", "k4", "k1, k2, k3"),
        ("loss.dual_clip", 0.5, "dual_clip = 0.5"),
        ("loss.top_entropy", 0.0, "top_entropy = 0.0"),
        ("loss.observation_clip", 1.5, "observation_clip = 1.5"),
        ("loss.class_weights.body", -1.0, "class_weights.body = -1.0"),
        ("loss.class_weights.body", float("nan"), "class_weights.body = nan"),
        ("loss.observation_weight", float("inf"), "observation_weight = inf"),
        ("loss.mode_changes", ((-1, "echo"),), r"\(-1, 'echo'\).*from 0 to 99"),
        ("loss.mode_changes", ((100, "echo"),), r"\(100, 'echo'\).*from 0 to 99"),
        ("loss.observation_filter", "no.such:filter", "'no.such:filter': No module.*module:function"),
        ("loss.observation_filter", "math:pi", "'math:pi' is a float"),
        ("pack.rows", -1, "pack.rows = -1"),
        ("optimizer.clip_norm", 0.0, "clip_norm = 0.0"),
        ("optimizer.b2", 1.0, "b2 = 1.0"),
        ("optimizer.name", "adam", "adamw, sgd, muon"),
        ("optimizer.schedule", "step", "constant, linear, cosine"),
        ("optimizer.end_share", 1.0, "end_share = 1.0"),
        ("optimizer.momentum", -0.5, "momentum = -0.5"),
        ("optimizer.warmup_steps", 2**31, "warmup_steps = 2147483648: it must be at most 2147483647"),
        ("lora.targets", ("query", ["key"]), r"lora.targets = \('query', \['key'\]\): choose some of query, key"),
        ("warm_start.demonstrations", 3, "demonstrations = 3"),
        ("rollout.temperature", 1e-40, "rollout.temperature = 1e-40: it must be at least 1e-06"),
        ("rollout.temperature", 1e39, r"rollout.temperature = 1e\+39: float32"),
        ("seed", 2**63, "seed = 9223372036854775808: it must be at most 9223372036854775807"),
        ("seed", -1, "seed = -1"),
        ("pack.length", 2**31, "pack.length = 2147483648: it must be at most 2147483647"),
        ("sandbox.memory_bytes", 10**30, "memory_bytes = 10{30}: it must be at most"),
        ("optimizer.b2", 1 - 1e-12, "b2 = 0.999999999999: it must be below 1 as a float32 too"),
        ("optimizer.clip_norm", 1e-46, "clip_norm = 1e-46: float32"),
        ("sandbox.timeout_seconds", 1e300, r"timeout_seconds = 1e\+300: it must be at most 2e\+06 seconds"),
        ("task.mixture.lookup", float("nan"), "task.mixture.lookup = nan: it must be finite"),
    ],
)
def test_a_bad_value_is_named(field, value, named):
    config = default_config()
    if isinstance(value, dict):
        section, name = field.split(".")
        config[section][name] = value
    else:
        config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=named):
        validate(config)


NUMBERS = {
    name: value for name, value in flat(default_config()).items() if type(value) in (int, float) and "task." not in name
}


@settings(deadline=None)
@given(
    st.sampled_from(sorted(NUMBERS)),
    st.one_of(st.integers(2**63, 10**40), st.integers(-(10**40), -1)),
    st.one_of(st.floats(3.5e38, 1e308), st.floats(1e-320, 1e-39)),
)
def test_a_number_beyond_the_range_of_what_computes_with_it_is_named(name, integer, number):
    is_float = isinstance(NUMBERS[name], float)
    if is_float and not name.startswith(FLOAT32):
        return
    config = default_config()
    config.update_from_flattened_dict({name: number if is_float else integer})
    with pytest.raises(ConfigError, match=re.escape(name)):
        validate(config)


@pytest.mark.parametrize(
    ("section", "value"),
    [("tool_weights", {}), ("class_weights", {"body": 1.0}), ("tool_weights", {"python": 0.0})],
)
def test_a_workdir_takes_its_config_whatever_its_open_sections_hold(tmp_path, section, value):
    config = default_config()
    config.loss[section] = value
    claim_workdir(config, tmp_path)
    claim_workdir(config, tmp_path)
    assert flat(config) != flat(default_config())


def test_a_workdir_from_before_a_token_class_existed_is_the_same_run(tmp_path):
    config = default_config()
    claim_workdir(config, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    del record["loss.class_weights.warning"], record["loss.tool_weights.bash"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    claim_workdir(config, tmp_path)
    config.loss.class_weights.warning = 0.5
    with pytest.raises(ConfigError, match=r"class_weights.warning: the run has 0.0, this config 0.5"):
        claim_workdir(config, tmp_path)


def test_a_run_may_be_evaluated_on_other_transcripts(tmp_path):
    config = default_config()
    claim_workdir(config, tmp_path)
    config.eval.trajectories = "later.jsonl.gz"
    claim_workdir(config, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mixtur", {"maze": 1.0}, "config.task.mixtur is no entry of config.task.mixture"),
        ("lokup", 3, "config.task.lokup is not a section"),
    ],
)
def test_a_misspelt_section_of_tasks_is_named(name, value, message):
    config = default_config()
    config.task[name] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("tools", {"count": 3}, "config.tools.count = 3: write"),
        ("loss.policy_options", {"dual_clip": 0.5}, "dual_clip = 0.5: it must be above 1"),
        ("loss.policy_options", {"clip_low": "a"}, "clip_low = 'a': it must be a number"),
        ("loss.observation_filter_options", {"least": 1}, "has no effect without"),
        ("rollout.engine_options", {"steps_per_call": print}, "engine_options.steps_per_call.*cannot be recorded"),
    ],
)
def test_an_entry_that_cannot_work_is_named(section, value, message):
    config = default_config()
    *parents, last = section.split(".")
    parent = config[parents[0]] if parents else config
    parent[last] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_an_option_of_a_users_function_may_have_any_value(tmp_path):
    (tmp_path / "bounds_of_mine.py").write_text("def loss(tokens, *, bound=1.0): ...")
    named.add_to_path(tmp_path / "config.py")
    config = default_config()
    config.loss.policy, config.loss.policy_options = "bounds_of_mine:loss", {"bound": float("inf")}
    validate(config)


@pytest.mark.parametrize(
    ("entry", "own", "named"),
    [
        ("maize", {"rollout": {"temperature": 0.5}}, "config.environments.maize is no entry of config.task.mixture"),
        ("maze", 0.5, "config.environments.maze is not a section"),
        (
            "maze",
            {"rollout": {"groups": 3}},
            r"environments.maze.rollout.groups = 3: an environment has values .* only",
        ),
        (
            "maze",
            {"rollout": {"temperatur": 0.5}},
            "environments.maze.rollout.temperatur = 0.5: .* rollout.temperature",
        ),
        (
            "maze",
            {"rollout": {"temperature": 0}},
            "environments.maze: config.rollout.temperature = 0.0: it must be above",
        ),
        ("maze", {"rollout": {"temperature": 1e-9}}, "environments.maze: config.rollout.temperature = 1e-09: .* 1e-06"),
        ("maze", {"rollout": {"temperature": "0.5"}}, "temperature = '0.5': it must be like the default, 1.0"),
        ("maze", {"rollout": {"group_size": 0}}, "environments.maze: config.rollout.group_size = 0"),
        ("maze", {"rollout": {"group_size": 2.5}}, "group_size = 2.5: it must be like the default, 8"),
        ("maze", {"loss": {"clip_low": True}}, "clip_low = True: it must be a float, or None"),
        ("maze", {"loss": {"filter_zero_variance": 3}}, "filter_zero_variance = 3: it must be a bool, or None"),
        ("maze", {"loss": {"mode": "echoo"}}, "environments.maze: config.loss.mode = 'echoo': choose one of"),
    ],
)
def test_a_bad_value_of_an_environment_is_named(entry, own, named):
    config = default_config()
    config.task.mixture = {"maze": 1.0, "lookup": 1.0}
    config.environments[entry] = own
    with pytest.raises(ConfigError, match=named):
        validate(config)


@pytest.mark.parametrize("share", [1e300, float("inf"), 10**400])
def test_a_schedule_takes_only_shares_that_float32_holds(share):
    config = default_config()
    config.loss.observation_schedule, config.loss.observation_schedule_points = "piecewise", ((0, 1.0), (5, share))
    with pytest.raises(ConfigError, match="observation_schedule_points"):
        validate(config)


def test_an_environment_may_have_values_of_its_own(tmp_path):
    config = default_config()
    config.task.mixture = {"maze": 1.0, "lookup": 1.0}
    config.environments.maze = {
        "rollout": {"temperature": 1, "group_size": 3},
        "loss": {"class_weights": {"body": 0.5}},
    }
    validate(config)
    claim_workdir(config, tmp_path)
    found = recorded_config(tmp_path)
    assert flat(found) == flat(config)
    assert [of_environment(found, entry).rollout.group_size for entry in ("maze", "lookup")] == [3, 8]
    assert of_environment(found, "maze").rollout.temperature == 1
    config.rollout.replay = "rollouts.jsonl.gz"
    with pytest.raises(ConfigError, match="environments.maze.rollout.group_size = 3 has no effect with .*replay"):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rollout.replay": "rollouts.jsonl.gz"}, "refill_tries = 2 has no effect with config.rollout.replay"),
        ({"loss.mode": "env_only"}, "refill_tries = 2 has no effect: config.loss.mode = 'env_only' has no policy term"),
        ({"loss.mode_changes": ((0, "env_only"),)}, "refill_tries = 2 has no effect"),
        ({"rollout.group_size": 1}, "refill_tries = 2, but a group of lookup has 1 rollout"),
        (
            {"num_steps": 10**8},
            "num_steps = 100000000 with rollout.groups = 8, 64 rollouts a step and .*refill_tries = 2",
        ),
    ],
)
def test_refills_that_could_not_help_are_refused(fields, named):
    config = default_config()
    config.rollout.refill_tries = 2
    validate(config)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=named):
        validate(config)
    if "num_steps" not in fields:
        config.rollout.refill_tries = 0
        validate(config)


def test_only_environments_with_a_policy_term_need_groups_to_refill():
    config = default_config()
    config.rollout.refill_tries = 2
    config.task.mixture = {"maze": 1.0, "lookup": 1.0}
    config.environments.maze = {"rollout": {"group_size": 1}}
    with pytest.raises(ConfigError, match="a group of maze has 1 rollout"):
        validate(config)
    config.environments.maze.loss = {"mode": "env_only"}
    validate(config)


def test_hyperparameter_set_twice_is_an_error():
    config = default_config()
    config.loss.clip_low, config.loss.policy_options = 0.1, {"clip_low": 0.2}
    with pytest.raises(ConfigError, match="sets clip_low twice"):
        validate(config)


def test_misspelt_class_or_tool_is_named_with_the_choices():
    config = default_config()
    config.loss.class_weights = {"bodi": 1.0}
    with pytest.raises(ConfigError, match=r"class_weights\.bodi.*choose from body, boilerplate, truncation, feedback"):
        validate(config)
    config.loss.tool_weights = {"bassh": 0.0}
    with pytest.raises(ConfigError, match=r"tool_weights\.bassh.*choose from bash"):
        check_tools(config, TOOLS)
    config.loss.tool_weights = {"bash": 0.0}
    config.environments.lookup = {"loss": {"tool_weights": {"bassh": 0.0}}}
    with pytest.raises(ConfigError, match=r"config\.environments\.lookup\.loss\.tool_weights\.bassh = 0\.0: choose"):
        check_tools(config, TOOLS)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mode": "env_only", "observation_weight": 0.0}, "observation_weight = 0.0.*trains none"),
        ({"mode": "env_only", "class_weights.body": 0.0}, "class_weights trains none"),
        ({"mode": "env_only", "kl_weight": 0.1}, "kl_weight = 0.1"),
        ({"policy": "cispo", "dual_clip": 3.0}, "dual_clip = 3.0, but .*'cispo' takes clip_low, clip_high"),
        ({"policy": "rloo", "clip_low": 0.1}, "clip_low = 0.1, but .*'rloo' takes no hyperparameter"),
    ],
)
def test_option_without_effect_is_an_error(fields, named):
    config = default_config()
    config.update_from_flattened_dict({f"loss.{name}": value for name, value in fields.items()})
    with pytest.raises(ConfigError, match=named):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"momentum": 0.9}, "sets momentum = 0.9, which name = 'adamw' does not use"),
        ({"name": "muon", "momentum": 0.9}, "momentum = 0.9, which name = 'muon'"),
        ({"name": "sgd", "b1": 0.8, "b2": 0.9}, "sets b1 = 0.8, b2 = 0.9, which name = 'sgd'"),
        ({"end_share": 0.1}, "sets end_share = 0.1, but schedule = 'constant'.*set schedule to linear or cosine"),
        ({"schedule_steps": 50}, "sets schedule_steps = 50, but schedule = 'constant'"),
        ({"schedule": "cosine", "schedule_steps": 10}, "ends after 10 updates, but the warm-up .*10: lower .*_steps"),
        ({"schedule": "linear", "updates_per_batch": 2**30}, "ends after 107374182400 updates, more than 2147483647"),
        ({"schedule": "linear", "warmup_steps": 100}, "ends after 100 updates, .*or raise num_steps"),
    ],
)
def test_optimizer_option_without_effect_is_an_error(fields, named):
    config = default_config()
    config.update_from_flattened_dict({f"optimizer.{name}": value for name, value in fields.items()})
    with pytest.raises(ConfigError, match=named):
        validate(config)


def test_muon_of_adapters_has_no_moments_of_adamw():
    config = default_config()
    config.lora.rank, config.optimizer.name = 2, "muon"
    validate(config)
    config.optimizer.b1 = 0.8
    with pytest.raises(ConfigError, match=r"sets b1 = 0\.8, which name = 'muon' does not use for adapters"):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model.rope_scaling.factor": 4.0}, r"rope_scaling sets factor = 4\.0, which kind = 'none' does not use"),
        (
            {"model.rope_scaling.kind": "llama3", "model.rope_scaling.beta_fast": 16.0},
            "beta_fast = 16.0, which kind = 'llama3'",
        ),
        (
            {"model.rope_scaling.kind": "yarn", "model.rope_scaling.low_frequency_factor": 2.0},
            "low_.*2.0, which kind = 'yarn'",
        ),
        (
            {"model.experts_per_token": 2},
            "experts_per_token = 2 and .* have no effect with num_experts = 0",
        ),
        ({"model.normalize_experts": False}, "normalize_experts = False have no effect with num_experts = 0"),
        ({"model.num_experts": 4}, "experts_per_token = 0: it must be from 1 to num_experts = 4"),
        ({"model.num_experts": 4, "model.experts_per_token": 5}, "experts_per_token = 5"),
        (
            {"model.num_experts": 4, "model.experts_per_token": 2, "lora.rank": 2},
            "lora.targets = .*'gate'.*: choose some of query, key, value, attention_out, each once",
        ),
        ({"lora.alpha": 64.0}, r"lora sets alpha = 64\.0, but lora\.rank = 0 means no adapters"),
        ({"lora.targets": ("query",)}, r"lora sets targets = \('query',\), but"),
        (
            {
                "model.rope_scaling.kind": "llama3",
                "model.rope_scaling.factor": 2.0,
                "model.rope_scaling.low_frequency_factor": 4.0,
            },
            "low_frequency_factor = 4.0 must be below high_frequency_factor = 4.0",
        ),
        ({"model.rope_scaling.kind": "yarn"}, "factor = 1.0 and .* must both be above 1 with kind = 'yarn'"),
        (
            {"model.rope_scaling.kind": "yarn", "model.rope_scaling.factor": 2.0, "model.rope_theta": 1.0},
            "rope_theta = 1.0 must both be above 1",
        ),
        (
            {"model.rope_scaling.kind": "yarn", "model.rope_scaling.factor": 2.0, "model.rope_scaling.beta_slow": 64.0},
            "must be below beta_fast = 32.0",
        ),
    ],
)
def test_model_option_without_effect_is_an_error(fields, named):
    config = default_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=named):
        validate(config)


def test_weights_may_be_integers():
    config = default_config()
    config.loss.class_weights = {"body": 1, "boilerplate": 0}
    config.loss.tool_weights = {"bash": 0}
    validate(config)


def test_weights_may_be_given_for_only_some_classes_and_tools():
    config = default_config()
    config.loss.class_weights = {"body": 1.0}
    config.loss.tool_weights = {"bash": 0.5}
    validate(config)


def test_workdir_accepts_only_its_config(tmp_path):
    config = default_config()
    claim_workdir(config, tmp_path / "w")
    claim_workdir(config, tmp_path / "w")
    config.seed = 5
    with pytest.raises(ConfigError, match="seed: the run has 0, this config 5"):
        claim_workdir(config, tmp_path / "w")


def test_a_run_may_move_to_other_machines(tmp_path):
    config = default_config()
    claim_workdir(config, tmp_path / "w")
    config.mesh.update(data=4, fsdp=0)
    config.pack.rows, config.system.silence_seconds, config.model.remat = 4, 5.0, "none"
    claim_workdir(config, tmp_path / "w")
    config.pack.length = 512
    with pytest.raises(ConfigError, match="pack.length") as error:
        claim_workdir(config, tmp_path / "w")
    assert "mesh" not in str(error.value)


def test_damaged_config_json_is_reported(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ConfigError, match=r"config\.json"):
        claim_workdir(default_config(), tmp_path)
