"""Speed of sampling: the engine, and other samplers with the same weights, in one process and in turns.

    python experiments/benchmarks/engine.py                              # needs `pip install -e '.[parity]'`
    python experiments/benchmarks/engine.py --against=transformers,tunix # google-tunix, which needs Python 3.12
    python experiments/benchmarks/engine.py --against= --tables=used,group

SmolLM2-135M's shape with random weights. On a CPU in f32, with as many threads as cores on each side: the time to the
first token, the decode speed and the total (`speed`), how the time follows what is used of a long context (`used`), and
how many known tokens a group of rollouts computes (`group`). On a GPU in bf16, `speed` alone, by batch.
Times are the smallest of `--repeats`, after a run that compiles. All sample the full softmax at temperature 1; no token
stops a turn, and no two prompts share a prefix. The engine also returns log-probs and entropies, the others do not.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU

import jax
import numpy as np
from gpu import machine

from echo_jax.models.families import published_config
from echo_jax.models.save_pretrained import write_weights
from echo_jax.models.transformer import ModelConfig, init_params
from echo_jax.rollout.engine import EngineSetup, find_engine
from echo_jax.system.sharding import make_mesh

SMOLLM2 = {
    "vocab_size": 49_152, "num_layers": 30, "embed_dim": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64,
    "ffn_dim": 1536, "rope_theta": 100_000.0, "norm_eps": 1e-5, "tie_embeddings": True,
}  # fmt: skip
SHAPES = {"smollm2": SMOLLM2, "tiny": SMOLLM2 | {"vocab_size": 512, "num_layers": 2}}
CONTEXT = 1024  # the engine's max_tokens in `speed`
# (batch, tokens of a prompt, new tokens) of `speed`
CPU_CASES = ((8, 64, 64), (8, 512, 64))
GPU_CASES = ((8, 64, 128), (64, 64, 128), (256, 64, 128))
TURNS, GROUP, PROMPT, OBSERVATION, TURN = 6, 16, 256, 32, 16  # of `group`; the last three are tokens

# A sampler maps (prompts int [B, T], number of new tokens) to nothing, when it is done.
Sampler = Callable[[np.ndarray, int], None]


class Ours:
    """Sessions of an engine, through its interface alone."""

    def __init__(self, config: ModelConfig, sessions: int, max_tokens: int, **options):
        mesh = make_mesh(1, 1, 1, jax.devices()[:1])
        graphdef, self.params = init_params(config, 0, mesh)
        setup = EngineSetup(
            graphdef=graphdef, model_config=config, mesh=mesh, sessions=sessions, max_tokens=max_tokens,
            temperature=1.0, stop_ids=(), seed=0,
        )  # fmt: skip
        self.engine = find_engine("paged", options)(setup, **options)
        self.versions = itertools.count()
        self.set_params()

    def set_params(self) -> None:
        """Makes the engine forget the prefixes that it knows."""
        self.engine.set_params(self.params, next(self.versions))

    def turns(self, asks: dict[int, tuple[int, ...]], new: int) -> dict:
        """Appends ids to sessions and samples a turn of each; {session: ids} -> {session: turn}."""
        for session, ids in asks.items():
            self.engine.extend(session, ids, new)
        said = {}
        while self.engine.busy:
            said |= self.engine.step()
        return said

    def __call__(self, prompts: np.ndarray, new: int) -> list:
        sessions = [self.engine.open(i, i) for i in range(len(prompts))]
        said = self.turns({s: tuple(ids) for s, ids in zip(sessions, prompts.tolist(), strict=True)}, new)
        for session in sessions:
            self.engine.close(session)
        return [said[session] for session in sessions]


class Transformers:
    """`generate` of transformers, with its default attention and cache."""

    def __init__(self, folder: Path, config: ModelConfig):
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count())
        transformers.utils.logging.set_verbosity_error()
        self.torch = torch
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        dtype = getattr(torch, config.compute_dtype)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()

    def __call__(self, prompts: np.ndarray, new: int) -> None:
        ids = self.torch.from_numpy(prompts).to(self.device)
        with self.torch.inference_mode():
            self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=True,
                top_k=0, top_p=1.0, pad_token_id=0,
            ).cpu()  # fmt: skip

    def logprobs(self, ids: np.ndarray, new: int) -> np.ndarray:
        """Returns the log-probs of the last `new` ids of each row, f32 [B, new]."""
        ids = self.torch.from_numpy(ids).to(self.device)
        with self.torch.inference_mode():
            every = self.model(ids).logits[:, -new - 1 : -1].float().log_softmax(-1)
            return every.gather(2, ids[:, -new:, None])[..., 0].cpu().numpy()


class Tunix:
    """tunix's own sampler, with a cache as long as prompt and new tokens: the shortest that works."""

    def __init__(self, folder: Path, config: ModelConfig):
        from tunix.models.llama3 import model, params

        fields = ("num_layers", "vocab_size", "embed_dim", "num_heads", "head_dim", "num_kv_heads", "norm_eps")
        described = model.ModelConfig(
            **{name: getattr(config, name) for name in fields}, hidden_dim=config.ffn_dim,
            rope_theta=config.rope_theta, weight_tying=config.tie_embeddings,
        )  # fmt: skip
        self.model = params.create_model_from_safe_tensors(str(folder), described, dtype=config.compute_dtype)
        self.config = config

    @functools.cache  # noqa: B019
    def sampler(self, size: int):
        from tunix.generate import sampler

        c = self.config
        return sampler.Sampler(
            self.model, IdTokenizer(), sampler.CacheConfig(size, c.num_layers, c.num_kv_heads, c.head_dim)
        )

    def __call__(self, prompts: np.ndarray, new: int) -> None:
        texts = [" ".join(map(str, ids)) for ids in prompts.tolist()]
        length = prompts.shape[1]
        out = self.sampler(length + new)(
            texts, max_generation_steps=new, max_prompt_length=length, eos_tokens=[self.config.vocab_size],
            temperature=1.0, top_p=1.0, seed=0,
        )  # fmt: skip
        assert all(len(ids) == new for ids in out.tokens)


