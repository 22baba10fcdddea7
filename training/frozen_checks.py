"""Run-time checks of what the frozen networks say: text features and latents (docs/run_checks.md)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.conditioner import JointEncoders, TextFeatures
from training.check_statistics import FALSE_ALARM, share_p
from training.metrics import Complaint, Reading

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)  # a code is 1 + a place
_NULL_TOKENS = 2  # at the beginning of a text; a CLIP's first is the same for all
_NULL_TOLERANCE = 1e-2  # of the null's largest feature


class TextCheck:
    """Text features: finite, of the declared types, and replaced by the null as often as declared.

    How often is measured on the features that the network hears, not on the draw: a caption counts as dropped where
    its first tokens are those of the encoder's null.

    Args:
        conditioner: The text encoders.
    """

    def __init__(self, conditioner: JointEncoders) -> None:
        self.encoders, self.conditioner = conditioner.text_encoders(), conditioner
        self._sums: list[Tensor] = []  # per micro-batch (E,): finite if all features are
        self._nulls: list[Tensor] = []  # per micro-batch (B, E): hears the null
        self._told: list[Tensor] = []  # per micro-batch (B,) on the CPU: has a caption that could be dropped
        self._types = torch.zeros(3, len(self.encoders), dtype=torch.float64)  # code of a type that should not be
        self._heads: dict[tuple[int, torch.device], Tensor] = {}
        self._hits = [0] * len(self.encoders)  # since the attempt started, over all ranks
        self._trials = 0

    @torch.no_grad()
    def add(
        self,
        features: Sequence[TextFeatures],
        captions: Sequence[str],
        weights: Tensor,
        stored: Sequence[torch.dtype] | None = None,
    ) -> None:
        """Takes what each encoder says of B captions.

        Args:
            features: By encoder, after dropout.
            captions: Texts; an empty one is no witness of dropout.
            weights: (B,) on the CPU; nor is a masked sample.
            stored: By encoder, the features' types on disk if they come from there.
        """
        nulls = []
        for number, own in enumerate(features):
            for found in (own.tokens.dtype, own.pooled.dtype):
                self._note(0, number, found, (torch.float32,))
            if stored is not None:
                self._note(2, number, stored[number], (torch.bfloat16, torch.float8_e4m3fn))
            head = self._head(number, own.tokens)  # (1, n, D)
            distance = (own.tokens[:, : head.shape[1]] - head[:, : own.tokens.shape[1]]).abs().amax((1, 2))
            nulls.append(distance <= _NULL_TOLERANCE * head.abs().amax())
        self._sums.append(torch.stack([own.tokens.sum() + own.pooled.sum() for own in features]))
        self._nulls.append(torch.stack(nulls, dim=1))
        self._told.append(torch.tensor([bool(caption.strip()) for caption in captions]) & (weights > 0))

    def _head(self, number: int, like: Tensor) -> Tensor:
        """The first tokens of an encoder's null, (1, n, D), where the features are."""
        key = number, like.device
        if key not in self._heads:
            null = self.conditioner.null_features(number)
            self._heads[key] = null.tokens[:, :_NULL_TOKENS].to(like.device)
        return self._heads[key]

    def _note(self, kind: int, number: int, found: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
        if found not in allowed:
            self._types[kind, number] = 1 + (_DTYPES.index(found) if found in _DTYPES else len(_DTYPES))

    @torch.no_grad()
    def numbers(self) -> Tensor:
        """Per encoder: is a feature not finite, how many hear the null, three type codes; then captions; float64."""
        for number, encoder in enumerate(self.encoders):
            for found in {value.dtype for value in encoder.tower.parameters() if value.is_floating_point()}:
                self._note(1, number, found, (getattr(torch, encoder.config.dtype),))
        broken = (~torch.isfinite(torch.stack(self._sums))).any(0).double()
        nulls, told = torch.cat(self._nulls), torch.cat(self._told)
        hits = (nulls & told.to(nulls.device)[:, None]).sum(0).double()
        self._sums, self._nulls, self._told = [], [], []
        return torch.cat([broken.cpu(), hits.cpu(), self._types.flatten(), told.sum()[None].double()])

    def read(self, table: Tensor) -> Reading:
        """The row's rates of dropout, and the test on those since the attempt started."""
        count = len(self.encoders)
        worst, total = table.amax(0), table.sum(0)
        broken, codes = worst[:count].bool().tolist(), worst[2 * count : -1].long().reshape(3, count)
        hits, trials = [int(n) for n in total[count : 2 * count].tolist()], int(total[-1])
        self._hits, self._trials = [a + b for a, b in zip(self._hits, hits, strict=True)], self._trials + trials
        fields: dict[str, float | dict[str, float]] = {}
        complaints = []
        rates = {}
        for number, encoder in enumerate(self.encoders):
            name, share = encoder.config.name, self._hits[number] / max(1, self._trials)
            fields[f"dropped_{name}"] = hits[number] / max(1, trials)
            rates[name] = round(share, 6)
            if broken[number] or codes[:, number].any():
                complaints.append(self._broken(number, broken[number], codes[:, number].tolist()))
            if share_p(self._hits[number], self._trials, encoder.config.dropout) < FALSE_ALARM:
                complaints.append(self._other_rate(number, share))
        return Reading(fields={**fields, "drop_rates": rates, "captions": self._trials}, complaints=complaints)

    def _broken(self, number: int, broken: bool, codes: list[int]) -> Complaint:
        config = self.encoders[number].config
        faults = ["its features are not finite"] if broken else []
        wanted = (
            "its features come as {} instead of float32",
            f"its weights are {{}} where the recipe says {config.dtype}",
            "its stored features are {} instead of bfloat16 or float8_e4m3fn",
        )
        faults += [text.format(_dtype_name(code)) for text, code in zip(wanted, codes, strict=True) if code]
        message = (
            f"text encoder {config.name}: {'; '.join(faults)}; run it in float32 or bfloat16 "
            "(T5 overflows in float16), or encode the data again if it is stored"
        )
        return Complaint(check=f"text {config.name}", message=message, fatal=True)

    def _other_rate(self, number: int, share: float) -> Complaint:
        config = self.encoders[number].config
        message = (
            f"the condition of text encoder {config.name} is dropped for {100 * share:.2f} % of {self._trials:,} "
            f"captions, the recipe says dropout {config.dropout:g}: the draw or the replacement by the null is broken; "
            "guidance will not work as the recipe means it"
        )
        return Complaint(check=f"dropout {config.name}", message=message)


def _dtype_name(code: int) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in _DTYPES]
    return [*names, "of another type"][code - 1]


