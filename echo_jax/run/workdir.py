"""Who may train in a workdir: one config, one run at a time, one owner.

In: a config and a folder. Out: the folder's `config.json`, `.lock` and `owner`, or an error that says who has it. And
the other way: `recorded_config` reads a run's config back from its folder.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from echo_jax.config import OPEN_SECTIONS, ConfigError, default_config, flat
from echo_jax.system import named, paths
from echo_jax.system.errors import UserError

# What may differ when a run goes on, and why: a field's name, or a section's with a dot. No other field may.
PLACEMENT = "it decides where and how the run is computed; results stay equal up to rounding"
LOOKING = "it decides how often the run is looked at or saved, not what it learns"
LENGTH = "the run is extended, unless a schedule depends on its length"
MAY_CHANGE = {
    "mesh.": PLACEMENT,
    "system.": PLACEMENT,
    "pack.rows": PLACEMENT,
    "rollout.tool_threads": PLACEMENT,
    "rollout.max_sandboxes": PLACEMENT,
    "model.remat": PLACEMENT,
    "model.attention": PLACEMENT,
    "checkpoint.": LOOKING,
    "eval.every": LOOKING,
    "eval.trajectories": LOOKING,
    "rollout.save_every": LOOKING,
    "rollout.keep": LOOKING,
    "num_steps": LENGTH,
}
# What a run that starts from another's weights must have in common with it.
STARTS_FROM = ("model.", "lora.", "tokenizer.", "warm_start.")
# What the warm start does not depend on, besides what may change: arms of a sweep that share one may differ in it.
AFTER_WARM_START = (
    *("num_steps", "init_from", "loss.", "optimizer.learning_rate", "optimizer.updates_per_batch"),
    *("optimizer.mini_batches", "optimizer.schedule", "optimizer.end_share", "environments."),
    *("rollout.groups", "rollout.group_size", "rollout.temperature", "rollout.replay", "rollout.engine"),
    "rollout.refill_tries",
)
# What must be equal to read a run's parameters: those of `evaluate` and `export`. `seed` draws the frozen weights under
# adapters.
READS_PARAMETERS = ("model.", "lora.", "tokenizer.", "seed")
FIRST_REVISION = 1  # of the tasks of runs that recorded none


def may_change(name: str) -> bool:
    """Returns whether a run may go on with another value of this field; see `MAY_CHANGE`."""
    return any(name == key or (key.endswith(".") and name.startswith(key)) for key in MAY_CHANGE)


def follows_warm_start(name: str) -> bool:
    """Returns whether the warm start of a run is the same whatever this field is."""
    numerics = name in ("loss.token_block", "loss.vocab_block", "loss.score_all")  # of the LM head in either phase
    return may_change(name) or (name.startswith(AFTER_WARM_START) and not numerics)


def claim_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes config.json into a new workdir, or checks that the run in an old one may go on with this config."""
    if (workdir / "config.json").exists():
        check_workdir(config, workdir)
        return
    workdir.mkdir(parents=True, exist_ok=True)
    record_config(config, workdir)


