"""Run-time checks of the diffusion stage, always on: is what is trained what was declared? (docs/run_checks.md)

Between rows nothing is copied to the host: small tensors are kept, or sums grow on the device. Every row they travel
between the ranks in one exchange with the scalars (`training.metrics.Parts`), and every rank draws the same
conclusion, so that an error ends all of them. Nothing here has any part in the training's own numbers.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from models.conditioner import JointEncoders
from models.diffusion import DiffusionConfig
from models.dit import DiTConfig, dit_flops
from training.check_statistics import FALSE_ALARM, histogram_p, time_edges, time_shares
from training.frozen_checks import LatentsCheck, TextCheck
from training.metrics import Complaint, Reading
from training.throughput import Pace

COMPARED = 8  # samples per rank and row whose noise is compared
TIME_BINS = 32  # of equal probability, for the test
PLAIN_BINS = 20  # of equal width, for the eye
LOSS_BINS = 10  # of equal width
_LEAST_TIMES = 4  # times per rank and row below which equal ones may be chance (float32 times have 23 bits)


def fingerprints(values: Tensor) -> Tensor:
    """A 64-bit number per row of (B, n) float32 values, the same for equal rows alone but for a chance of 2^-64 or so.

    The sum of the values' bits times odd multipliers that a mixing function makes of their places.
    """
    bits = values.float().contiguous().view(torch.int32).long()
    factors = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x1E3779B97F4A7C15
    factors = (factors ^ (factors >> 29)) * 0x3F58476D1CE4E5B9
    return (bits * ((factors ^ (factors >> 32)) | 1)).sum(1)


class DrawsCheck:
    """Noise and sample numbers of each row's first micro-batch: no two samples of the run may share either."""

    def __init__(self) -> None:
        self._first: tuple[Tensor, Tensor] | None = None  # numbers (n,) and fingerprints (n,) of this row
        self._last: set[int] = set()  # fingerprints of the last row, over all ranks
        self._compared = 0

    @torch.no_grad()
    def add(self, numbers: Tensor, noise: Tensor) -> None:
        """Takes sample numbers (B,) and their noise (B, ...)."""
        if self._first is None:
            few = min(COMPARED, len(numbers))
            self._first = numbers[:few].to(noise.device), fingerprints(noise[:few].flatten(1))

    def numbers(self) -> Tensor:
        """Sample numbers, then fingerprints: 2n int64."""
        assert self._first is not None, "a row without a micro-batch"
        return torch.cat(self._first)

    def read(self, table: Tensor) -> Reading:
        """Compares all samples of all ranks, and their noise with that of the last row."""
        self._first = None
        few = table.shape[1] // 2
        numbers, prints = ([row.tolist() for row in half] for half in (table[:, :few], table[:, few:]))
        self._compared += table.shape[0] * few
        complaint = self._complaint(numbers, prints)
        self._last = {value for row in prints for value in row}
        return Reading(fields={"noise_compared": self._compared}, complaints=[complaint] if complaint else [])

    def _complaint(self, numbers: list[list[int]], prints: list[list[int]]) -> Complaint | None:
        if ranks := alike(numbers):
            message = (
                f"{ranks} train on the same samples: the loader gave them one share of the data; "
                "every process needs a RANK of its own, and all of them the same WORLD_SIZE"
            )
            return Complaint(check="samples", message=message, fatal=True)
        if ranks := alike(prints):
            message = (
                f"{ranks} drew the same noise for different samples: their seed is the same and neither rank nor "
                "sample number is in the key; noise must be a function of (seed, sample number)"
            )
        elif any(len(set(row)) < len(row) for row in prints):
            message = "samples of one micro-batch have the same noise: it was drawn once and repeated over the batch"
        elif self._last & {value for row in prints for value in row}:
            message = (
                "the noise of the last row came again: it does not change from step to step; "
                "noise must be a function of (seed, sample number)"
            )
        else:
            return None
        return Complaint(check="noise", message=message, fatal=True)


def alike(rows: Sequence[Sequence[int]]) -> str:
    """The first ranks, if any, that have a number in common: "ranks 0 and 1"."""
    sets = [set(row) for row in rows]
    if sum(map(len, sets)) == len(set().union(*sets)):  # the usual case, in linear time
        return ""
    first, second = next((a, b) for a, b in combinations(range(len(sets)), 2) if sets[a] & sets[b])
    return f"ranks {first} and {second}"


