"""What is in a device's memory in each phase of a run, whether it fits, what would, and how fast sampling can be.

In: bytes that a compiler planned, and the shapes of a sampler. Out: plain numbers, and a table. Nothing here
compiles or measures.
"""

import dataclasses
import math
from collections.abc import Iterator

from echo_jax.models.flops import decode_bytes
from echo_jax.models.transformer import ModelConfig
from echo_jax.rollout.engine.layout import GIB, POOL_SHARE, page_bytes

PHASES = ("update", "transfer", "sampling")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a topology: a chip or, where a chip is two devices, half of it."""

    kind: str  # see `jax.Device`
    memory: float  # GiB
    usable: float  # GiB of it that a program may use
    bandwidth: float  # of its memory, bytes a second
    per_chip: int = 1  # devices


# Memory and its bandwidth are those of Google's pages (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x), where
# those of v6e name 1600, 1638 and 1640 GB/s: here the largest. `usable` is what libtpu 0.0.42.1 to 0.0.52 say that is
# "available" when they refuse a program that is too large.
CHIPS = {
    "v4": Chip("TPU v4", 32 / 2, 15.25, 1200e9 / 2, per_chip=2),
    "v5e": Chip("TPU v5 lite", 16, 15.75, 819e9),
    "v5p": Chip("TPU v5", 95, 95.73, 2765e9),
    "v6e": Chip("TPU v6 lite", 32, 31.24, 1640e9),
    "tpu7x": Chip("TPU7x", 192 / 2, 94.74, 7380e9 / 2, per_chip=2),
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a program on one device, as its compiler planned them."""

    argument: int
    temporary: int
    output: int  # that overwrites no argument

    @property
    def beyond(self) -> int:
        """What it needs beside its arguments."""
        return self.temporary + self.output

    def describe(self) -> dict[str, int]:
        return {"argument_bytes": self.argument, "temporary_bytes": self.temporary, "output_bytes": self.output}


def resident(state: int, transfer: list[Memory], sampling: list[Memory], least: int = 0) -> dict[str, int]:
    """Returns phase -> bytes on a device in the phases in which an engine is awake.

    Args:
      state: bytes of what the learner keeps: train state, frozen weights, reference.
      transfer: programs that bring weights from the learner to the engine, one after the other. Their arguments are
        part of `state`; their outputs stay.
      sampling: programs of the engine, of which one has all its weights and its pool as arguments.
      least: bytes that sampling needs in any case beside `state`.
    """
    brought = highest = 0
    for program in transfer:
        highest = max(highest, brought + program.beyond)
        brought += program.output
    held = max((program.argument for program in sampling), default=0)
    return {
        "transfer": state + highest,
        "sampling": state + max(least, held + max((program.beyond for program in sampling), default=0)),
    }


