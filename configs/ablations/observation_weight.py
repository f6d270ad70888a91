"""The effect of the ECHO weight on rooms, where acting well requires predicting how the world responds.

    python -m echo_jax.sweep --config=configs/ablations/observation_weight.py --workdir=runs/observation_weight

It differs from configs/rooms.py only in `loss.observation_weight`, over three seeds.
"""

from configs import rooms


def get_config():
    return rooms.get_config()


def sweep():
    for observation_weight in (0.0, 0.1):
        for seed in (0, 1, 2):
            yield {"loss.observation_weight": observation_weight, "seed": seed}