class IdTokenizer:
    """A tokenizer for tunix whose texts are ids."""

    def encode(self, text: str) -> list[int]:
        return list(map(int, text.split()))

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -1


OTHERS = {"transformers": Transformers, "tunix": Tunix}


def seconds(samplers: dict[str, Sampler], prompts: Callable[[], np.ndarray], news, repeats: int) -> dict:
    """Returns {(sampler, new): smallest seconds}; in each repeat all take their turn, with the same prompts."""
    times = {(name, new): [] for name in samplers for new in news}
    for repeat in range(repeats + 1):  # the first compiles
        for new in news:
            drawn = prompts()
            for name, sample in samplers.items():
                start = time.perf_counter()
                sample(drawn, new)
                if repeat:
                    times[name, new].append(time.perf_counter() - start)
    return {key: min(taken) for key, taken in times.items()}


def drawer(config: ModelConfig, batch: int, length: int) -> Callable[[], np.ndarray]:
    rng = np.random.default_rng(0)
    return lambda: rng.integers(0, config.vocab_size, (batch, length))


def speed(config: ModelConfig, others: dict[str, Sampler], args) -> Iterator[str]:
    yield "| sampler | batch | prompt | new | first token s | decode tokens/s | total s | first | decode | total |"
    yield "|" + "---|" * 10
    largest = 0.0
    for batch, length, new in GPU_CASES if jax.default_backend() == "gpu" else CPU_CASES:
        # No session waits for a tool here, so all of them decode at once.
        ours = Ours(config, batch, CONTEXT, **{"rows": batch} | args.options)
        samplers = {"echo_jax": ours} | others
        took = seconds(samplers, drawer(config, batch, length), (1, new + 1), args.repeats)
        rate = {name: batch * new / (took[name, new + 1] - took[name, 1]) for name in samplers}
        for name in samplers:
            first, total = took[name, 1], took[name, new + 1]
            ratios = (
                took["echo_jax", 1] / first, rate["echo_jax"] / rate[name], took["echo_jax", new + 1] / total
            )  # fmt: skip
            yield (
                f"| {name} | {batch} | {length} | {new} | {first:.3f} | {rate[name]:.0f} | {total:.2f} | "
                + " | ".join("" if name == "echo_jax" else f"{ratio:.2f}×" for ratio in ratios)
                + " |"
            )
        if "transformers" in others:
            prompts = drawer(config, batch, length)()
            turns = ours(prompts, 8)
            ids = np.concatenate([prompts, [turn.ids for turn in turns]], axis=1)
            expected = others["transformers"].logprobs(ids, 8)
            largest = max(largest, float(np.abs(expected - [turn.logprobs for turn in turns]).max()))
    yield "\nThe last three columns: echo_jax's number over that of the row (times: less is faster; decode: more is)."
    if "transformers" in others:
        yield f"Largest difference of a sampled token's log-prob from transformers' forward: {largest:.1e}."


