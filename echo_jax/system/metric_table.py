"""Every metric that runs write: its unit and meaning.

In: nothing. Out: `METRICS`. A name may have a placeholder: CLASS is a class of environment tokens, TOOL a tool, STATUS
the status of an attempt at a tool call, ENVIRONMENT an entry of a task mixture of several, K a number of samples, LOSS
a metric that your policy loss reports. Means over tokens cover the tokens that the LM head is run for
(`loss.score_all`). With `rollout.refill_tries`, the counts `rollout/submitted`, `accepted`, `rejected`, `broken` and
`filtered` are of the rollouts that are trained. What says how the policy acts, as `rollout/solve_rate`, is of those on
the step's own tasks, before groups are replaced, since a choice by rewards would bias it.
"""

import re
from typing import NamedTuple


class Metric(NamedTuple):
    unit: str
    meaning: str


_TOKENS, _NATS, _SHARE, _COUNT = "tokens", "nats per token", "share, 0 to 1", "count"

_EPISODES = {
    "submitted": Metric(_COUNT, "rollouts started"),
    "accepted": Metric(_COUNT, "scored rollouts; in training, only those with a token that some term trains"),
    "rejected": Metric(_COUNT, "rollouts without a score: the machine failed, or the task could not score them"),
    "broken": Metric(_COUNT, "rollouts with the lowest reward because their sandbox broke after a call, twice"),
    "solve_rate": Metric(_SHARE, "scored rollouts that earned their task's highest reward"),
    "reward": Metric("reward", "mean over scored rollouts"),
    "mixed_groups": Metric(_SHARE, "groups whose rollouts did not all earn the same reward"),
    "turns": Metric(_COUNT, "mean turns per rollout"),
    "tokens": Metric(_TOKENS, "mean length of a rollout, prompt included"),
    "calls_STATUS": Metric(_COUNT, "attempts at tool calls that ended with this status"),
    "imagined_observations": Metric(_SHARE, "action tokens that spell the header of an observation"),
}

_EPISODES |= {
    f"{name}_env_ENVIRONMENT": Metric(_EPISODES[name].unit, "the same for one environment of a mixture of several")
    for name in (
        *("submitted", "rejected", "solve_rate", "reward", "mixed_groups", "turns", "tokens"),
        "imagined_observations",
    )
}

