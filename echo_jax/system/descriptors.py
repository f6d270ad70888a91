"""How many files this process may have open: sockets and pipes to sandboxes count too.

In: how many it will need. Out: a limit that allows them, or an error before any work starts.
"""

import os
import resource

from echo_jax.system.errors import ConfigError

WANTED = 1 << 16  # more than any run needs; programs that visit every possible descriptor stay fast
RESERVED = 32  # for what a run opens besides, on top of what is open already


def allow_sandboxes(count: int, descriptors: int) -> None:
    """Raises the soft limit of open files, `ulimit -Sn`, as far as the hard one allows, and checks that it suffices.

    Args:
      count: of sandboxes that are open at once.
      descriptors: that each takes.

    Raises:
      ConfigError: it does not suffice.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < WANTED:
        soft = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    others = len(os.listdir("/proc/self/fd")) + RESERVED
    if soft == resource.RLIM_INFINITY or count * descriptors + others <= soft:
        return
    fitting = (soft - others) // descriptors
    instead = f", or set config.rollout.max_sandboxes to at most {fitting}" if fitting > 0 else ""
    raise ConfigError(
        f"{count} sandboxes are open at once and take {count * descriptors} file descriptors, the rest of the run "
        f"{others}, but this process may have {soft} (`ulimit -Hn`): raise that limit{instead}"
    )
