"""Text encoders: equal to the serving side's, functions of their seed, and laid out as SD3 does."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import conditioner as conditioner_module
from models.artifact import sha256_of
from models.diffusers_map import clip_to_transformers, clip_tokenizer_to_transformers
from models.errors import ModelError
from models.t5_vocabulary import WORD_START, unigram_pieces
from models.text_config import ClipArchitecture
from models.text_encoder import Conditioner, TextEncoderConfig, build_text_encoder

CLIP = TextEncoderConfig(name="clip_a", kind="clip", max_tokens=8, seed=1, width=16, layers=3, heads=2, embed_dim=12)
CLIP_B = TextEncoderConfig(name="clip_b", kind="clip", max_tokens=8, seed=2, width=8, layers=1, heads=2, embed_dim=4)
T5 = TextEncoderConfig(name="t5", kind="t5", max_tokens=6, seed=3, width=32, layers=2, heads=2, vocab_size=6000)
CAPTIONS = [
    "a red seven above a blue three",
    "",
    "A photo of two cats, at night!",
    "! hello !! wow!!! 42%",
    "it's the dog's 2nd naïve café",
    "supercalifragilistic words that do not fit into eight tokens",
]


@pytest.fixture(scope="module")
def conditioner() -> Iterator[Conditioner]:
    yield Conditioner((CLIP, CLIP_B, T5))


@pytest.mark.parametrize("quick_gelu", [False, True])
@torch.no_grad()
def test_clip_equals_transformers(quick_gelu: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = build_text_encoder(CLIP)
    architecture = replace(ours.architecture, quick_gelu=quick_gelu)
    if quick_gelu:
        from models.text_encoder import _clip_encoder

        ours = _clip_encoder(CLIP, architecture, ours.artifact_tensors())
    for number, parameter in enumerate(ours.parameters()):  # norms and biases too, so that a swap would be seen
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.add_(0.1 * noise)
    arguments, state = clip_to_transformers(architecture, CLIP.max_tokens, ours.artifact_tensors())
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**arguments)).eval()
    theirs.load_state_dict(state)
    tokenizer = clip_tokenizer_to_transformers(ours.tokenizer.encoder, ours.tokenizer.bpe_ranks, CLIP.max_tokens)
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (6, 8)  # the tokenizer knows its length
    assert len(tokenizer) == theirs.config.vocab_size == ids.max() + 1
    assert torch.equal(ids.where(ids != tokenizer.pad_token_id, 0), ours.tokenize(CAPTIONS))
    found = theirs(ids, output_hidden_states=True)
    tokens, mask, pooled = ours.encode(CAPTIONS)
    torch.testing.assert_close(tokens, found.hidden_states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, found.text_embeds, atol=1e-5, rtol=1e-5)
    assert mask.sum(1).tolist() == [8, 2, 8, 8, 8, 8]
    assert torch.equal(mask, ids != tokenizer.pad_token_id)


def test_clip_tokenizer_survives_saving(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = build_text_encoder(CLIP).tokenizer
    tokenizer = clip_tokenizer_to_transformers(ours.encoder, ours.bpe_ranks, 8)
    tokenizer.save_pretrained(tmp_path)
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    arguments = {"padding": "max_length", "truncation": True}
    assert again(CAPTIONS, **arguments).input_ids == tokenizer(CAPTIONS, **arguments).input_ids
    assert again.pad_token_id == tokenizer.pad_token_id == 49408


def test_seeded_is_a_function_of_its_seed() -> None:
    for config in (CLIP, T5):
        state = torch.random.get_rng_state()
        encoder = build_text_encoder(config)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(99)
        assert build_text_encoder(config).fingerprint == encoder.fingerprint
        torch.random.set_rng_state(state)
        assert build_text_encoder(replace(config, seed=9)).fingerprint != encoder.fingerprint
        assert build_text_encoder(replace(config, dropout=0.5)).fingerprint == encoder.fingerprint
        assert not encoder.train().training
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        tokens, _, pooled = encoder.encode(CAPTIONS)
        for features in (tokens, pooled):
            if features is not None:
                assert 0.5 < features.std() < 2.0


def test_t5_reads_words_whole(conditioner: Conditioner) -> None:
    t5 = conditioner.text_encoders()[2]
    text = "a red seven above a"
    assert t5.tokenizer.tokenize(text) == [WORD_START + word for word in text.split()]
    ids = t5.tokenize([text, "", "red"])
    assert ids[1].tolist() == [1, 0, 0, 0, 0, 0]
    assert ids[0, -1] == 1
    assert len(set(ids[0].tolist())) == 5  # "a" twice
    assert t5.tokenizer.tokenize("Red7 zzzq 7!") and 2 not in t5.tokenize(["R7 zq 7!"])  # nothing is unknown
    _, mask, pooled = t5.encode([text, ""])
    assert mask.sum(1).tolist() == [6, 1]
    assert pooled is None


def test_unigram_pieces() -> None:
    pieces = unigram_pieces(["the", "cat", "the", "dog"], 200)
    assert [piece for piece, _ in pieces[:6]] == ["<pad>", "</s>", "<unk>", "▁the", "▁cat", "▁dog"]
    assert len({piece for piece, _ in pieces}) == len(pieces)
    with pytest.raises(ModelError, match="leaves no room for words"):
        unigram_pieces(["the"], 100)


@torch.no_grad()
def test_layout(conditioner: Conditioner) -> None:
    a, b, t5 = (encoder.encode(CAPTIONS) for encoder in conditioner.text_encoders())
    condition = conditioner.encode(CAPTIONS)
    assert (conditioner.text_dim, conditioner.pooled_dim, conditioner.num_tokens) == (32, 16, 14)
    expected = torch.zeros(6, 14, 32)
    expected[:, :8, :16], expected[:, :8, 16:24], expected[:, 8:] = a[0], b[0], t5[0]
    torch.testing.assert_close(condition.text_embeds, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(condition.pooled, torch.cat((a[2], b[2]), 1), atol=1e-6, rtol=1e-6)
    assert condition.text_mask is None


def test_each_encoder_is_dropped_for_itself(conditioner: Conditioner) -> None:
    null = conditioner.encode([""])
    plain = conditioner.encode(CAPTIONS[:1])
    drop = torch.tensor([[True, False, False], [False, True, False], [False, False, True], [False, False, False]])
    condition = conditioner.encode(CAPTIONS[:1] * 4, drop)
    slices = [(slice(0, 8), slice(0, 16)), (slice(0, 8), slice(16, 24)), (slice(8, 14), slice(0, 32))]
    for row in range(4):
        for number, (length, channels) in enumerate(slices):
            source = null if drop[row, number] else plain
            assert torch.equal(condition.text_embeds[row, length, channels], source.text_embeds[0, length, channels])
    assert torch.equal(condition.pooled[0, :12], null.pooled[0, :12])
    assert torch.equal(condition.pooled[0, 12:], plain.pooled[0, 12:])
    assert torch.equal(condition.pooled[3], plain.pooled[0])


def test_features_do_not_depend_on_the_batch_or_the_cache(conditioner: Conditioner, monkeypatch) -> None:
    captions = [f"{a} {b}" for a in ("red", "blue", "green", "old") for b in ("cat", "dog", "seven", "two", "boat")]
    fresh = Conditioner((CLIP, CLIP_B, T5))
    together = fresh.encode(captions)
    calls = []
    for encoder in fresh.text_encoders():
        monkeypatch.setattr(encoder, "encode", lambda chunk: calls.append(chunk))
    again = fresh.encode(captions[::-1] + captions[:3])  # wholly from the cache
    assert calls == []
    assert torch.equal(again.text_embeds[:20], together.text_embeds.flip(0))
    assert torch.equal(again.text_embeds[20:], together.text_embeds[:3])
    for caption, embeds, pooled in zip(captions, together.text_embeds, together.pooled, strict=True):
        alone = conditioner.encode([caption])
        assert torch.equal(alone.text_embeds[0], embeds)  # bit by bit: a resumed run batches them otherwise
        assert torch.equal(alone.pooled[0], pooled)


def test_cache_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(conditioner_module, "_MIN_CACHE_ROWS", 1)
    monkeypatch.setattr(conditioner_module, "_CACHE_BYTES", 4 * 3 * 5)  # five rows of three floats
    cache = conditioner_module._RowCache(3)
    asked: list[str] = []

    def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend(captions)
        return torch.tensor([[float(caption)] * 3 for caption in captions]), torch.tensor(
            [int(c) + 1 for c in captions]
        )

    def get(*numbers: int) -> list[str]:
        asked.clear()
        rows, lengths = cache.get([str(number) for number in numbers], encode)
        assert rows[:, 0].tolist() == list(numbers)
        assert lengths.tolist() == [number + 1 for number in numbers]
        return list(asked)

    assert get(1, 2, 1) == ["1", "2"]
    assert get(2, 3, 4, 5) == ["3", "4", "5"]
    assert get(1, 6) == ["6"]  # the oldest, 2, goes
    assert get(3, 4, 5, 1) == []
    assert get(2, 3) == ["2"]  # 6 goes
    assert get(*range(10, 17)) == [str(number) for number in range(10, 17)]  # too many: past the cache
    assert get(2, 3, 1) == []
    monkeypatch.setattr(conditioner_module, "_MIN_CACHE_ROWS", 100)
    assert conditioner_module._RowCache(3).capacity == 0


def test_save_and_load(conditioner: Conditioner, tmp_path: Path) -> None:
    fingerprint = conditioner.save(tmp_path / "text")
    loaded = Conditioner.load(tmp_path / "text")
    assert fingerprint == conditioner.fingerprint == loaded.fingerprint
    assert loaded.names == ["clip_a", "clip_b", "t5"]
    first, second = conditioner.encode(CAPTIONS), loaded.encode(CAPTIONS)
    assert torch.equal(first.text_embeds, second.text_embeds)
    assert torch.equal(first.pooled, second.pooled)
    # An encoder's folder serves as a pretrained one.
    again = build_text_encoder(replace(CLIP, pretrained=str(tmp_path / "text" / "clip_a"), **NOT_SEEDED))
    assert again.fingerprint == conditioner.fingerprints["clip_a"]
    with pytest.raises(ModelError, match="max_tokens is 8, the recipe says 9"):
        build_text_encoder(replace(CLIP, max_tokens=9, pretrained=str(tmp_path / "text" / "clip_a"), **NOT_SEEDED))
    # Another encoder in its place is noticed.
    (tmp_path / "text" / "clip_a").rename(tmp_path / "old")
    build_text_encoder(replace(CLIP, seed=5)).save(tmp_path / "text" / "clip_a")
    with pytest.raises(ModelError, match="clip_a is another encoder"):
        Conditioner.load(tmp_path / "text")


NOT_SEEDED = {"seed": None, "width": None, "layers": None, "heads": None, "embed_dim": None, "vocab_size": None}


def open_clip_folder(folder: Path, **text) -> tuple[Path, dict[str, torch.Tensor]]:
    """A plain CLIP as the hub holds it, with the picture tower that we leave aside and a context of 12."""
    encoder = build_text_encoder(replace(CLIP, max_tokens=12))
    folder.mkdir()
    settings = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3, **text}
    model = {"embed_dim": 12, "vision_cfg": {}, "text_cfg": settings}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    tensors = encoder.artifact_tensors()
    save_file(
        {**tensors, "visual.x": torch.ones(1), "logit_scale": torch.ones(1)}, folder / "open_clip_model.safetensors"
    )
    return folder, tensors


def test_pretrained_clip_from_a_folder(tmp_path: Path) -> None:
    folder, tensors = open_clip_folder(tmp_path / "clip")
    digest = sha256_of(folder / "open_clip_model.safetensors")
    config = replace(CLIP, pretrained=str(folder), sha256=digest, **NOT_SEEDED)
    encoder = build_text_encoder(config)
    assert encoder.architecture == ClipArchitecture(width=16, layers=3, heads=2, embed_dim=12)
    long = build_text_encoder(replace(config, max_tokens=12))
    tokens, _, pooled = encoder.encode(CAPTIONS[1:2])
    expected, _, expected_pooled = long.encode(CAPTIONS[1:2])
    torch.testing.assert_close(tokens, expected[:, :8])  # a shorter context changes nothing before its end
    torch.testing.assert_close(pooled, expected_pooled)
    with pytest.raises(ModelError, match="one of them is wrong"):
        build_text_encoder(replace(config, sha256="0" * 64))
    with pytest.raises(ModelError, match="reads 12 tokens"):
        build_text_encoder(replace(config, max_tokens=20))
    odd, _ = open_clip_folder(tmp_path / "odd", pool_type="last")
    with pytest.raises(ModelError, match="its text tower sets 'pool_type'"):
        build_text_encoder(replace(config, pretrained=str(odd), sha256=None))


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("no-such-model", "neither a folder nor"),
        ("no-such-model:tag", "neither a folder nor"),
        ("ViT-B-32:no_such_tag", "knows no tag 'no_such_tag'"),
        ("ViT-B-32:openai", "other GELU"),
        ("ViT-B-32:/nowhere/x.safetensors", "/nowhere/x.safetensors is missing"),
    ],
)
def test_pretrained_clip_mistakes(pretrained: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_text_encoder(replace(CLIP, pretrained=pretrained, **NOT_SEEDED))


def test_pretrained_t5_from_a_folder(conditioner: Conditioner, tmp_path: Path) -> None:
    seeded = conditioner.text_encoders()[2]
    seeded.tower.save_pretrained(tmp_path, safe_serialization=True)
    seeded.tokenizer.save_pretrained(tmp_path)
    config = replace(T5, pretrained=str(tmp_path), **NOT_SEEDED)
    encoder = build_text_encoder(config)
    assert torch.equal(encoder.encode(CAPTIONS)[0], seeded.encode(CAPTIONS)[0])
    half = build_text_encoder(replace(config, dtype="bfloat16"))
    tokens = half.encode(CAPTIONS)[0]
    assert next(half.tower.parameters()).dtype == torch.bfloat16
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, seeded.encode(CAPTIONS)[0], atol=0.2, rtol=0.1)
    half.save(tmp_path / "artifact")
    again = build_text_encoder(replace(config, dtype="bfloat16", pretrained=str(tmp_path / "artifact")))
    assert torch.equal(again.encode(CAPTIONS)[0], tokens)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no \*.safetensors"):
        build_text_encoder(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained": "x"}, "either pretrained or seed"),
        ({"seed": None}, "either pretrained or seed"),
        ({"heads": 3}, "heads is 3, which does not divide width 16"),
        ({"width": None}, "width is None in text encoder 'clip_a': a seeded one needs it"),
        ({"vocab_size": 9}, "vocab_size is 9: leave it out"),
        ({"max_tokens": 78}, "max_tokens is 78"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"name": "../x"}, "name is '../x'"),
        ({"sha256": "0" * 64}, "beside pretrained"),
        ({**NOT_SEEDED, "pretrained": "x", "layers": 2}, "layers is 2 in text encoder 'clip_a': leave it out"),
    ],
)
def test_config_mistakes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CLIP, **change)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((CLIP, CLIP), "same name"),
        ((T5,), "must be one or more of kind clip"),
        ((T5, CLIP), "must be one or more of kind clip"),
        ((CLIP, replace(CLIP_B, max_tokens=9)), "the same max_tokens"),
    ],
)
def test_encoders_that_do_not_go_together(configs, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Conditioner(configs)