METRICS = {
    "step": Metric("steps", "updates since the run began, warm start included"),
    # The loss.
    "loss/total": Metric(_NATS, "the minimised loss: the sum of all terms"),
    "loss/observation": Metric(_NATS, "the observation term, lambda included"),
    "loss/observation_weight": Metric("factor", "lambda of this step; 0 in a mode without an observation term"),
    "loss/observation_weight_env_ENVIRONMENT": Metric("factor", "that of an environment with settings of its own"),
    "loss/observation_factor": Metric("factor", "on lambda, included in it, of loss.observation_target_ratio"),
    "loss/held_ratio": Metric("ratio", "of the two terms in this step, that loss.observation_target_ratio is to hold"),
    "loss/kl": Metric(_NATS, "the KL term, its weight included"),
    "loss/entropy": Metric(_NATS, "the entropy bonus, its weight and sign included"),
    "loss/active_fraction": Metric(_SHARE, "packed tokens whose log-prob a term reads"),
    "loss/gradient_cosine": Metric("cosine", "between the gradients of the policy term and the observation term"),
    "loss/gradient_ratio": Metric("ratio", "norm of the observation term's gradient over that of the policy term"),
    # The policy term.
    "policy/loss": Metric(_NATS, "the policy term; in the warm start, cross-entropy of the demonstrated actions"),
    "policy/entropy": Metric(_NATS, "mean entropy of the trainer's distributions at the actions"),
    "policy/tokens": Metric(_TOKENS, "action tokens that the LM head was run for"),
    "policy/clip_fraction": Metric(_SHARE, "action tokens whose gradient the clip stopped or whose weight it bounded"),
    "policy/sampler_gap": Metric(_NATS, "mean |log-prob of the trainer - log-prob of the sampler| over actions"),
    "policy/sampler_gap_max": Metric("nats", "the largest such difference"),
    "policy/mismatch_kl": Metric(_NATS, "mean of ratio - log ratio - 1 over actions; ratio: trainer over sampler"),
    "policy/reference_kl": Metric(_NATS, "mean estimate of the KL to the policy that RL started from"),
    "policy/reference_tokens": Metric(_TOKENS, "action tokens in the KL"),
    "policy/control_share": Metric(_SHARE, "action tokens that end a turn or mark a call, see Renderer.control_ids"),
    "policy/control_probability": Metric(_SHARE, "mean probability of these tokens where one was sampled, as sampled"),
    "policy/gradient_norm": Metric("norm", "of the policy term's gradient alone, with loss.gradient_metrics_every"),
    "policy/LOSS": Metric("as reported", "mean over actions of a metric that your policy loss reports"),
    # The observation term.
    "observation/loss": Metric(_NATS, "the observation term without lambda"),
    "observation/ce": Metric(_NATS, "mean cross-entropy of the bodies of tool output, at loss.observation_temperature"),
    "observation/accuracy": Metric(_SHARE, "body tokens that the policy found the most likely"),
    "observation/tokens": Metric(_TOKENS, "body tokens that the LM head was run for"),
    "observation/ce_CLASS": Metric(_NATS, "the same for another class of environment tokens"),
    "observation/accuracy_CLASS": Metric(_SHARE, "the same for another class of environment tokens"),
    "observation/tokens_CLASS": Metric(_TOKENS, "the same for another class of environment tokens"),
    "observation/ce_tool_TOOL": Metric(_NATS, "the same for the bodies that one tool wrote"),
    "observation/accuracy_tool_TOOL": Metric(_SHARE, "the same for the bodies that one tool wrote"),
    "observation/tokens_tool_TOOL": Metric(_TOKENS, "the same for the bodies that one tool wrote"),
    "observation/gradient_norm": Metric("norm", "of the observation term's gradient alone"),
    # Rollouts of the step, and evaluations.
    **{f"rollout/{name}": metric for name, metric in _EPISODES.items()},
    "rollout/pass_at_K": Metric(_SHARE, "tasks solved by at least one of K rollouts, estimated without bias"),
    "rollout/pass_at_K_env_ENVIRONMENT": Metric(_SHARE, "the same for one environment of a mixture of several"),
    "rollout/offered": Metric(_COUNT, "groups sampled, with rollout.refill_tries: rollout.groups and those replaced"),
    "rollout/refilled": Metric(_COUNT, "groups replaced because their scored rollouts all earned the same reward"),
    "rollout/unfilled": Metric(_COUNT, "groups trained although their scored rollouts all earned the same reward"),
    "rollout/filtered": Metric(_COUNT, "scored rollouts without a token that some term trains"),
    "rollout/raised": Metric(_COUNT, "rollouts in which the task or a tool raised an exception; see errors.log"),
    "rollout/retried": Metric(_COUNT, "rollouts repeated because the machine failed or their sandbox broke"),
    "rollout/device_busy": Metric(_SHARE, "time/engine over the time in which a session could sample"),
    "rollout/tokens_per_second": Metric("tokens/s", "tokens of the rollouts, prompts included, over time/rollout"),
    **{f"eval/{name}": metric for name, metric in _EPISODES.items()},
    "engine/rows_idle": Metric(_SHARE, "rows of the decoding batch, counted at each token, that sampled nothing"),
    "engine/rows_idle_ended": Metric(_SHARE, "of all rows: the turn had ended within the call"),
    "engine/rows_idle_prefill": Metric(_SHARE, "of all rows: empty, while a session had ids to feed first"),
    "engine/rows_idle_tools": Metric(_SHARE, "of all rows: empty, while a session waited for a tool"),
    "engine/rows_idle_unopened": Metric(_SHARE, "of all rows: empty, and no more sessions were open"),
    "engine/decode": Metric(_TOKENS, "sampled"),
    "engine/prefill": Metric(_TOKENS, "known ids fed: prompts and tool output"),
    "engine/again": Metric(_TOKENS, "of those, fed before: their pages were taken away"),
    "engine/shared": Metric(_TOKENS, "known ids whose keys and values were found, not fed"),
    "engine/evictions": Metric(_COUNT, "sessions whose pages were taken away"),
    "engine/pages": Metric(_SHARE, "most of the pool that was held at once"),
    "eval/raised": Metric(_COUNT, "rollouts in which the task or a tool raised an exception; see errors.log"),
    "eval/pass@K": Metric(_SHARE, "held-out tasks solved by at least one of K samples, estimated without bias"),
    "eval/pass@K_stderr": Metric(_SHARE, "its standard error over tasks"),
    "eval/observation_ce": Metric(_NATS, "mean cross-entropy of tool output in fixed held-out transcripts"),
    # Packing.
    "pack/tokens": Metric(_TOKENS, "predicted tokens of the batch"),
    "pack/slots": Metric(_TOKENS, "slots of the rows in use"),
    "pack/efficiency": Metric(_SHARE, "pack/tokens over pack/slots"),
    "pack/pairs": Metric(_COUNT, "pairs of a token and a token it attends to"),
    # The update.
    "train/learning_rate": Metric("rate", "of this update; the mean of several updates on one batch"),
    "train/gradient_norm": Metric("norm", "of the whole gradient, before clipping"),
    "train/update_norm": Metric("norm", "of the parameter change"),
    "train/tokens_per_second": Metric("tokens/s", "pack/tokens over time/train"),
    "train/flops_per_second": Metric("FLOP/s", "analytic FLOPs of the update on real tokens, over time/train"),
    "train/mfu": Metric(_SHARE, "train/flops_per_second over the peak of the devices, if known"),
    # Seconds.
    "time/step": Metric("s", "the whole step, without evaluations"),
    "time/rollout": Metric("s", "sampling and tools"),
    "time/engine": Metric("s", "of a collection, inside the engine; mean over processes, as the next"),
    "time/tools": Metric("s", "of a collection, in which every open session waited for tools"),
    "time/train": Metric("s", "packing and the update"),
    "time/evaluate": Metric("s", "evaluations of this step"),
}


def describe(name: str, placeholders: dict[str, str]) -> Metric | None:
    """Returns the metric of this name; None if the table lacks it.

    Args:
      placeholders: placeholder -> regular expression of its possible values.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, metric in METRICS.items():
        expression = re.escape(pattern)
        for placeholder, choices in placeholders.items():
            expression = expression.replace(placeholder, f"(?:{choices})")
        if re.fullmatch(expression, name):
            return metric
    return None
