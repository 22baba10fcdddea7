"""Every run-time check against the fault it is there for, in the real step; and silence where nothing is wrong."""

import itertools
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import training.diffusion_step as step_module
from data.batch import Batch
from models import prng
from models.autoencoder import Autoencoder
from models.diffusion import DiffusionConfig
from models.dit import DiT, DiTConfig, dit_flops
from models.text_encoder import Conditioner
from models.time_density import sample_t, time_uniforms
from tests.helpers import tiny
from training.diffusion_step import diffusion_step
from training.frozen_checks import LatentsCheck
from training.metrics import Complaint, Meter, Parts, Reading
from training.run_checks import DiffusionChecks, DrawsCheck, TimesCheck, alike, fingerprints
from training.throughput import Pace

CPU = torch.device("cpu")
MICRO, WORLD, SEED = 16, 2, 7


class Ranks:
    """Ranks as threads: `read` gives what each of them says of its parts."""

    def __init__(self, *parts: tuple) -> None:
        self._barrier = threading.Barrier(len(parts))
        self._words: list[Tensor] = [torch.empty(0)] * len(parts)
        self.ranks = [Parts(lambda words, rank=rank: self._all(rank, words), CPU) for rank in range(len(parts))]
        for rank, own in zip(self.ranks, parts, strict=True):
            rank.add(*own)

    def _all(self, rank: int, words: Tensor) -> Tensor:
        self._words[rank] = words
        self._barrier.wait(10)
        return torch.stack(self._words)

    def read(self) -> Reading:
        """One row; all ranks draw the same conclusion."""
        found: list[Reading | None] = [None] * len(self.ranks)

        def run(rank: int) -> None:
            found[rank] = self.ranks[rank].read()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first = found[0]
        assert first is not None and all(other is not None for other in found)
        assert all(other.complaints == first.complaints for other in found if other is not None)
        return first


class World:
    """Two ranks that take the real step on made-up pictures with tiny networks."""

    def __init__(self, diffusion: DiffusionConfig | None = None, dropout: float = 0.2) -> None:
        encoders = [replace(tiny.ENCODERS[0], dropout=dropout), replace(tiny.ENCODERS[2], dropout=0.1)]
        self.conditioner = Conditioner(encoders)
        self.autoencoder = Autoencoder(tiny.AUTOENCODER)
        self.autoencoder.init_weights(0)
        images = pictures(range(64))
        raw = self.autoencoder.encode(images).mean.detach()
        self.autoencoder.set_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
        self.diffusion = diffusion or DiffusionConfig()
        self.config = DiTConfig(
            latent_channels=4, depth=1, width=16, num_heads=2, max_grid=8,
            text_dim=self.conditioner.text_dim, pooled_dim=self.conditioner.pooled_dim,
        )  # fmt: skip
        self.dit = DiT(self.config)
        self.dit.init_weights(0)
        self.pace = [Pace(CPU) for _ in range(WORLD)]
        self.checks = [DiffusionChecks(self.diffusion, self.conditioner, self.config, pace) for pace in self.pace]
        self.meters = [Meter() for _ in range(WORLD)]
        ranks = zip(self.meters, self.pace, (own.parts for own in self.checks), strict=True)
        self.ranks = Ranks(*((meter, pace, *parts) for meter, pace, parts in ranks))
        self.step = 0

    @property
    def frozen(self) -> SimpleNamespace:
        return SimpleNamespace(device=CPU, autoencoder=self.autoencoder, conditioner=self.conditioner)

    def row(self, steps: int = 2, rank_of=lambda rank: rank) -> Reading:
        """Some steps on both ranks, then a row."""
        for _ in range(steps):
            for rank in range(WORLD):
                first = (self.step * WORLD + rank_of(rank)) * MICRO
                self.take(rank, batch_of(range(first, first + MICRO)))
            self.step += 1
        return self.ranks.read()

    def take(self, rank: int, batch: Batch) -> None:
        with torch.no_grad():
            _, scalars = diffusion_step(
                self.dit, batch, self.frozen, self.diffusion, seed=SEED, sample_latents=False,
                global_batch_size=MICRO * WORLD, patch_size=2, checks=self.checks[rank],
            )  # fmt: skip
        self.meters[rank].add(**scalars)

    def complaints(self, rows: int) -> dict[str, Complaint]:
        """All that is said in so many rows, by check."""
        return {complaint.check: complaint for _ in range(rows) for complaint in self.row().complaints}


