"""Masked padding: seen by nobody, from the towers to the pictures; attended padding stays what it was."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.artifact import artifact_fingerprint
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.conditioner import JointEncoders, TextCondition, TextFeatures
from models.diffusion import DiffusionConfig
from models.dit import DiT, DiTConfig
from models.errors import ModelError
from models.export import export_diffusers
from models.pipeline import TextToImage
from models.sampler import guided
from models.text_encoder import Conditioner, TextEncoderConfig
from models.text_tower import TextEncoder

LONG = 14  # tokens of every tower
ENCODERS = (
    TextEncoderConfig(name="clip_a", kind="clip", max_tokens=LONG, seed=1, width=16, layers=2, heads=2, embed_dim=12),
    TextEncoderConfig(name="clip_b", kind="clip", max_tokens=LONG, seed=2, width=8, layers=2, heads=2, embed_dim=4),
    TextEncoderConfig(name="t5", kind="t5", max_tokens=LONG, seed=3, width=32, layers=2, heads=2, vocab_size=6000),
)
CAPTIONS = ["a red seven", "", "a blue two above a dog"]  # 5, 2, 8 tokens of CLIP; 4, 1, 7 of T5
CUT = 8  # tokens to which both parts are cut for these captions: the longest of a batch, rounded up
EVERYTHING_DIFFERS = 1e-3


@pytest.fixture(scope="module")
def masked() -> Conditioner:
    return Conditioner(ENCODERS, "masked")


@pytest.fixture(scope="module")
def attended() -> Conditioner:
    return Conditioner(ENCODERS)


def cut(conditioner: Conditioner, max_tokens: int) -> JointEncoders:
    """The same towers, asked for fewer tokens."""
    encoders = [
        TextEncoder(replace(e.config, max_tokens=max_tokens), e.architecture, e.tower, e.tokenizer, e.files)
        for e in conditioner.text_encoders()
    ]
    return JointEncoders(encoders, conditioner.text_padding)


def make_dit(conditioner: JointEncoders) -> DiT:
    sizes = {"text_dim": conditioner.text_dim, "pooled_dim": conditioner.pooled_dim}
    dit = DiT(DiTConfig(latent_channels=4, depth=2, width=32, num_heads=2, max_grid=8, **sizes))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return dit.eval()


def test_the_mask_says_which_tokens_are_the_captions(masked: Conditioner) -> None:
    condition = masked.encode(CAPTIONS)
    assert condition.text_mask is not None
    clip, t5 = condition.text_mask[:, :CUT], condition.text_mask[:, CUT:]
    assert clip.sum(1).tolist() == [5, 2, 8] and t5.sum(1).tolist() == [4, 1, 7]
    assert bool(clip[:, 0].all()) and bool(t5[:, 0].all())  # from the left
    assert not condition.text_embeds[~condition.text_mask].any()
    assert bool(condition.text_embeds[condition.text_mask].any(dim=1).all())


@torch.no_grad()
def test_only_masked_features_are_the_same_whatever_max_tokens(masked: Conditioner, attended: Conditioner) -> None:
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([0.2, 0.5, 0.9])
    for conditioner in (masked, attended):
        dit, short = make_dit(conditioner), cut(conditioner, CUT)
        first_t5 = CUT if conditioner is masked else LONG
        whole, part = conditioner.encode(CAPTIONS), short.encode(CAPTIONS)
        torch.testing.assert_close(part.pooled, whole.pooled, rtol=1e-5, atol=1e-6)
        t5_difference = (part.text_embeds[:, CUT] - whole.text_embeds[:, first_t5]).abs().max()  # its first token
        velocities = [dit(x_t, t, c.text_embeds, c.pooled, c.text_mask) for c in (whole, part)]
        difference = (velocities[0] - velocities[1]).abs().max()
        if conditioner is masked:
            torch.testing.assert_close(part.text_embeds, whole.text_embeds, rtol=1e-5, atol=1e-6)
            assert difference < 1e-5
        else:
            assert part.text_mask is None
            assert min(float(difference), float(t5_difference)) > EVERYTHING_DIFFERS


def test_a_caption_that_is_too_long_is_cut(masked: Conditioner) -> None:
    condition = cut(masked, 4).encode(CAPTIONS)
    assert condition.text_mask is not None
    assert condition.text_mask.sum(1).tolist() == [8, 3, 8]


def test_a_dropped_encoder_keeps_the_other_ones_tokens(masked: Conditioner) -> None:
    null, plain = masked.encode([""]), masked.encode(CAPTIONS[2:])
    condition = masked.encode(CAPTIONS[2:] * 3, torch.eye(3, dtype=torch.bool))
    assert condition.text_mask is not None
    assert condition.text_mask[:, :CUT].sum(1).tolist() == [8, 8, 8]  # one CLIP is left
    assert condition.text_mask[:, CUT:].sum(1).tolist() == [7, 7, 1]
    assert torch.equal(condition.text_embeds[0, :CUT, :16], null.text_embeds[0, :CUT, :16])
    assert torch.equal(condition.text_embeds[0, :CUT, 16:24], plain.text_embeds[0, :CUT, 16:24])
    assert torch.equal(condition.text_embeds[2, CUT:], null.text_embeds[0, CUT:])


def padded(conditioner: Conditioner, features: Sequence[TextFeatures]) -> TextCondition:
    """The whole layout, nothing cut."""
    embeds = torch.zeros(len(features[0].tokens), 2 * LONG, conditioner.text_dim)
    mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    for own, first, channel in zip(features, (0, 0, LONG), (0, 16, 0), strict=True):
        length = own.tokens.shape[1]
        embeds[:, first : first + length, channel : channel + own.tokens.shape[2]] = own.tokens
        mask[:, first : first + length] |= own.mask
    return TextCondition(embeds, torch.cat([own.pooled for own in features], dim=1), mask)


@pytest.mark.parametrize(
    ("captions", "lengths"),
    [
        ([""], (8, 8)),
        (CAPTIONS, (8, 8)),
        (["a", "a red two above a blue dog"], (14, 8)),  # 9 and 8 tokens: up to a multiple, but not beyond the tower's
        (["one two three four five six seven eight nine", ""], (14, 14)),
    ],
)
def test_text_is_cut_behind_the_longest_and_nobody_notices(
    captions: list[str], lengths: tuple[int, int], masked: Conditioner
) -> None:
    features = masked.features(captions)
    whole = padded(masked, features)
    assert whole.text_mask is not None
    dit, batch = make_dit(masked), len(captions)
    generator = torch.Generator().manual_seed(7)
    x_t, t = torch.randn(batch, 4, 8, 8, generator=generator), torch.rand(batch, generator=generator)
    results = []
    for condition in (whole, masked.encode(captions), masked.join(features)):
        if condition is not whole:
            assert condition.text_mask is not None
            assert condition.text_mask.shape == (batch, sum(lengths))
            clip, t5 = condition.text_mask.split(lengths, dim=1)
            kept = torch.cat((whole.text_mask[:, : lengths[0]], whole.text_mask[:, LONG : LONG + lengths[1]]), dim=1)
            assert torch.equal(torch.cat((clip, t5), dim=1), kept)
            assert kept.sum() == whole.text_mask.sum()  # nothing of a caption was cut
        dit.zero_grad()
        velocity = dit(x_t, t, condition.text_embeds, condition.pooled, condition.text_mask)
        velocity.square().mean().backward()
        results.append((velocity.detach(), {n: p.grad for n, p in dit.named_parameters() if p.grad is not None}))
    for velocity, gradients in results[1:]:
        torch.testing.assert_close(velocity, results[0][0], rtol=1e-5, atol=1e-5)
        for name, expected in results[0][1].items():
            scale = expected.abs().max()
            torch.testing.assert_close(gradients[name] / scale, expected / scale, rtol=0, atol=1e-5, msg=name)


@torch.no_grad()
def test_guidance_between_texts_of_different_lengths(masked: Conditioner) -> None:
    captions = ["one two three four five six seven eight nine", "a red two"]
    condition, null = masked.encode(captions), masked.null()
    assert condition.text_embeds.shape[1] > null.text_embeds.shape[1]
    dit, x = make_dit(masked), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    t = torch.tensor([0.3, 0.8])
    whole, whole_null = (padded(masked, masked.features(texts)) for texts in (captions, [""]))
    expected = guided(dit, whole, whole_null, 3.0)(x, t)
    torch.testing.assert_close(guided(dit, condition, null, 3.0)(x, t), expected, rtol=1e-5, atol=1e-5)
    both_null = padded(masked, masked.features(["", ""]))
    expected = guided(dit, both_null, whole, 3.0)(x, t)  # a negative prompt may be longer than what it is held against
    torch.testing.assert_close(
        guided(dit, masked.encode(["", ""]), condition, 3.0)(x, t), expected, rtol=1e-5, atol=1e-5
    )


def test_attended_text_is_never_cut(attended: Conditioner) -> None:
    condition = attended.encode([""])
    assert condition.text_mask is None
    assert torch.equal(condition.text_embeds, padded(attended, attended.features([""])).text_embeds)


@pytest.mark.parametrize("text_padding", ["masked", "attended"])
def test_joining_features_gives_what_encoding_gives(text_padding: str, request: pytest.FixtureRequest) -> None:
    conditioner: Conditioner = request.getfixturevalue(text_padding)
    captions = ["", "a", "a red"]  # as short as can be, so that a null may be longer than what is stored
    drop = torch.tensor([[False, True, False], [True, True, True], [False, False, True]])
    features = conditioner.features(captions)
    if text_padding == "masked":  # stored without padding, filled up to the longest
        longest = [int(own.mask.sum(1).max()) for own in features]
        assert longest == [4, 4, 3]
        features = [
            TextFeatures(own.tokens[:, :length], own.mask[:, :length], own.pooled)
            for own, length in zip(features, longest, strict=True)
        ]
    for dropped in (None, drop):
        joined, encoded = conditioner.join(features, dropped), conditioner.encode(captions, dropped)
        assert_same(joined, encoded)


def test_a_null_may_be_longer_than_all_that_is_stored(masked: Conditioner) -> None:
    stored = [
        TextFeatures(torch.zeros(1, 1, e.width), torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, e.pooled_dim))
        for e in masked.text_encoders()
    ]
    assert_same(masked.join(stored, torch.ones(1, 3, dtype=torch.bool)), masked.encode([""]))


def assert_same(one: TextCondition, other: TextCondition) -> None:
    assert torch.equal(one.text_embeds, other.text_embeds)
    assert torch.equal(one.pooled, other.pooled)
    assert (one.text_mask is None) == (other.text_mask is None)
    if one.text_mask is not None and other.text_mask is not None:
        assert torch.equal(one.text_mask, other.text_mask)


def test_masking_is_part_of_the_artifact_and_attending_leaves_fingerprints_as_they_were(
    masked: Conditioner, attended: Conditioner, tmp_path: Path
) -> None:
    before = artifact_fingerprint("text_encoders", {"encoders": attended.names}, {}, attended.fingerprints)
    assert attended.fingerprint == before
    assert masked.fingerprint != attended.fingerprint and masked.fingerprints == attended.fingerprints
    assert masked.save(tmp_path / "masked") == masked.fingerprint
    loaded = Conditioner.load(tmp_path / "masked")
    assert loaded.text_padding == "masked" and loaded.fingerprint == masked.fingerprint
    assert_same(loaded.encode(CAPTIONS), masked.encode(CAPTIONS))
    attended.save(tmp_path / "attended")
    assert Conditioner.load(tmp_path / "attended").text_padding == "attended"


def test_pictures_of_a_masked_model_do_not_depend_on_max_tokens(masked: Conditioner, tmp_path: Path) -> None:
    autoencoder = Autoencoder(AutoencoderConfig(latent_channels=4, channels=(8, 8), norm_groups=4))
    autoencoder.init_weights(0)
    autoencoder.set_statistics(torch.zeros(4), torch.ones(4))
    pipeline = TextToImage(autoencoder, make_dit(masked), masked, DiffusionConfig(), 16)
    arguments = {"prompts": CAPTIONS, "seeds": [1, 2, 3], "num_steps": 3, "guidance_scale": 2.0}
    pictures = pipeline.generate(**arguments)
    pipeline.conditioner = cut(masked, 8)
    torch.testing.assert_close(pipeline.generate(**arguments), pictures, rtol=0.0, atol=1e-4)
    pipeline.conditioner = cut(masked, 4)  # cuts the third caption alone
    differences = (pipeline.generate(**arguments) - pictures).flatten(1).abs().amax(1)
    assert differences[2] > EVERYTHING_DIFFERS
    pipeline.conditioner = masked
    with pytest.raises(ModelError, match="text_padding: masked.*attends to padding.*attended to export"):
        export_diffusers(pipeline, tmp_path / "export")
    assert not (tmp_path / "export").exists()
