"""The papers' equations in float64 numpy, written as loops over sequences: no packing, no masks, no JAX.

It shares no code with the package and reads trajectories by their plain fields (roles as numbers). A sequence's logits
are an input; everything after them is computed here, including the gradient by the logits, which a test can
backpropagate through the model. Roles: 3 action, 4 body, 5 boilerplate, 6 truncation, 7 feedback, 8 warning,
9 user, 10 system.
"""

import numpy as np

ACTION = 3
ENVIRONMENT = (4, 5, 6, 7, 8, 9, 10)


def log_softmax(logits):
    top = logits.max()
    return logits - top - np.log(np.exp(logits - top).sum())


def advantages(trajectories, estimator, *, ddof=0, epsilon=1e-6, penalty=None):
    """Returns one number per trajectory: GRPO (group's or batch's std), Dr. GRPO, MaxRL, RLOO or the plain reward; a
    rollout's branches are one sample.

    `penalty`: weights of output, input, turns, and the largest number of tokens and turns.
    """
    result = []

    def shaped(t):
        if penalty is None:
            return t.reward
        output, input, turns, max_tokens, max_turns = penalty
        branches = [o for o in trajectories if (o.group, o.rollout) == (t.group, t.rollout)]
        roles = [o.role[p] for o in branches for p in range(max(1, o.shared), len(o.ids))]
        cost = output * sum(r == ACTION for r in roles) / max_tokens
        cost += input * sum(r in ENVIRONMENT for r in roles) / max_tokens
        cost += turns * max(o.turns for o in branches) / max_turns
        raw = {o.rollout: o.reward for o in trajectories if o.group == t.group and o.scored}
        return t.reward - min(max(sum(raw.values()) / len(raw), 0.0), 1.0) * cost  # rewards are from 0 to 1

    def spread(values):
        mean = sum(values) / len(values)
        return (sum((v - mean) ** 2 for v in values) / (len(values) - ddof)) ** 0.5 if len(values) > ddof else 0.0

    everyone = list({(o.group, o.rollout): shaped(o) for o in trajectories if o.scored}.values())
    for t in trajectories:
        rewards = {o.rollout: shaped(o) for o in trajectories if o.group == t.group and o.scored}
        values = list(rewards.values())
        if not t.scored:
            result.append(0.0)
        elif estimator == "reward":
            result.append(shaped(t))
        elif estimator == "leave_one_out":
            others = [r for rollout, r in rewards.items() if rollout != t.rollout]
            result.append(shaped(t) - sum(others) / len(others) if others else 0.0)
        else:
            mean = sum(values) / len(values)
            if estimator == "mean" and mean <= 0:
                result.append(0.0)
                continue
            divisor = {"group": spread(values) + epsilon, "batch": spread(everyone) + epsilon, "mean": mean}
            result.append((shaped(t) - mean) / divisor.get(estimator, 1.0))
    return result