def pictures(numbers) -> Tensor:
    """Pictures of one colour each: what a tiny autoencoder tells apart best."""
    colours = prng.uniform(1, 99, torch.tensor(list(numbers)), (3, 1, 1))
    return (2 * colours - 1).expand(-1, 3, 32, 32).contiguous()


def batch_of(numbers, weights: Tensor | None = None, captions: list[str] | None = None) -> Batch:
    numbers = list(numbers)
    size = len(numbers)
    return Batch(
        pixels=((pictures(numbers) + 1) * 127.5).round().to(torch.uint8),
        captions=captions or [f"a picture with number {number % 50}" for number in numbers],
        keys=[str(number) for number in numbers],
        sample_numbers=torch.tensor(numbers),
        weights=torch.ones(size) if weights is None else weights,
        sizes=torch.zeros(size, 2, dtype=torch.int32),
        crops=torch.zeros(size, 4, dtype=torch.int32),
        bad=[],
        metas=[{}] * size,
        visits=torch.tensor(numbers),
        filtered=torch.zeros(0, dtype=torch.int64),
        stream=0,
        positions=(),
    )


# -- nothing wrong ---------------------------------------------------------------------------------------------------
def test_a_true_run_is_silent_and_its_rows_say_what_happened() -> None:
    world = World()
    rows = [world.row() for _ in range(24)]
    assert [row.complaints for row in rows] == [[]] * 24
    fields = rows[-1].fields
    samples = 24 * 2 * WORLD * MICRO
    assert fields["noise_compared"] == 24 * WORLD * 8
    assert fields["captions"] == samples
    assert fields["drop_rates"]["clip_a"] == pytest.approx(0.2, abs=0.03)
    assert fields["drop_rates"]["t5"] == pytest.approx(0.1, abs=0.03)
    drawn = prng.uniform(SEED, prng.DROPOUT, torch.arange(samples), (2,)) < torch.tensor([0.2, 0.1])
    assert list(fields["drop_rates"].values()) == pytest.approx(drawn.double().mean(0).tolist(), abs=1e-6)
    assert sum(fields["t_histogram"]) == 2 * WORLD * MICRO == pytest.approx(sum(fields["t_declared"]), abs=0.2)
    assert fields["t_p_value"] > 1e-4
    assert max(map(abs, fields["latent_channel_mean"])) < 0.2
    assert all(0.8 < std < 1.25 for std in fields["latent_channel_std"])
    # The loss is the mean of the losses by time, weighted by how many lie in each bin (of twice the width).
    counts = [sum(fields["t_histogram"][i : i + 2]) for i in range(0, 20, 2)]
    by_time = fields["loss_by_t"]
    assert [mean is None for mean in by_time] == [count == 0 for count in counts]
    whole = sum(mean * count for mean, count in zip(by_time, counts, strict=True) if count) / sum(counts)
    assert whole == pytest.approx(fields["loss"], rel=1e-5)