class LatentsCheck:
    """Normalised latents against what the autoencoder's measured statistics promise: mean 0, deviation 1 per channel.

    Every picture counts the same, whatever its size. The mean of n pictures, each with a mean of variance at most 1, is
    off by 1 / sqrt(n) at most: with _ENOUGH of them the tolerated mean is six of that.
    """

    TOLERATED_MEAN = 0.2
    TOLERATED_STD = (0.8, 1.25)
    WORTHLESS_STD = (0.1, 10.0)
    _SOME, _ENOUGH = 256, 1024  # pictures before the run may be found worthless, or warned of
    _BROKEN_SHARE, _BROKEN_LEAST = 0.01, 10  # pictures whose latents are not finite, above which the run is worthless

    def __init__(self) -> None:
        self._moments: list[tuple[Tensor, Tensor, Tensor]] = []  # mean (B, C), mean square (B, C), weight (B,)
        self._sums = torch.zeros(0)  # sum of means, of mean squares, pictures, broken ones; since the attempt started

    @torch.no_grad()
    def add(self, latents: Tensor, weights: Tensor) -> None:
        """Takes normalised latents (B, C, h, w) and the samples' weights (B,)."""
        self._moments.append((latents.mean((2, 3)), latents.square().mean((2, 3)), weights))

    @torch.no_grad()
    def numbers(self) -> Tensor:
        """Sums of means and of mean squares over pictures, how many, and how many are not finite: (2C + 2,) float64."""
        means, squares, weights = (torch.cat(parts).double() for parts in zip(*self._moments, strict=True))
        moments = torch.cat([means, squares], dim=1)  # (n, 2C)
        finite, real = torch.isfinite(moments).all(1), weights > 0
        good = (finite & real)[:, None]
        sums = torch.where(good, moments, 0.0).sum(0)
        self._moments = []
        return torch.cat([sums, good.sum()[None], (real & ~finite).sum()[None]])

    def read(self, table: Tensor) -> Reading:
        """Mean and deviation per channel over all pictures since the attempt started."""
        total = table.sum(0)
        self._sums = self._sums + total if len(self._sums) else total
        pictures, broken = self._sums[-2:].tolist()
        mean, square = (self._sums[:-2] / max(1.0, pictures)).chunk(2)
        std = (square - mean.square()).clamp(min=0.0).sqrt()
        fields = {
            "latent_channel_mean": [round(value, 4) for value in mean.tolist()],
            "latent_channel_std": [round(value, 4) for value in std.tolist()],
        }
        complaints = [self._broken(int(broken), int(pictures + broken))] if broken else []
        if pictures:
            complaints += self._deviations(mean.tolist(), std.tolist(), int(pictures))
        return Reading(fields=fields, complaints=complaints)

    def _broken(self, broken: int, pictures: int) -> Complaint:
        fatal = broken >= self._BROKEN_LEAST and broken > self._BROKEN_SHARE * pictures
        message = (
            f"the latents of {broken:,} of {pictures:,} pictures are not finite: the autoencoder overflows or is "
            "damaged; take its artifact anew, or encode the data again if it is stored"
        )
        return Complaint(check="latents finite", message=message, fatal=fatal)

    def _deviations(self, means: list[float], stds: list[float], pictures: int) -> list[Complaint]:
        """One complaint about the channel that is furthest off."""
        worst = max(range(len(stds)), key=lambda c: max(abs(means[c]), abs(_log(stds[c]))))
        mean, std = means[worst], stds[worst]
        channel = f"channel {worst} of the normalised latents has mean {mean:.3f} and deviation {std:.3f}"
        low, high = self.WORTHLESS_STD
        if pictures >= self._SOME and not low <= std <= high:
            message = (
                f"{channel} over {pictures:,} pictures, where 0 and 1 were promised: they drown in noise or drown it; "
                "the latents are those of another autoencoder, or its statistics are wrong: measure them anew"
            )
            return [Complaint(check="latents", message=message, fatal=True)]
        low, high = self.TOLERATED_STD
        if pictures >= self._ENOUGH and (abs(mean) > self.TOLERATED_MEAN or not low <= std <= high):
            message = (
                f"{channel} over {pictures:,} pictures, where the autoencoder's artifact promises 0 and 1: it was "
                "measured on other data than this, or another scale is applied; measure the statistics on this data"
            )
            return [Complaint(check="latents", message=message)]
        return []


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))
