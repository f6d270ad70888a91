"""What the ECHO weight does on rooms, where acting well needs to know how the world answers.

    python -m echo_jax.sweep --config=configs/ablations/observation_weight.py --workdir=runs/observation_weight

One difference to configs/rooms.py: `loss.observation_weight`, over three seeds.
"""

from configs import rooms


def get_config():
    return rooms.get_config()


def sweep():
    for observation_weight in (0.0, 0.1):
        for seed in (0, 1, 2):
            yield {"loss.observation_weight": observation_weight, "seed": seed}