KINDS = (
    {"time_density": "uniform"},
    {"logit_mean": 0.3, "logit_std": 1.4},
    {"logit_std": 20.0},
    {"time_density": "mode"},
    {"time_density": "mode", "mode_scale": -0.6},
    {"time_density": "cosmap"},
)
SHIFTS = ({}, {"shift": 3.0}, {"base_tokens": 96})


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("kind, shift", itertools.product(KINDS, SHIFTS))
def test_times_of_every_density_are_believed(kind, shift, stratified) -> None:
    """Two ranks, pictures of two sizes, thirty rows."""
    config = DiffusionConfig(**kind, **shift, stratified=stratified)
    checks = [TimesCheck(config) for _ in range(2)]
    ranks = Ranks(*((check,) for check in checks))
    ones, found = torch.ones(32), []
    for step in range(30):
        for rank, check in enumerate(checks):
            numbers = (2 * step + rank) * 32 + torch.arange(32)
            tokens = (64, 256)[step % 2]
            t = sample_t(config, time_uniforms(config, 3, numbers, 64), tokens)
            check.add(t, ones, ones, tokens)
        reading = ranks.read()
        assert reading.complaints == []
        found.append(reading.fields["t_p_value"])
    assert found[-1] > (0.9 if stratified else 1e-5)


# -- broken on purpose: noise and data ---------------------------------------------------------------------------------
def stateful_noise(seed: int):
    """What most programs do: a generator per rank, all seeded alike."""
    generators: dict[int, torch.Generator] = {}

    def normal(_seed, stream, numbers, shape):
        if stream != prng.NOISE:
            return prng_normal(_seed, stream, numbers, shape)
        rank = int(numbers[0]) // MICRO % WORLD
        generator = generators.setdefault(rank, torch.Generator().manual_seed(seed))
        return torch.randn(len(numbers), *shape, generator=generator)

    return normal


prng_normal, prng_uniform = prng.normal, prng.uniform


def only(reading: Reading) -> Complaint:
    (complaint,) = reading.complaints
    return complaint


def test_noise_from_generators_seeded_alike_is_an_error(monkeypatch) -> None:
    world = World()
    monkeypatch.setattr(step_module.prng, "normal", stateful_noise(SEED))
    complaint = only(world.row())
    assert complaint.fatal and complaint.check == "noise"
    assert "ranks 0 and 1 drew the same noise for different samples" in complaint.message
    assert "seed" in complaint.message


def test_noise_that_does_not_change_or_is_repeated_is_an_error(monkeypatch) -> None:
    world = World()

    def by_place(seed, stream, numbers, shape):  # differs on ranks and in the batch, but not from step to step
        return prng_normal(seed, stream, numbers % (MICRO * WORLD) if stream == prng.NOISE else numbers, shape)

    monkeypatch.setattr(step_module.prng, "normal", by_place)
    assert world.row().complaints == []
    assert "does not change from step to step" in only(world.row()).message

    def once(seed, stream, numbers, shape):
        if stream != prng.NOISE:
            return prng_normal(seed, stream, numbers, shape)
        return prng_normal(seed, stream, numbers[:1], shape).expand(len(numbers), *shape)

    monkeypatch.setattr(step_module.prng, "normal", once)
    assert "repeated over the batch" in only(world.row()).message


def test_ranks_that_read_the_same_data_are_an_error() -> None:
    complaints = World().row(rank_of=lambda rank: 0).complaints
    assert [complaint.check for complaint in complaints if complaint.fatal] == ["samples", "times"]
    assert "ranks 0 and 1 train on the same samples" in complaints[0].message
    assert "RANK" in complaints[0].message


def test_times_that_are_the_same_on_both_ranks_are_an_error(monkeypatch) -> None:
    world = World()

    def uniform(seed, stream, numbers, shape=()):
        return prng_uniform(seed, stream, numbers % MICRO if stream == prng.TIME else numbers, shape)

    monkeypatch.setattr(step_module.prng, "uniform", uniform)
    complaint = next(c for c in world.row().complaints if c.fatal)
    assert complaint.check == "times" and "ranks 0 and 1 drew the same times" in complaint.message