def record_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes config.json. Of a run that goes on with other values it then holds those."""
    text = json.dumps(flat(config), indent=2, sort_keys=True) + "\n"
    path = workdir / "config.json"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    scratch = path.with_name("config.json.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def check_workdir(config: ml_collections.ConfigDict, workdir: Path, *, only_parameters: bool = False) -> None:
    """Checks that a workdir holds a run that may go on with this config.

    A field that the run's version did not have yet counts as its default.

    Args:
      only_parameters: check only the fields that decide what the run's parameters are, to evaluate or export them.

    Raises:
      ConfigError: it holds no run, or a run with a different config (the message lists the differences); resuming would
        mix two experiments.
    """
    changes = differences(config, workdir)
    refused = {name: pair for name, pair in changes.items() if not may_change(name)}
    if only_parameters:
        refused = {name: pair for name, pair in refused.items() if name.startswith(READS_PARAMETERS)}
    elif "num_steps" in changes:
        _check_length(config, workdir, *changes["num_steps"])
    if refused:
        lines = [f"  {name}: the run has {theirs!r}, this config {ours!r}" for name, (theirs, ours) in refused.items()]
        advice = (
            "Remove these overrides: they decide what the run's parameters are."
            if only_parameters
            else "Use the same config to resume it, or another --workdir for a new run."
        )
        raise ConfigError("\n".join([f"workdir {workdir} holds a run with a different config:", *lines, advice]))


def differences(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, tuple[Any, Any]]:
    """Returns {field: (the run's value, the config's)} of the fields in which they differ.

    Raises:
      ConfigError: the workdir holds no run.
    """
    recorded, current = recorded_fields(workdir), _plain(flat(config))
    recorded |= {name: value for name, value in _later_fields(recorded).items() if name in current}
    pairs = {
        name: tuple(fields.get(name, _absent(name)) for fields in (recorded, current))
        for name in sorted(current.keys() | recorded.keys())
    }
    return {name: (theirs, ours) for name, (theirs, ours) in pairs.items() if theirs != ours}


def starting_point(config: ml_collections.ConfigDict) -> tuple[Path, int]:
    """Returns the workdir and the step of the checkpoint that config.init_from names: of the newest, without a step.

    Raises:
      ConfigError: there is no such checkpoint, or a run with this config cannot start from it.
    """
    said = f"config.init_from = {config.init_from!r}"
    name, _, step = config.init_from.rpartition(":")
    if not name or not step.isdecimal():
        name, step = config.init_from, ""
    workdir = Path(paths.expanded(name))
    changes = differences(config, workdir)
    pairs = {field: pair for field, pair in changes.items() if field.startswith(STARTS_FROM) and not may_change(field)}
    if pairs:
        lines = [f"  {field}: that run has {theirs!r}, this config {ours!r}" for field, (theirs, ours) in pairs.items()]
        advice = "Set these fields as that run did, or start from another run."
        raise ConfigError("\n".join([f"{said} is a run with another start:", *lines, advice]))
    saved = _saved_steps(workdir)
    start = int(step) if step else max(saved, default=None)
    if start not in saved:
        raise ConfigError(f"{said}: no such checkpoint; {workdir} has steps {sorted(saved) or 'none'}")
    warm_steps, last_step = config.warm_start.num_steps, config.warm_start.num_steps + config.num_steps
    if not warm_steps <= start <= last_step:
        raise ConfigError(
            f"{said}: its checkpoint is of step {start}, but this run has a warm start of {warm_steps} steps and ends "
            f"at step {last_step}; choose a step between"
        )
    if start > warm_steps and "rollout.groups" in changes:
        raise ConfigError(
            f"{said} has made RL steps with other rollout.groups than this config's {config.rollout.groups}, so tasks "
            f"would be used twice; use the same, or start from step {warm_steps}"
        )
    schedule = config.optimizer.schedule
    if start > warm_steps and schedule != "constant" and not config.optimizer.schedule_steps:
        raise ConfigError(
            f"{said} has made {start - warm_steps} RL steps, so this run, whose optimizer is fresh, would end before "
            f"its optimizer.schedule = {schedule!r} over num_steps steps; set optimizer.schedule_steps"
        )
    tries = changes.get("rollout.refill_tries", (0, 0))
    if start > warm_steps and all(tries):
        raise ConfigError(
            f"{said} has made RL steps with rollout.refill_tries = {tries[0]}, this config has {tries[1]}, so tasks "
            f"would be used twice; use the same, or start from step {warm_steps}"
        )
    return workdir, start


def _check_length(config: ml_collections.ConfigDict, workdir: Path, before: int, after: int) -> None:
    """Checks that a run may end at another step than it was started with."""
    changed = f"  num_steps: the run has {before}, this config {after}"
    for field in ("loss.observation_schedule", "optimizer.schedule"):
        section, name = field.split(".")
        kind, steps = config[section][name], config[section][f"{name}_steps"]
        if kind != "constant" and not steps:
            raise ConfigError(
                f"workdir {workdir} holds a run of another length:\n{changed}\nIts {field} = {kind!r} lasts num_steps "
                "steps, so the steps made so far would have been different. Use the same num_steps, or another "
                f"--workdir; with {field}_steps set, a run can be extended."
            )
    made = max((finished_steps(workdir) or 0, *_saved_steps(workdir)))
    if made > config.warm_start.num_steps + after:
        raise ConfigError(
            f"workdir {workdir} holds a longer run:\n{changed}\nIt has made {made - config.warm_start.num_steps} RL "
            "steps. Use at least as many, or another --workdir."
        )


def _saved_steps(workdir: Path) -> set[int]:
    from echo_jax.learner.checkpoint import saved_steps  # loads JAX and orbax, which a sweep's plan does not need

    return saved_steps(workdir / "checkpoints")


def finished_steps(workdir: Path) -> int | None:
    """Returns how many steps a complete run has made; None if there is none in the workdir."""
    path = workdir / "DONE"
    return int(path.read_text(encoding="utf-8").split()[0]) if path.exists() else None


def recorded_config(workdir: Path) -> ml_collections.ConfigDict:
    """Returns the config of the run in a workdir, locked; a field that its version lacked has its default.

    Raises:
      ConfigError: it holds no run, or one of a later version with fields that this version does not know.
    """
    recorded = recorded_fields(workdir)
    config = default_config()
    known = flat(config)
    with config.unlocked():
        for section in OPEN_SECTIONS:
            if any(name.startswith(f"{section}.") for name in recorded):
                _set(config, section, {})
        for name, value in recorded.items():
            if name not in known and not name.startswith((*(f"{section}." for section in OPEN_SECTIONS), "task.")):
                raise ConfigError(
                    f"{workdir / 'config.json'} has the field {name}, which this version of echo_jax does not know; "
                    "use the version that made the run"
                )
            _set(config, name, _tuples(value))
    provenance = workdir / "provenance.jsonl"
    for line in provenance.read_text(encoding="utf-8").splitlines()[-1:] if provenance.exists() else ():
        for folder in json.loads(line).get("module_folders", ()):  # of the config's own modules
            named.add_folder(folder)
    return config


def _set(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        if section not in config:
            config[section] = ml_collections.ConfigDict()
        config = config[section]
    config[leaf] = ml_collections.ConfigDict() if isinstance(value, dict) else value


def _tuples(value: Any) -> Any:
    """Returns a value with tuples again where JSON has lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def recorded_fields(workdir: Path) -> dict[str, Any]:
    """Returns the fields in a workdir's config.json."""
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run; train one first: python -m echo_jax.train --workdir={workdir} …")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise ValueError(f"a {type(recorded).__name__}, not an object")
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); move the workdir away, or use another --workdir") from error
    if recorded.get("rollout.engine") == "dense":  # the paged engine took its place
        recorded["rollout.engine"] = "paged"
    families = {name for name, section in default_config().task.items() if "revision" in section}
    entries = {*families, *(name.split(".")[1] for name in recorded if name.startswith("task."))}
    for entry in entries:
        if recorded.get(f"task.{entry}.family", entry) in families:
            recorded.setdefault(f"task.{entry}.revision", FIRST_REVISION)
    return recorded


