"""Which revision of a family's tasks a run has.

In: a config that may leave it open, and a workdir. Out: the config with a number, which the run keeps for good.
"""

from pathlib import Path

import ml_collections

from echo_jax.run.workdir import FIRST_REVISION, recorded_fields
from echo_jax.tasks import FAMILIES


def settle_revisions(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Replaces each task revision that the config leaves open, because it is 0 or not named: by that of the run in the
    workdir or, if it holds none, by the newest. So a run keeps its tasks when its family is mended."""
    recorded = recorded_fields(workdir) if (workdir / "config.json").exists() else None
    for entry, section in config.task.items():
        family = section.get("family", entry)
        if entry == "mixture" or family not in FAMILIES or section.get("revision"):
            continue
        newest = FAMILIES[family].newest_revision
        with section.unlocked():
            section.revision = newest if recorded is None else recorded.get(f"task.{entry}.revision", FIRST_REVISION)