def test_ranks_are_told_apart_by_one_bit() -> None:
    noise = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    noise[1] = noise[0]
    noise[1, 700] = torch.nextafter(noise[1, 700], torch.tensor(9.0))
    noise[2] = noise[0].roll(1)
    prints = fingerprints(noise).tolist()
    assert len(set(prints)) == 3
    assert fingerprints(noise[:1].clone()).tolist() == prints[:1]
    assert alike([[1, 2], [3, 4], [5, 6]]) == ""
    assert alike([[1, 2], [3, 4], [5, 3]]) == "ranks 1 and 2"
    draws = DrawsCheck()
    draws.add(torch.arange(2), torch.zeros(2, 5))
    assert draws.numbers().dtype == torch.int64 and len(draws.numbers()) == 4


def test_one_sample_per_rank_is_no_proof_of_equal_times() -> None:
    checks = [TimesCheck(DiffusionConfig()) for _ in range(2)]
    for check in checks:
        check.add(torch.tensor([0.5]), torch.ones(1), torch.ones(1), 16)
    assert Ranks(*((check,) for check in checks)).read().complaints == []


# -- broken on purpose: the density ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "declared, drawn, named",
    [
        ({}, {"logit_mean": 0.5}, r"logit_normal(0, 1)"),
        ({}, {"logit_std": 1.4}, r"logit_normal(0, 1)"),
        ({}, {"time_density": "uniform"}, r"logit_normal(0, 1)"),  # the density taken for a weight of the loss
        ({"time_density": "mode"}, {"time_density": "uniform"}, "mode(1.29)"),
        ({"time_density": "cosmap"}, {"time_density": "uniform"}, "cosmap"),
        ({"shift": 2.0}, {}, "logit_normal(0, 1), shifted by 2"),
        ({"base_tokens": 4}, {}, "logit_normal(0, 1), shifted from 4 tokens"),
    ],
)
def test_another_density_than_the_declared_is_named(declared, drawn, named) -> None:
    check, numbers = TimesCheck(DiffusionConfig(**declared)), torch.arange(4096)
    t = sample_t(DiffusionConfig(**drawn), prng.uniform(SEED, prng.TIME, numbers))
    check.add(t, torch.ones(4096), torch.ones(4096), 16)
    complaint = only(Ranks((check,)).read())
    assert not complaint.fatal and complaint.check == "t"
    assert f"do not follow the declared density {named} (p = " in complaint.message


def test_a_density_that_the_step_takes_for_a_weight_is_named(monkeypatch) -> None:
    world = World()
    monkeypatch.setattr(step_module, "sample_t", lambda config, uniforms, tokens: uniforms.float())
    complaint = world.complaints(14)["t"]
    assert "do not follow the declared density logit_normal(0, 1)" in complaint.message
    assert "or the density is used as a weight" in complaint.message


# -- broken on purpose: text -------------------------------------------------------------------------------------------
def test_a_condition_that_is_never_dropped_is_named(monkeypatch) -> None:
    """The draw is right, but nobody heeds it: the features tell."""
    world = World()
    heed = world.conditioner.recall

    def forget_t5(captions, drop):
        return heed(captions, drop & torch.tensor([True, False]))

    monkeypatch.setattr(world.conditioner, "recall", forget_t5)
    complaints = world.complaints(12)
    assert set(complaints) == {"dropout t5"}
    assert "text encoder t5 is dropped for 0.00 % of" in complaints["dropout t5"].message
    assert "the recipe says dropout 0.1" in complaints["dropout t5"].message


def test_another_rate_of_dropout_is_named(monkeypatch) -> None:
    world = World()
    world.conditioner.dropout = [0.5, 0.1]  # what is drawn from; the recipe says 0.2
    message = world.complaints(6)["dropout clip_a"].message
    assert "the recipe says dropout 0.2" in message


def test_encoders_without_dropout_may_never_be_dropped(monkeypatch) -> None:
    world = World(dropout=0.0)
    assert world.row().complaints == []
    world.conditioner.dropout = [0.05, 0.1]
    assert "the recipe says dropout 0:" in world.complaints(4)["dropout clip_a"].message


