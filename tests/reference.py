"""The papers' equations in float64 numpy, written as loops over sequences: no packing, no masks, no JAX.

It shares no code with the package and reads trajectories by their plain fields (roles as numbers). A sequence's logits
are an input; everything after them is computed here, including the gradient by the logits, which a test can
backpropagate through the model. Roles: 3 action, 4 body, 5 boilerplate, 6 truncation, 7 feedback, 8 warning.
"""

import numpy as np

ACTION = 3
ENVIRONMENT = (4, 5, 6, 7, 8)


def log_softmax(logits):
    top = logits.max()
    return logits - top - np.log(np.exp(logits - top).sum())


def advantages(trajectories, estimator):
    """Returns one number per trajectory: GRPO, Dr. GRPO, RLOO or the plain reward; a rollout's branches are one
    sample."""
    result = []
    for t in trajectories:
        rewards = {o.rollout: o.reward for o in trajectories if o.group == t.group and o.scored}
        values = list(rewards.values())
        if not t.scored:
            result.append(0.0)
        elif estimator == "reward":
            result.append(t.reward)
        elif estimator == "leave_one_out":
            others = [r for rollout, r in rewards.items() if rollout != t.rollout]
            result.append(t.reward - sum(others) / len(others) if others else 0.0)
        else:
            mean = sum(values) / len(values)
            std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
            result.append((t.reward - mean) / (std + 1e-6 if estimator == "group" else 1.0))
    return result


def surrogate(policy, ratio, logp, advantage, low, high, dual):
    """Returns (loss, d loss / d log p) of one token or, for GSPO, of one sequence ratio."""
    if policy == "imitation":
        return -logp, -1.0
    if policy in ("rloo", "reinforce"):
        return -advantage * logp, -advantage
    bounded = min(max(ratio, 1 - low), 1 + high)
    if policy == "cispo":
        return -bounded * advantage * logp, -bounded * advantage
    free, held = ratio * advantage, bounded * advantage
    value, slope = (free, ratio * advantage) if free <= held else (held, 0.0)
    if dual and advantage < 0 and value < dual * advantage:
        value, slope = dual * advantage, 0.0
    return -value, -slope


def kl(estimator, logp, reference):
    """Returns (estimate, d estimate / d log p)."""
    if estimator == "k1":
        return logp - reference, 1.0
    if estimator == "k2":
        return (logp - reference) ** 2 / 2, logp - reference
    return np.exp(reference - logp) - 1 - (reference - logp), 1 - np.exp(reference - logp)


def loss(
    trajectories,
    logits,
    *,
    policy="grpo",
    advantage="group",
    policy_normalizer="sequence",
    observation_normalizer="observation",
    weight=0.05,
    temperature=1.0,
    low=0.2,
    high=0.2,
    dual=0.0,
    constant=1.0,
    class_weights=(1.0, 0.0, 0.0, 0.0, 0.0),
    zero_variance_filter=False,
    mask_overlong=False,
    use_policy=True,
    old=None,
    cap=0.0,
    reference=None,
    kl_weight=0.0,
    kl_estimator="k3",
    observation_clip=1.0,
):
    """Returns (loss, [d loss / d logits of each trajectory]).

    Args:
      logits: float64 [T - 1, V] of each trajectory: row t scores token t + 1.
      old: old log-probs [T] of each trajectory, for the ratio; the sampler's if None.
      reference: log-probs [T] of each trajectory under the reference of the KL.
    """
    gradients = [np.zeros_like(z) for z in logits]
    rollouts = []
    for t in trajectories:
        if (t.group, t.rollout) not in rollouts:
            rollouts.append((t.group, t.rollout))

    def places(i, roles):
        t = trajectories[i]
        return [p for p in range(max(1, t.shared), len(t.ids)) if t.role[p] in roles]

    def branches(rollout):
        return [i for i, t in enumerate(trajectories) if (t.group, t.rollout) == rollout]

    def trained(rollout):
        t = trajectories[branches(rollout)[0]]
        if not t.scored and policy != "imitation":
            return False
        if mask_overlong and t.outcome in ("max_turns", "max_tokens"):
            return False
        rewards = {o.reward for o in trajectories if o.group == t.group and o.scored}
        return use_policy and not (zero_variance_filter and len(rewards) < 2)

    def score(i, p, temperature):
        """Returns log p of token p, and its gradient by the logits."""
        row = log_softmax(logits[i][p - 1] / temperature)
        slope = -np.exp(row)
        slope[trajectories[i].ids[p]] += 1.0
        return row[trajectories[i].ids[p]], slope / temperature

    # The policy term: a list of (coefficient, trajectory, position), without the batch's denominator.
    all_advantages = advantages(trajectories, advantage)
    total, denominator, parts = 0.0, 0.0, []
    for rollout in rollouts:
        if not trained(rollout):
            continue
        count = sum(len(places(i, (ACTION,))) for i in branches(rollout))
        per_token = {"sequence": 1 / max(count, 1), "token": 1.0, "constant": 1 / max(constant, 1)}[policy_normalizer]
        denominator += count if policy_normalizer == "token" else 1
        for i in branches(rollout):
            parts += [(per_token, i, p) for p in places(i, (ACTION,))]
    policy_term = 0.0
    for coefficient, i, p in parts:
        logp, slope = score(i, p, temperature)
        before = (trajectories[i].logprob if old is None else old[i])[p]
        own = [q for _, j, q in parts if j == i]
        if policy == "gspo":
            logs = [score(i, q, temperature)[0] - (trajectories[i].logprob if old is None else old[i])[q] for q in own]
            ratio = np.exp(sum(logs) / len(logs))
        else:
            ratio = np.exp(logp - before)
        value, by_logp = surrogate(policy, ratio, logp, all_advantages[i], low, high, dual)
        importance = min(np.exp(before - trajectories[i].logprob[p]), cap) if cap else 1.0
        coefficient = coefficient / denominator
        policy_term += coefficient * importance * value
        if policy == "gspo":  # the sequence's ratio depends on each of its tokens
            for q in own:
                gradients[i][q - 1] += coefficient * importance * by_logp / len(own) * score(i, q, temperature)[1]
        else:
            gradients[i][p - 1] += coefficient * importance * by_logp * slope
        if kl_weight:
            value, by_logp = kl(kl_estimator, logp, reference[i][p])
            policy_term += kl_weight * coefficient * value
            gradients[i][p - 1] += kl_weight * coefficient * by_logp * slope
    total += policy_term

    # The observation term.
    class_of = dict(zip(ENVIRONMENT, class_weights, strict=True))
    chosen = [role for role in ENVIRONMENT if class_of[role] > 0]
    denominator = 0.0
    for rollout in rollouts:
        selected = sum(len(places(i, chosen)) for i in branches(rollout))
        denominator += selected if observation_normalizer == "token" else 1
    for rollout in rollouts:
        environment = sum(len(places(i, ENVIRONMENT)) for i in branches(rollout))
        selected = sum(len(places(i, chosen)) for i in branches(rollout))
        z = {"observation": environment, "selected": selected, "token": 1, "constant": constant}[observation_normalizer]
        for i in branches(rollout):
            for p in places(i, chosen):
                logp, slope = score(i, p, 1.0)
                factor = weight * class_of[trajectories[i].role[p]] / max(z, 1) / denominator
                if logp < np.log(observation_clip):
                    gradients[i][p - 1] -= factor * slope
                total -= factor * min(logp, np.log(observation_clip))
    return total, gradients