def used(config: ModelConfig, others: dict[str, Sampler], args) -> Iterator[str]:
    del others
    batch, length, new = 8, 64, 191
    lengths = (256, 4096)
    samplers = {str(most): Ours(config, batch, most, **args.options) for most in lengths}
    took = seconds(samplers, drawer(config, batch, length), (1, new + 1), args.repeats)
    steps = [1e3 * (took[name, new + 1] - took[name, 1]) / new for name in samplers]
    yield "| sessions | tokens used | ms a decode step, max_tokens 256 | max_tokens 4096 | ratio |"
    yield "|" + "---|" * 5
    yield f"| {batch} | {length + new + 1} | {steps[0]:.1f} | {steps[1]:.1f} | {steps[1] / steps[0]:.2f}× |"


def group(config: ModelConfig, others: dict[str, Sampler], args) -> Iterator[str]:
    del others
    ours = Ours(config, GROUP, PROMPT + TURNS * (TURN + OBSERVATION), **args.options)
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(0, config.vocab_size, n).tolist())  # noqa: E731
    prompt = draw(PROMPT)
    asks = {ours.engine.open(i, 0): prompt for i in range(GROUP)}
    for _ in range(TURNS):
        said = ours.turns(asks, TURN)
        assert all(len(said[session].ids) == TURN for session in asks)
        asks = {session: draw(OBSERVATION) for session in asks}
    computed = ours.engine.stats()
    unique = PROMPT + GROUP * (TURNS - 1) * OBSERVATION
    # All that was fed, less the sampled tokens; a session's last one is never fed.
    forced = computed["prefill"] + computed["decode"] - GROUP * (TURNS * TURN - 1)
    yield "| turns | group | prompt | observation | known tokens computed | unique | ratio |"
    yield "|" + "---|" * 7
    yield f"| {TURNS} | {GROUP} | {PROMPT} | {OBSERVATION} | {forced} | {unique} | {forced / unique:.3f} |"


TABLES = {"speed": speed, "used": used, "group": group}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="transformers", help="other samplers, of transformers and tunix")
    parser.add_argument("--tables", default="", help=f"of {','.join(TABLES)}; without it all, on a GPU speed alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--options", type=json.loads, default={}, help="of the engine, as JSON")
    args = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    config = ModelConfig(
        **SHAPES[args.shape], compute_dtype="bfloat16" if on_gpu else "float32", remat="full", attention="xla"
    )
    against = [name for name in args.against.split(",") if name]
    names = [{"tunix": "google-tunix"}.get(name, name) for name in (*(["torch"] if against else []), *against)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    print(", ".join([machine(), *versions, f"{os.cpu_count()} cores", platform.machine(), config.compute_dtype]))
    with tempfile.TemporaryDirectory() as folder:
        params = init_params(config, 0, make_mesh(1, 1, 1, jax.devices()[:1]))[1]
        Path(folder, "config.json").write_text(json.dumps(published_config(config, max_length=8192)))
        write_weights(params, config, Path(folder), dtype=config.compute_dtype)
        others = {name: OTHERS[name](Path(folder), config) for name in against}
    chosen = args.tables.split(",") if args.tables else ["speed"] if on_gpu else TABLES
    for name in chosen:
        print(f"\n`{name}`:\n")
        for line in TABLES[name](config, others, args):
            print(line, flush=True)


if __name__ == "__main__":
    main()
