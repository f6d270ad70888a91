"""A tool-using agent from scratch on a laptop: warm start, then ECHO, on lookup tasks in a real sandbox.

python -m echo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from echo_jax.config import default_config


def get_config():
    return default_config()