def surrogate(policy, ratio, logp, before, advantage, low, high, dual):
    """Returns (loss, d loss / d log p) of one token or, for GSPO, of one rollout's ratio."""
    if policy in ("dppo", "ipo"):  # prime-rl's defaults
        moved = np.exp(logp) - np.exp(before)
        masked = abs(moved) > 0.1 if policy == "ipo" else moved > 0.2 if advantage > 0 else moved < -0.2
        kept = 0.0 if masked else ratio * advantage
        return -kept + 1e-3 * (logp - before) ** 2, -kept + 2e-3 * (logp - before)
    if policy == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
        return -advantage * 4 / tau * gate, -advantage * 4 * gate * (1 - gate) * ratio
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
    class_weights=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    zero_variance_filter=False,
    mask_overlong=False,
    use_policy=True,
    old=None,
    cap=0.0,
    reference=None,
    kl_weight=0.0,
    kl_estimator="k3",
    observation_clip=1.0,
    advantage_options=(),
    correction="token_truncate",
    kl_clamp=0.0,
    entropy_weight=0.0,
    observation_temperature=1.0,
    observation_epsilon=0.0,
    environments=None,
):
    """Returns (loss, [d loss / d logits of each trajectory]).

    Args:
      logits: float64 [T - 1, V] of each trajectory: row t scores token t + 1.
      environments: environment -> arguments that differ for its trajectories, of `policy`, `advantage`, `weight`,
        `temperature`, `class_weights`, `use_policy`, `use_observations`, `kl_weight`, `entropy_weight`.
      old: old log-probs [T] of each trajectory, for the ratio; the sampler's if None.
      reference: log-probs [T] of each trajectory under the reference of the KL.
    """
    gradients = [np.zeros_like(z) for z in logits]
    run = dict(policy=policy, advantage=advantage, weight=weight, temperature=temperature, class_weights=class_weights)
    run |= dict(use_policy=use_policy, use_observations=True, kl_weight=kl_weight, entropy_weight=entropy_weight)
    settings = [run | (environments or {}).get(t.environment, {}) for t in trajectories]
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
        first = branches(rollout)[0]
        t = trajectories[first]
        if not t.scored and settings[first]["policy"] != "imitation":
            return False
        if mask_overlong and t.outcome in ("max_turns", "max_tokens"):
            return False
        rewards = {o.reward for o in trajectories if o.group == t.group and o.scored}
        return settings[first]["use_policy"] and not (zero_variance_filter and len(rewards) < 2)

    def score(i, p, temperature):
        """Returns log p of token p, its gradient by the logits, the entropy and its gradient."""
        row = log_softmax(logits[i][p - 1] / temperature)
        slope = -np.exp(row)
        slope[trajectories[i].ids[p]] += 1.0
        entropy = -(np.exp(row) * row).sum()
        return row[trajectories[i].ids[p]], slope / temperature, entropy, -np.exp(row) * (row + entropy) / temperature

    # The policy term: a list of (coefficient, rollout, trajectory, position), without the batch's denominator.
    all_advantages = [0.0] * len(trajectories)
    of = [t.environment if t.environment in (environments or {}) else "" for t in trajectories]
    for environment in set(of):
        members = [i for i in range(len(trajectories)) if of[i] == environment]
        estimator = settings[members[0]]["advantage"]
        found = advantages([trajectories[i] for i in members], estimator, **dict(advantage_options))
        for i, value in zip(members, found, strict=True):
            all_advantages[i] = value
    total, denominator, parts = 0.0, 0.0, []
    for rollout in rollouts:
        if not trained(rollout):
            continue
        count = sum(len(places(i, (ACTION,))) for i in branches(rollout))
        per_token = {"sequence": 1 / max(count, 1), "token": 1.0, "constant": 1 / max(constant, 1)}[policy_normalizer]
        denominator += count if policy_normalizer == "token" else 1
        for i in branches(rollout):
            parts += [(per_token, rollout, i, p) for p in places(i, (ACTION,))]
    policy_term = 0.0
    for coefficient, rollout, i, p in parts:
        mine = settings[i]
        temperature = mine["temperature"]
        logp, slope, entropy, entropy_slope = score(i, p, temperature)
        was = lambda j, q: (trajectories[j].logprob if old is None else old[j])[q]  # noqa: E731
        before = was(i, p)
        own = [(j, q) for _, other, j, q in parts if other == rollout]
        if mine["policy"] == "gspo":
            logs = [score(j, q, temperature)[0] - was(j, q) for j, q in own]
            ratio = np.exp(sum(logs) / len(logs))
        else:
            ratio = np.exp(logp - before)
        value, by_logp = surrogate(mine["policy"], ratio, logp, before, all_advantages[i], low, high, dual)
        importance = 1.0
        if cap:
            whole = own if correction.startswith("sequence") else [(i, p)]
            importance = np.exp(sum(was(j, q) - trajectories[j].logprob[q] for j, q in whole))
            if importance > cap:
                importance = cap if correction.endswith("truncate") else 0.0
        coefficient = coefficient / denominator
        policy_term += coefficient * importance * value
        if mine["policy"] == "gspo":  # the rollout's ratio depends on each of its tokens
            for j, q in own:
                gradients[j][q - 1] += coefficient * importance * by_logp / len(own) * score(j, q, temperature)[1]
        else:
            gradients[i][p - 1] += coefficient * importance * by_logp * slope
        if mine["kl_weight"]:
            value, by_logp = kl(kl_estimator, logp, reference[i][p])
            if kl_clamp and abs(value) > kl_clamp:
                value, by_logp = np.sign(value) * kl_clamp, 0.0
            policy_term += mine["kl_weight"] * coefficient * value
            gradients[i][p - 1] += mine["kl_weight"] * coefficient * by_logp * slope
        policy_term -= mine["entropy_weight"] * coefficient * entropy
        gradients[i][p - 1] -= mine["entropy_weight"] * coefficient * entropy_slope
    total += policy_term

    # The observation term.
    def class_of(i):
        return dict(zip(ENVIRONMENT, settings[i]["class_weights"], strict=True))

    def chosen(rollout):
        weights = class_of(branches(rollout)[0])
        return [role for role in ENVIRONMENT if weights[role] > 0]

    denominator = 0.0
    for rollout in rollouts:
        selected = sum(len(places(i, chosen(rollout))) for i in branches(rollout))
        denominator += selected if observation_normalizer == "token" else 1
    for rollout in rollouts:
        environment = sum(len(places(i, ENVIRONMENT)) for i in branches(rollout))
        selected = sum(len(places(i, chosen(rollout))) for i in branches(rollout))
        lengths = {"observation": environment + observation_epsilon, "selected": selected + observation_epsilon}
        z = (lengths | {"token": 1, "constant": constant})[observation_normalizer]
        for i in branches(rollout):
            if not settings[i]["use_observations"]:
                continue
            for p in places(i, chosen(rollout)):
                logp, slope, _, _ = score(i, p, observation_temperature)
                factor = settings[i]["weight"] * class_of(i)[trajectories[i].role[p]] / max(z, 1) / denominator
                if logp < np.log(observation_clip):
                    gradients[i][p - 1] -= factor * slope
                total -= factor * min(logp, np.log(observation_clip))
    return total, gradients