class TimesCheck:
    """Times against the declared density, and the loss over time.

    Args:
        config: The diffusion.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self._times: dict[int | None, list[Tensor]] = {}  # by what the shift depends on
        self._losses: list[tuple[Tensor, Tensor, Tensor]] = []  # t, loss, weight
        self._declared: dict[int | None, tuple[list[float], list[float], list[float]]] = {}
        self._counts = [0.0] * TIME_BINS  # since the attempt started, over all ranks
        self._expected = [0.0] * TIME_BINS

    def add(self, t: Tensor, losses: Tensor, weights: Tensor, tokens: int) -> None:
        """Takes times (B,), the losses at them (B,), the samples' weights (B,), and the picture tokens of the batch."""
        shift = tokens if self.config.base_tokens is not None else None
        self._times.setdefault(shift, []).append(t)
        self._losses.append((t, losses.detach(), weights))

    @torch.no_grad()
    def numbers(self) -> Tensor:
        """Fingerprint, then counts and expectations of both histograms, then sums and counts of the loss; as int64."""
        t, losses, weights = (torch.cat(parts) for parts in zip(*self._losses, strict=True))
        counts = torch.zeros(2, TIME_BINS + PLAIN_BINS, dtype=torch.float64)
        for tokens, times in self._times.items():
            self._count(counts, torch.cat(times).double(), tokens)
        place = _bins(t.double(), LOSS_BINS)
        good = (weights > 0) & torch.isfinite(losses)
        chosen = (place == torch.arange(LOSS_BINS, device=t.device)[:, None]) & good  # (LOSS_BINS, n)
        sums = torch.where(chosen, losses.double(), 0.0).sum(1)
        found = torch.cat([counts.flatten(), sums.cpu(), chosen.sum(1).double().cpu()])
        own = fingerprints(t[None]) if len(t) >= _LEAST_TIMES else torch.zeros(1, dtype=torch.int64)
        self._times, self._losses = {}, []
        return torch.cat([own.cpu(), found.view(torch.int64)])

    def _count(self, counts: Tensor, t: Tensor, tokens: int | None) -> None:
        if tokens not in self._declared:
            edges, shares = time_edges(self.config, TIME_BINS, tokens)
            shares += [0.0] * (TIME_BINS - len(shares))
            self._declared[tokens] = edges, shares, time_shares(self.config, PLAIN_BINS, tokens)
        edges, shares, plain = self._declared[tokens]
        inner = torch.tensor(edges, dtype=torch.float64, device=t.device)
        counts[0, :TIME_BINS] += torch.bincount(torch.bucketize(t, inner), minlength=TIME_BINS).cpu()
        counts[0, TIME_BINS:] += torch.bincount(_bins(t, PLAIN_BINS), minlength=PLAIN_BINS).cpu()
        counts[1] += len(t) * torch.tensor(shares + plain, dtype=torch.float64)

    def read(self, table: Tensor) -> Reading:
        """The row's histogram and losses, and the test on all times since the attempt started."""
        found = table[:, 1:].contiguous().view(torch.float64).sum(0)
        histograms, sums, filled = found.split([2 * (TIME_BINS + PLAIN_BINS), LOSS_BINS, LOSS_BINS])
        counts, expected = histograms.reshape(2, -1).tolist()
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=False)]
        self._expected = [a + b for a, b in zip(self._expected, expected, strict=False)]
        p = histogram_p(self._counts, self._expected)
        means = [s / n if n else None for s, n in zip(sums.tolist(), filled.tolist(), strict=True)]
        fields = {
            "t_histogram": [int(count) for count in counts[TIME_BINS:]],
            "t_declared": [round(share, 2) for share in expected[TIME_BINS:]],
            "t_p_value": p,
            "loss_by_t": means,
        }
        return Reading(fields=fields, complaints=[*self._same(table[:, 0].tolist()), *self._deviation(p)])

    def _same(self, prints: list[int]) -> list[Complaint]:
        ranks = alike([[value] if value else [] for value in prints])
        message = (
            f"{ranks} drew the same times: their seed is the same and neither rank nor sample number is in the key; "
            "t must be a function of (seed, sample number)"
        )
        return [Complaint(check="times", message=message, fatal=True)] if ranks else []

    def _deviation(self, p: float | None) -> list[Complaint]:
        if p is None or p >= FALSE_ALARM:
            return []
        message = (
            f"the {int(sum(self._counts)):,} times since the start do not follow the declared density "
            f"{describe(self.config)} (p = {max(p, 1e-300):.0e}): the sampler of t is broken, "
            "or the density is used as a weight"
        )
        return [Complaint(check="t", message=message)]


def describe(config: DiffusionConfig) -> str:
    """The density as a recipe says it: "logit_normal(0, 1)", with its shift."""
    sizes = {"logit_normal": f"({config.logit_mean:g}, {config.logit_std:g})", "mode": f"({config.mode_scale:g})"}
    text = config.time_density + sizes.get(config.time_density, "")
    if config.base_tokens is not None:
        return f"{text}, shifted from {config.base_tokens} tokens"
    return text if config.shift == 1.0 else f"{text}, shifted by {config.shift:g}"


def _bins(t: Tensor, count: int) -> Tensor:
    """The equally wide bin of [0, 1] that each time lies in; what is outside or no number lies in the last."""
    return torch.where((t >= 0.0) & (t < 1.0), t * count, count - 1).long()


class DiffusionChecks:
    """What `diffusion_step` shows of a micro-batch, handed to the parts of the row.

    Args:
        diffusion: As declared.
        conditioner: The text encoders.
        dit: The network's sizes.
        pace: Counts operations.
    """

    def __init__(self, diffusion: DiffusionConfig, conditioner: JointEncoders, dit: DiTConfig, pace: Pace) -> None:
        self.draws, self.times = DrawsCheck(), TimesCheck(diffusion)
        self.text, self.latents = TextCheck(conditioner), LatentsCheck()
        self.parts = (self.draws, self.times, self.text, self.latents)
        self._dit, self._pace = dit, pace

    def network(self, samples: int, image_tokens: int, text_tokens: int) -> None:
        """Counts a training step of the network: forward, and twice as much backward."""
        self._pace.flops += 3 * samples * dit_flops(self._dit, image_tokens, text_tokens)
