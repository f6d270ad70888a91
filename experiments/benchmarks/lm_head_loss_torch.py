"""The torch rows of `lm_head_loss.py`, in a separate process: neither framework sees the other's memory pool.

    python experiments/benchmarks/lm_head_loss_torch.py --tokens=8192 --dim=4096 --vocab=151936 --shares=1.0,0.6

Needs a GPU, torch, `liger-kernel` and `cut-cross-entropy` (none is a dependency of this project). Prints one JSON
object per row and share of active tokens: seconds, bytes beyond inputs and returned gradients, and the largest relative
error of 256 active rows of the gradient of hidden against f32. The loss is a plain sum over the active tokens; inactive
ones have the ignored index. These kernels do not offer per-token cotangents, which PPO needs.
"""

import argparse
import json
import time
from importlib import metadata

import torch
import torch.nn.functional as F
from cut_cross_entropy import linear_cross_entropy
from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

IGNORE = -100
CHECKED = 256  # rows of the gradient of hidden compared with f32
ROWS = {
    "torch, full logits bf16": lambda h, w, t: F.cross_entropy(h @ w.T, t, ignore_index=IGNORE, reduction="sum"),
    "Liger": lambda h, w, t: LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum")(w, h, t),
    "cut-cross-entropy": lambda h, w, t: linear_cross_entropy(h, w, t, ignore_index=IGNORE, reduction="sum"),
    "cut-cross-entropy, no gradient filter": lambda h, w, t: linear_cross_entropy(
        h, w, t, ignore_index=IGNORE, reduction="sum", filter_eps=None
    ),
}


def reference(hidden, head, targets) -> torch.Tensor:
    """Returns the gradient of the loss with respect to a few rows of hidden, in f32."""
    hidden = hidden.detach().float().requires_grad_()
    F.cross_entropy(hidden @ head.detach().float().T, targets, reduction="sum").backward()
    return hidden.grad


def measure(loss, hidden, head, targets, repeats: int, device: str) -> dict[str, float]:
    active = torch.nonzero(targets != IGNORE)[:CHECKED, 0]
    wanted = reference(hidden[active], head, targets[active])
    gpu = device == "cuda"
    synchronize = torch.cuda.synchronize if gpu else lambda: None
    hidden.grad = head.grad = None  # of the row before: not this row's memory
    inputs, times, above = torch.cuda.memory_allocated() if gpu else 0, [], 0
    for _ in range(repeats + 1):  # the first warms up
        hidden.grad = head.grad = None
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        loss(hidden, head, targets).backward()
        synchronize()
        times.append(time.perf_counter() - start)
    if gpu:
        gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, head))
        above = torch.cuda.max_memory_allocated() - inputs - gradients
    error = (hidden.grad[active].float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return {"seconds": min(times[1:]), "bytes": above, "error": error.max().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("dim", 4096), ("vocab", 151_936), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shares", default="1.0", help="shares of active tokens, separated by commas")
    parser.add_argument(
        "--device", default="cuda", help="cpu, with TRITON_INTERPRET=1, checks the numbers at small sizes"
    )
    args = parser.parse_args()
    versions = {name: metadata.version(name) for name in ("torch", "triton", "liger-kernel", "cut-cross-entropy")}
    for share in map(float, args.shares.split(",")):
        inputs = make_inputs(args, share)
        for name, loss in ROWS.items():
            try:
                result = measure(loss, *inputs, args.repeats, args.device)
            except Exception as error:  # a third party's kernel: its failure is the result
                result = {"failed": f"{type(error).__name__}: {error}"}
            print(json.dumps({"name": name, "share": share, **result, "versions": versions}), flush=True)


def make_inputs(args: argparse.Namespace, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    make = {"device": args.device, "dtype": torch.bfloat16 if args.device == "cuda" else torch.float32}
    hidden = torch.randn(args.tokens, args.dim, **make).requires_grad_()
    head = (torch.randn(args.vocab, args.dim, **make) / args.dim**0.5).requires_grad_()
    targets = torch.randint(0, args.vocab, (args.tokens,), device=args.device)
    targets[torch.rand(args.tokens, device=args.device) >= share] = IGNORE
    return hidden, head, targets


if __name__ == "__main__":
    main()
