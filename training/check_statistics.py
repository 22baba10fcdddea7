"""When is a measured frequency off what was declared? The mathematics of the run-time checks (docs/run_checks.md).

The checks look at counts that grow since the attempt started, again at every row, so a threshold must hold over a
whole run and not for one look. Both tests below give a probability p that a true run shows such a deviation, and
`FALSE_ALARM` is far below one over the number of looks: a million rows with ten tests each complain falsely with a
probability of at most 1e-5. What is really broken deviates by a constant share, so that p falls exponentially with
the number of samples and is below the threshold after hundreds or thousands of them.
"""

import math
from statistics import NormalDist

import torch

from models.diffusion import DiffusionConfig

FALSE_ALARM = 1e-12  # p below which a deviation is no chance
_LEAST_EXPECTED = 20.0  # samples per bin; bins of fewer are merged, or the statistic is not yet chi-squared
_NEAR_ONE = 1.0 - 1e-4  # nearer to 1 float32 times are too coarse to be told apart
_BISECTIONS = 60


def time_quantile(config: DiffusionConfig, share: float, tokens: int | None = None) -> float:
    """The time below which a share of the declared density of training times lies.

    In the papers' own forms and in plain Python, so that a slip in models.time_density is not repeated here.

    Args:
        config: The diffusion.
        share: In (0, 1).
        tokens: Picture tokens of the network; read if the shift depends on them.

    Returns:
        t in [0, 1].
    """
    if config.time_density == "uniform":
        t = share
    elif config.time_density == "logit_normal":  # arXiv:2403.03206, Eq. 19: log(t / (1 - t)) is N(m, s^2)
        t = _sigmoid(NormalDist(config.logit_mean, config.logit_std).inv_cdf(share))
    elif config.time_density == "mode":  # arXiv:2403.03206, Eq. 20, which falls with u
        u = 1.0 - share
        t = 1.0 - u - config.mode_scale * (math.cos(math.pi * u / 2.0) ** 2 - 1.0 + u)
    else:  # cosmap, arXiv:2403.03206, sec. 3.1
        t = 1.0 - 1.0 / (math.tan(math.pi * share / 2.0) + 1.0)
    shift = config.shift if config.base_tokens is None else math.sqrt((tokens or 0) / config.base_tokens)
    return shift * t / (1.0 + (shift - 1.0) * t)  # arXiv:2403.03206, Eq. 23


def time_edges(config: DiffusionConfig, bins: int, tokens: int | None = None) -> tuple[list[float], list[float]]:
    """Edges between bins of equal probability under the declared density, and the bins' probabilities.

    Edges so near to 1 that float32 times cannot be told apart are left out: the last bin is then the wider one.

    Returns:
        Ascending inner edges, at most bins - 1; and as many probabilities and one more, whose sum is 1.
    """
    shares = [number / bins for number in range(1, bins)]
    edges = [(time_quantile(config, share, tokens), share) for share in shares]
    kept = [(edge, share) for edge, share in edges if edge <= _NEAR_ONE]
    ends = [0.0, *(share for _, share in kept), 1.0]
    return [edge for edge, _ in kept], [high - low for low, high in zip(ends, ends[1:], strict=False)]


def time_shares(config: DiffusionConfig, bins: int, tokens: int | None = None) -> list[float]:
    """Probability of each of so many equally wide bins of [0, 1] under the declared density."""
    ends = [0.0, *(_share_below(config, number / bins, tokens) for number in range(1, bins)), 1.0]
    return [high - low for low, high in zip(ends, ends[1:], strict=False)]


def histogram_p(counts: list[float], expected: list[float]) -> float | None:
    """Probability that counts as uneven as these, or more so, come from what is expected.

    The likelihood-ratio statistic G = 2 sum O log(O / E) against the chi-squared distribution, with Williams'
    correction. In the far tail, where the threshold lies, G has the exponent of the multinomial distribution itself;
    Pearson's statistic would give too many false alarms there. Strata only make counts more even, and the upper tail
    alone is asked.

    Args:
        counts: Per bin.
        expected: Per bin, with the same sum.

    Returns:
        p, or None while fewer than two bins may be expected to be filled.
    """
    observed, awaited = _merged(counts, expected)
    if len(observed) < 2:
        return None
    pairs = zip(observed, awaited, strict=True)
    statistic = 2.0 * sum(count * math.log(count / mean) for count, mean in pairs if count > 0)
    freedom = len(observed) - 1
    # Williams 1976: E[G] is that of chi-squared after division by this.
    inverse = sum(1.0 / mean for mean in awaited)
    correction = 1.0 + (sum(awaited) * inverse - 1.0) / (6.0 * sum(awaited) * freedom)
    half = torch.tensor([freedom / 2.0, max(0.0, statistic) / correction / 2.0], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def share_p(hits: int, trials: int, probability: float) -> float:
    """An upper bound of the probability that a share is as far off as hits / trials is: 2 exp(-n KL(measured, p)).

    The Chernoff bound for a binomial count, both tails; it holds for every n and for p = 0 and 1.

    Args:
        hits: How often it happened.
        trials: Out of how many, at least 0.
        probability: That each does, in [0, 1].
    """
    if trials == 0:
        return 1.0
    measured, divergence = hits / trials, 0.0
    for found, declared in ((measured, probability), (1.0 - measured, 1.0 - probability)):
        if found > 0.0:
            divergence += found * math.log(found / declared) if declared > 0.0 else math.inf
    return min(1.0, 2.0 * math.exp(-trials * max(0.0, divergence)))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))


def _share_below(config: DiffusionConfig, t: float, tokens: int | None) -> float:
    """The distribution function, by bisection of its inverse: the mode density has no closed form."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if not 0.0 < middle < 1.0:
            break
        low, high = (middle, high) if time_quantile(config, middle, tokens) < t else (low, middle)
    return (low + high) / 2.0


def _merged(counts: list[float], expected: list[float]) -> tuple[list[float], list[float]]:
    """Neighbouring bins together until enough is expected of each; the rest goes to the last."""
    observed, awaited = [0.0], [0.0]
    for count, mean in zip(counts, expected, strict=True):
        if awaited[-1] >= _LEAST_EXPECTED:
            observed.append(0.0)
            awaited.append(0.0)
        observed[-1] += count
        awaited[-1] += mean
    if len(awaited) > 1 and awaited[-1] < _LEAST_EXPECTED:
        observed[-2:] = [sum(observed[-2:])]
        awaited[-2:] = [sum(awaited[-2:])]
    return observed, awaited
