"""Config files only assign; a workdir belongs to one config."""

import importlib.util
from pathlib import Path

import pytest

from echo_jax.config import ConfigError, default_config, flat
from echo_jax.run.validate import validate
from echo_jax.run.workdir import claim_workdir

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


def test_a_field_that_does_not_exist_cannot_be_set():
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
        ("loss.policy", "ppo", "grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce"),
        ("loss.policy", "imitation", "grpo, dr_grpo"),
        ("loss.advantage", "mean", "auto, group, group_mean, leave_one_out, reward"),
        ("loss.policy_normalizer", "mean", "auto, sequence, token, constant"),
        ("loss.observation_normalizer", "mean", "observation, selected, token, constant"),
        ("loss.observation_schedule", "cosine", "constant, linear, step, warmup"),
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
        ("loss.min_valid_calls", 0.5, "min_valid_calls = 0.5.*only env_only"),
        ("loss.clean_parse", True, "clean_parse = True.*only env_only"),
        ("loss.observation_filter", "no.such:filter", "no filter 'no.such:filter'.*module:function"),
        ("loss.observation_filter", "math:pi", "math:pi is a float"),
        ("pack.rows", -1, "pack.rows = -1"),
        ("optimizer.clip_norm", 0.0, "clip_norm = 0.0"),
        ("optimizer.b2", 1.0, "b2 = 1.0"),
        ("warm_start.demonstrations", 3, "demonstrations = 3"),
    ],
)
def test_a_bad_value_is_named(field, value, named):
    config = default_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=named):
        validate(config)


@pytest.mark.parametrize(
    ("section", "value", "known"),
    [
        ("class_weights", {"bodi": 1.0}, "body, boilerplate, truncation, feedback, warning"),
        ("tool_weights", {"bassh": 0.0}, "bash"),
    ],
)
def test_a_misspelt_class_or_tool_in_a_config_file_is_named_with_the_choices(section, value, known):
    config = default_config()
    config.loss[section] = value
    with pytest.raises(ConfigError, match=f"{section}.{next(iter(value))}.*choose from {known}"):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mode": "env_only", "observation_weight": 0.0}, "observation_weight = 0.0.*trains none"),
        ({"mode": "env_only", "class_weights.body": 0.0}, "class_weights trains none"),
        ({"mode": "env_only", "kl_weight": 0.1}, "kl_weight = 0.1"),
        ({"policy": "cispo", "dual_clip": 3.0}, "dual_clip = 3.0: only grpo, dr_grpo, dapo, gspo"),
        ({"policy": "rloo", "clip_low": 0.1}, r"'rloo' has no clip for \{'clip_low': 0.1\}"),
    ],
)
def test_an_option_that_would_do_nothing_is_an_error(fields, named):
    config = default_config()
    config.update_from_flattened_dict({f"loss.{name}": value for name, value in fields.items()})
    with pytest.raises(ConfigError, match=named):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model.rope_scaling.factor": 4.0}, r"rope_scaling\.kind = 'none' has no \{'factor': 4\.0\}"),
        ({"model.rope_scaling.kind": "llama3", "model.rope_scaling.beta_fast": 16.0}, "'llama3' has no {'beta_fast'"),
        ({"model.rope_scaling.kind": "yarn", "model.rope_scaling.low_frequency_factor": 2.0}, "'yarn' has no {'low_"),
        ({"model.experts_per_token": 2}, "experts_per_token = 2, normalize_experts = True with num_experts = 0"),
        ({"model.normalize_experts": False}, "normalize_experts = False with num_experts = 0"),
        ({"model.num_experts": 4}, "experts_per_token = 0, .* num_experts = 4: from 1 to num_experts"),
        ({"model.num_experts": 4, "model.experts_per_token": 5}, "experts_per_token = 5"),
        (
            {"model.num_experts": 4, "model.experts_per_token": 2, "lora.rank": 2},
            "lora.targets = .*'gate'.*: some of query, key, value, attention_out, each once",
        ),
        ({"lora.alpha": 64.0}, r"lora\.rank = 0: there are no adapters that \{'alpha': 64\.0\} could be of"),
        ({"lora.targets": ("query",)}, r"lora\.rank = 0: .*\{'targets': \('query',\)\}"),
        (
            {
                "model.rope_scaling.kind": "llama3",
                "model.rope_scaling.factor": 2.0,
                "model.rope_scaling.low_frequency_factor": 4.0,
            },
            "low_frequency_factor = 4.0 must be below high_frequency_factor = 4.0",
        ),
        ({"model.rope_scaling.kind": "yarn"}, "factor = 1.0 and .* must both be above 1 with the kind 'yarn'"),
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
def test_an_option_of_a_model_that_would_do_nothing_is_an_error(fields, named):
    config = default_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=named):
        validate(config)


def test_whole_numbers_are_weights_too():
    config = default_config()
    config.loss.class_weights = {"body": 1, "boilerplate": 0}
    config.loss.tool_weights = {"bash": 0}
    validate(config)


def test_weights_may_be_given_for_some_classes_and_tools_only():
    config = default_config()
    config.loss.class_weights = {"body": 1.0}
    config.loss.tool_weights = {"bash": 0.5}
    validate(config)


def test_a_workdir_takes_only_its_own_config(tmp_path):
    config = default_config()
    claim_workdir(config, tmp_path / "w")
    claim_workdir(config, tmp_path / "w")
    config.seed = 5
    with pytest.raises(ConfigError, match="seed: there 0, here 5"):
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


def test_a_damaged_config_record_is_an_error_that_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ConfigError, match=r"config\.json"):
        claim_workdir(default_config(), tmp_path)