def test_empty_captions_and_masked_samples_are_no_witnesses() -> None:
    world = World(dropout=0.0)
    weights = torch.ones(MICRO)
    weights[:4] = 0.0
    captions = ["", " ", "x", "y"] * (MICRO // 4)
    for rank in range(WORLD):
        numbers = range(rank * MICRO, (rank + 1) * MICRO)
        world.take(
            rank, batch_of(numbers, weights, [("" if w == 0 else c) for c, w in zip(captions, weights, strict=True)])
        )
    reading = world.ranks.read()
    assert reading.fields["captions"] == WORLD * 6
    assert reading.fields["drop_rates"]["clip_a"] == 0.0
    assert all(complaint.check != "dropout clip_a" for complaint in reading.complaints)


def test_a_text_encoder_in_float16_is_an_error_that_names_it() -> None:
    world = World()
    world.conditioner.text_encoders()[1].tower.half()
    complaint = only(world.row())
    assert complaint.fatal and complaint.check == "text t5"
    assert "text encoder t5: its weights are float16 where the recipe says float32" in complaint.message


def test_features_of_another_type_are_an_error(monkeypatch) -> None:
    world = World()
    recall = world.conditioner.recall

    def halved(captions, drop):
        clip, t5 = recall(captions, drop)
        return [clip, replace(t5, tokens=t5.tokens.half())]

    monkeypatch.setattr(world.conditioner, "recall", halved)
    monkeypatch.setattr(world.conditioner, "join", lambda features: Conditioner.join(world.conditioner, features))
    assert "text encoder t5: its features come as float16 instead of float32" in only(world.row()).message


def test_features_that_are_not_finite_are_an_error_that_names_the_encoder() -> None:
    world = World()
    for parameter in world.conditioner.text_encoders()[0].tower.parameters():
        parameter.data.mul_(1e30)
    fatal = [complaint for complaint in world.row().complaints if complaint.fatal]
    assert [complaint.check for complaint in fatal] == ["text clip_a"]
    assert "text encoder clip_a: its features are not finite" in fatal[0].message
    assert "T5 overflows in float16" in fatal[0].message


def test_stored_features_are_looked_at_too() -> None:
    world = World()
    text = world.checks[0].text
    features = world.conditioner.features(["a", "b"])
    for check in world.checks:
        check.text.add(features, ["a", "b"], torch.ones(2), [torch.bfloat16, torch.float16])
    ranks = Ranks(*((check.text,) for check in world.checks))
    assert "text encoder t5: its stored features are float16 instead of bfloat16" in only(ranks.read()).message
    assert text is world.checks[0].text


# -- broken on purpose: latents ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("factor, fatal", [(1 / 0.18215, False), (0.18215, False), (20.0, True), (0.02, True)])
def test_latents_of_another_scale_are_named(factor, fatal) -> None:
    """Statistics that are off by a factor, as when a scale of another autoencoder is applied."""
    world = World()
    world.autoencoder.latent_std.mul_(factor)
    complaint = world.complaints(20)["latents"]
    assert complaint.fatal == fatal
    assert "of the normalised latents has mean" in complaint.message
    assert ("another scale is applied" in complaint.message) != fatal
    assert ("another autoencoder" in complaint.message) == fatal


def test_one_channel_that_is_shifted_is_named() -> None:
    world = World()
    world.autoencoder.latent_mean[2] += 0.5 * world.autoencoder.latent_std[2]
    message = world.complaints(20)["latents"].message
    assert message.startswith("channel 2 of the normalised latents has mean -0.4")
    assert "measured on other data" in message


def test_few_pictures_are_no_proof() -> None:
    world = World()
    world.autoencoder.latent_std.mul_(3.0)
    assert world.row().complaints == []


def test_one_broken_picture_is_a_warning_and_many_are_an_error() -> None:
    check = LatentsCheck()
    ranks = Ranks((check,))
    latents = torch.randn(2000, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents[5] = torch.nan
    check.add(latents, torch.ones(2000))
    complaint = only(ranks.read())
    assert not complaint.fatal and "the latents of 1 of 2,000 pictures are not finite" in complaint.message
    check.add(torch.full((50, 2, 4, 4), torch.inf), torch.ones(50))
    assert only(ranks.read()).fatal
    masked = LatentsCheck()
    masked.add(latents, (torch.arange(2000) != 5).float())
    assert Ranks((masked,)).read().complaints == []


# -- the row ---------------------------------------------------------------------------------------------------------
def test_checks_change_nothing() -> None:
    world = World()
    batch = batch_of(range(MICRO))
    settings = {"seed": SEED, "sample_latents": True, "global_batch_size": 32, "patch_size": 2}
    losses = []
    for checks in (None, world.checks[0]):
        world.dit.zero_grad()
        for parameter in world.dit.parameters():  # away from the zeros of adaLN-zero
            parameter.data.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))
        loss, _ = diffusion_step(world.dit, batch, world.frozen, world.diffusion, **settings, checks=checks)
        loss.backward()
        losses.append((loss.detach(), [parameter.grad.clone() for parameter in world.dit.parameters()]))
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))