def _absent(name: str) -> Any:
    """Returns what it means that a config does not name an entry of an open section."""
    if name.startswith("loss.class_weights."):
        return 0.0
    return 1.0 if name.startswith("loss.tool_weights.") else "(no such field)"


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields as they are after a round trip through JSON."""
    return json.loads(json.dumps(fields))


def _later_fields(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the default of each field that a recorded config lacks. Entries of an open section are not fields: if it
    lacks one, the config left it out."""
    sections = [section for section in OPEN_SECTIONS if any(name.startswith(f"{section}.") for name in recorded)]
    return {
        name: value
        for name, value in _plain(flat(default_config())).items()
        if name not in recorded and not any(name.startswith(f"{section}.") for section in sections)
    }


class Taken(UserError):
    """Another process is training in the workdir, or another owner has taken it."""


@contextlib.contextmanager
def only_process_in(workdir: Path) -> Iterator[None]:
    """Holds the workdir's lock; raises `Taken` if another process has it. A killed process releases it."""
    with (workdir / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Taken(f"another process is training in {workdir}; stop it, or use another --workdir") from error
        yield


def claim_for(owner: str, workdir: Path) -> None:
    """Gives the workdir to the owner; raises `Taken` if another has it. If two try at once, one of them gets it."""
    path = workdir / "owner"
    with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(owner)
    if (found := path.read_text(encoding="utf-8")) != owner:
        raise Taken(f"{workdir} belongs to the owner {found!r}, not to {owner!r}; if {found!r} is gone, delete {path}")