@dataclasses.dataclass(frozen=True)
class HostEngine:
    """What the arithmetic needs to know of a host's engine."""

    model: ModelConfig
    tensor: int  # devices that share a replica of the model
    replicas: int
    weights: int  # bytes on a device
    page: int  # tokens
    max_tokens: int  # of a session
    attention: str = "ragged"  # implementation of `paged_attention`

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.model, self.page, self.tensor, self.attention)

    @property
    def pages_a_session(self) -> int:
        return -(-self.max_tokens // self.page)

    @property
    def session_bytes(self) -> int:
        """Memory of a session of full length, on each device of its replica."""
        return self.pages_a_session * self.page_bytes

    def sessions_in(self, left: float) -> int:
        """Returns how many sessions of full length the pools of all replicas hold if a device has `left` bytes left
        beside the weights, of which `plan_layout` takes a share."""
        return self.replicas * (self.longest_in(left) // self.page // self.pages_a_session)

    def longest_in(self, left: float) -> int:
        """Returns the tokens in such a pool of one replica: the longest session that it holds."""
        return max(0, int(POOL_SHARE * left)) // self.page_bytes * self.page


def advice(engine: HostEngine, chips: int, usable: float, state: int) -> dict[str, int]:
    """Returns what would let a device hold a session of full length, each alone and all else unchanged; {} if it does.

    Args:
      chips: devices of the whole mesh.
      usable: bytes of a device.
      state: bytes of what the learner keeps on a device. It is spread over all devices.

    Returns:
      max_tokens: the longest context of which the pool holds one session, if it is at least a page.
      tensor: the least number of devices that would have to share a replica.
      chips: the least number of devices, a power of two times those of now, over which the learner would have to be
        spread.
      A key is absent where no number would do.
    """
    left = usable - state - engine.weights
    if engine.sessions_in(left):
        return {}
    found = {"max_tokens": engine.longest_in(left)} if engine.longest_in(left) else {}
    model = engine.model
    most = math.gcd(model.num_heads, model.num_kv_heads, model.ffn_dim, model.vocab_size)
    for tensor in range(engine.tensor + 1, most + 1):
        wider = dataclasses.replace(engine, tensor=tensor, weights=engine.weights * engine.tensor // tensor)
        if most % tensor == 0 and wider.sessions_in(usable - state - wider.weights):
            found["tensor"] = tensor
            break
    if engine.sessions_in(usable - engine.weights):
        factor = 2
        while not engine.sessions_in(usable - state / factor - engine.weights):
            factor *= 2
        found["chips"] = factor * chips
    return found


def decode_ceiling(engine: HostEngine, chip: Chip, rows: int, live_tokens: int) -> dict[str, float]:
    """Returns the least bytes that a device reads to decode a token for each of a replica's `rows`, which hold
    `live_tokens` each, and the tokens per second and chip at which its memory's bandwidth alone would allow that."""
    read = decode_bytes(engine.model, rows * live_tokens) / engine.tensor
    return {
        "rows": rows * engine.replicas,
        "live_tokens": live_tokens,
        "read_bytes": round(read),
        "tokens_per_second_per_chip": round(rows / engine.tensor * chip.per_chip / (read / chip.bandwidth), 1),
    }


def why_not(result: dict) -> Iterator[str]:
    """Yields why a result of `compile_run` does not fit, and what would, as far as that was computed."""
    sampler, usable = result["sampler"], result["usable_bytes"]
    for name, program in result["programs"].items():
        if "compiler" in program:
            yield f"{name}: {program['compiler'].rstrip('.')}"
    if not sampler["sessions"]:
        would = result["would_hold_a_session"]
        forms = {
            "max_tokens": "a session of at most {} tokens",
            "tensor": "the model over {} chips (it has " + str(sampler["tensor"]) + ")",
            "chips": "{} chips in all",
        }
        ways = [forms[name].format(count) for name, count in would.items()]
        yield "the pool holds no session of full length; room for one would make " + (" or ".join(ways) or "nothing")
    for phase, size in result["resident"].items():
        if size > usable:
            yield f"{phase} needs {size / GIB:.2f} GiB of {usable / GIB:.2f}"


def table(results: list[dict]) -> Iterator[str]:
    """Yields a table with a row a result, then why those that do not fit do not."""
    yield (
        "| config | topology | mesh | tokens | update GiB | transfer GiB | sampling GiB | usable GiB | fits | a host's "
        "engine | its pool's tokens | sessions: most, asked | tokens/s/chip, at most | in loops, MiB | compile s |"
    )
    yield "|" + "---|" * 15
    for r in results:
        mesh = " × ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1) or "1 chip"
        gib = [f"{r['resident'][p] / GIB:.2f}" if p in r["resident"] else "–" for p in PHASES]
        kinds = ", ".join(f"{kind} {c['bytes_in_loops'] / 2**20:.0f}" for kind, c in r.get("collectives", {}).items())
        s = r["sampler"]
        cells = (
            *(r["config"], r["topology"], mesh, f"{r['rows']} × {r['tokens_a_row']}", *gib),
            *(f"{r['usable_bytes'] / GIB:.2f}", "yes" if r["fits"] else "no", f"{s['replicas']} × {s['tensor']}"),
            *(s["pool_tokens"], f"{s['sessions_at_most']}, {s['sessions_a_step']}"),
            *(f"{s['tokens_per_second_per_chip']:.0f}", kinds or "–", f"{r['compile_seconds']:.0f}"),
        )
        yield "| " + " | ".join(map(str, cells)) + " |"
    for r in results:
        if reasons := list(why_not(r)):
            yield f"\n{r['config']} does not fit on {r['topology']}: {'; '.join(reasons)}."
