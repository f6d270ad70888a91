"""The control for the quickstart: the same run with learning rate 0 must not improve.

    python -m echo_jax.sweep --config=configs/ablations/learning_rate.py --workdir=runs/learning_rate

It differs from configs/quickstart.py only in `optimizer.learning_rate`, over three seeds.
"""

from configs import quickstart


def get_config():
    return quickstart.get_config()


def sweep():
    for learning_rate in (3e-4, 0.0):
        for seed in (0, 1, 2):
            yield {"optimizer.learning_rate": learning_rate, "seed": seed}