def test_operations_are_counted_for_the_tokens_that_are_computed() -> None:
    world = World()
    world.take(0, batch_of(range(MICRO)))
    tokens = world.conditioner.num_tokens
    assert world.pace[0].flops == 3 * MICRO * dit_flops(world.config, 16, tokens)
    short = Conditioner([replace(tiny.ENCODERS[0]), replace(tiny.ENCODERS[2])], "masked")
    world.conditioner = short
    for rank in range(WORLD):
        world.checks[rank] = DiffusionChecks(world.diffusion, short, world.config, world.pace[rank])
    before = world.pace[0].flops
    world.take(0, batch_of(range(MICRO), captions=["a"] * MICRO))
    assert world.pace[0].flops - before < 3 * MICRO * dit_flops(world.config, 16, tokens)


class Fixed:
    """A part that always says the same."""

    def __init__(self, *complaints: Complaint) -> None:
        self.complaints = list(complaints)

    def numbers(self) -> Tensor:
        return torch.tensor([1.5, float("nan")], dtype=torch.float64)

    def read(self, table: Tensor) -> Reading:
        assert table[0, 0] == 1.5 and torch.isnan(table[0, 1])
        return Reading(fields={"x": 1}, complaints=self.complaints)


def test_a_warning_is_said_now_and_then_and_stands_in_every_row() -> None:
    parts = Parts(lambda words: words[None], CPU)
    meter = Meter()
    parts.add(meter, Fixed(Complaint(check="c", message="this is odd"), Complaint(check="e", message="no", fatal=True)))
    said = []
    for number in range(1, 121):
        meter.add(loss=torch.tensor(2.0))
        reading = parts.read()
        assert reading.complaint_fields() == {"warnings": ["c: this is odd"], "errors": ["e: no"]}
        assert reading.fields == {"loss": 2.0, "x": 1}
        said += [(number, line) for line in parts.to_say(reading)]
    assert [number for number, _ in said] == [1, 10, 100]
    assert said[0][1] == "this is odd" and said[2][1] == "this is odd (for the 100th row)"


def test_means_over_ranks_are_those_of_the_device() -> None:
    meters = [Meter(), Meter()]
    for rank, meter in enumerate(meters):
        for value in (0.1, 0.7, 0.3):
            meter.add(loss=torch.tensor(value + rank), other=torch.tensor(float(rank)))
    fields = Ranks(*((meter,) for meter in meters)).read().fields
    assert fields["loss"] == pytest.approx((0.1 + 0.7 + 0.3) / 3 + 0.5)
    assert fields["other"] == 0.5
