"""The encode stage in one process: what it stores is what training would have computed, whoever computes it when."""

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import BucketConfig
from data.captions import CaptionConfig, CaptionSource
from data.encoded import Encoding, unpack_sample
from data.filters import FilterRule
from data.index import load_index, load_rows
from data.loader import LoaderConfig, build_loader
from data.object_store import open_store
from data.shards import read_shard, verify, write_shards
from data.transforms import load_picture, to_float
from models import prng
from models.autoencoder import Autoencoder, autoencoder_fingerprint
from models.diffusion import DiffusionConfig
from models.dit import DiT, DiTConfig
from models.text_encoder import Conditioner
from tests.helpers import tiny
from tests.helpers.s3_servers import moto_server, use_endpoint
from training import encode as encode_module
from training import encode_shard as encode_shard_module
from training.config import EncodeRecipe
from training.diffusion_step import diffusion_step, stored_text
from training.encode import encode
from training.errors import Preempted, TrainingError
from training.frozen import Frozen, check_encodings
from training.run_checks import DiffusionChecks
from training.throughput import Pace

SIZES = ((32, 32), (48, 32), (40, 64), (32, 36))
NUM_SAMPLES, PER_SHARD = 20, 5
PADDINGS = ("attended", "masked")


def picture(number: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(square: bool, bad: tuple[int, ...] = ()) -> Iterator[dict]:
    for number in range(NUM_SAMPLES):
        image = picture(number, (32, 32) if square else SIZES[number % len(SIZES)])
        captions = ["a red seven", f"picture {number}", "a blue two above a dog"][: 1 + number % 3]
        meta = {"captions": [] if number in bad and number % 2 else captions, "score": number}
        key = f"{number:04d}"
        yield {"__key__": key, "png": image[:200] if number in bad and not number % 2 else image, "json": meta}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A data set for each set of arguments of `samples`."""
    folder = tmp_path_factory.mktemp("sources")

    def place(square: bool = True, bad: tuple[int, ...] = ()) -> str:
        url = folder / f"{square}-{'-'.join(map(str, bad))}"
        if not url.exists():
            write_shards(samples(square, bad), str(url), "shard", PER_SHARD)
        return str(url)

    return place


@pytest.fixture(scope="module")
def networks() -> dict[str, Frozen]:
    autoencoder = Autoencoder(tiny.AUTOENCODER)
    autoencoder.init_weights(0)
    autoencoder.set_statistics(torch.linspace(-0.2, 0.3, 4), torch.linspace(0.5, 0.8, 4))
    autoencoder.eval().requires_grad_(False)
    return {
        padding: Frozen(
            autoencoder=autoencoder,
            autoencoder_fingerprint=autoencoder_fingerprint(autoencoder),
            conditioner=Conditioner(tiny.ENCODERS, padding),
        )
        for padding in PADDINGS
    }


@pytest.fixture(autouse=True)
def ready_networks(networks: dict[str, Frozen], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "load_networks", lambda _, __, text_padding: networks[text_padding])
    monkeypatch.setattr(encode_shard_module, "_WINDOW_BATCHES", 2)  # a shard takes two windows


def recipe(shards: str, out: Path | str, **changes) -> EncodeRecipe:
    settings = {"image_size": 32, "autoencoder": "-", "text_encoders": tiny.ENCODERS, "batch_size": 2, "num_threads": 2}
    return EncodeRecipe(shards=shards, out=str(out), **(settings | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


BUCKETS = BucketConfig(multiple=8)  # 32x32, 40x24, 24x40


@pytest.mark.parametrize("text_padding", PADDINGS)
@pytest.mark.parametrize("text_dtype", ["bfloat16", "float8_e4m3fn"])
@torch.no_grad()
def test_what_is_stored_is_what_training_would_compute(
    text_padding: str, text_dtype: str, places, networks: dict[str, Frozen], tmp_path: Path
) -> None:
    source = load_index(places(square=False))
    sources = (CaptionSource(field="captions", weight=3.0), CaptionSource(field="txt"))
    settings = {"text_padding": text_padding, "text_dtype": text_dtype, "captions": CaptionConfig(sources=sources)}
    summary = encode(recipe(source.url, tmp_path, buckets=BUCKETS, crop="random", seed=3, **settings), quiet=True)
    assert summary is not None and (summary["samples"], summary["skipped"], summary["shards"]) == (20, 0, 4)
    assert verify(str(tmp_path)) == []
    index = load_index(str(tmp_path))
    assert [shard.name for shard in index.shards] == [shard.name for shard in source.shards]
    encoding = Encoding.from_dict(index.encoding, "here")
    frozen = networks[text_padding]
    assert (encoding.text_padding, encoding.text_encoders) == (text_padding, frozen.conditioner.fingerprint)
    shapes = set()
    for shard in range(4):
        rows = load_rows(index, shard)
        for row, (raw, stored) in enumerate(zip(read_shard(source, shard), read_shard(index, shard), strict=True)):
            found, number = unpack_sample(stored.image, encoding), PER_SHARD * shard + row
            shapes.add((found.width, found.height))
            assert (rows.widths[row], rows.heights[row]) == (found.width, found.height)
            whole = load_picture(raw.image, found.width, found.height, crop="random", seed=3, sample_number=number)
            posterior = frozen.autoencoder.encode(to_float(whole.pixels)[None])
            moments = torch.cat((posterior.mean, (0.5 * posterior.logvar).exp()), 1)[0]
            torch.testing.assert_close(bfloat16(found.moments), moments, rtol=2**-8, atol=1e-5)
            captions = raw.meta["captions"]
            assert found.captions == [(caption, 3.0 / len(captions)) for caption in captions]
            assert (raw.key, raw.meta, whole.size, whole.box) == (stored.key, found.meta, found.size, found.box)
            for name, text in zip(frozen.conditioner.names, frozen.conditioner.features(captions), strict=True):
                keep = text.mask if text_padding == "masked" else torch.ones_like(text.mask)
                assert found.lengths[name] == keep.sum(1).tolist()
                if text_dtype == "bfloat16":
                    torch.testing.assert_close(bfloat16(found.tokens[name]), text.tokens[keep], rtol=2**-8, atol=1e-6)
                else:
                    codes = torch.from_numpy(found.tokens[name].copy()).view(torch.float8_e4m3fn).float()
                    tokens = codes * torch.from_numpy(found.scales[name].copy())[:, None]
                    assert (tokens - text.tokens[keep]).norm() < 0.03 * text.tokens[keep].norm()
                if name != "t5":
                    torch.testing.assert_close(bfloat16(found.pooled[name]), text.pooled, rtol=2**-8, atol=1e-6)
    assert shapes == {(32, 32), (40, 24), (24, 40)}


def bfloat16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).float()


def test_a_stored_sample_of_the_posterior_is_a_function_of_its_number(places, networks, tmp_path: Path) -> None:
    for name, batch_size in (("one", 2), ("two", 5)):
        encode(recipe(places(), tmp_path / name, latents="sample", seed=7, batch_size=batch_size), quiet=True)
    one, two = (load_index(str(tmp_path / name)) for name in ("one", "two"))
    encoding = Encoding.from_dict(one.encoding, "here")
    first, again = (unpack_sample(list(read_shard(index, 2))[1].image, encoding) for index in (one, two))
    torch.testing.assert_close(bfloat16(first.moments), bfloat16(again.moments), rtol=2**-7, atol=1e-5)
    autoencoder = networks["attended"].autoencoder
    noise = prng.normal(7, prng.POSTERIOR, torch.tensor([11]), (4, 8, 8))
    pixels = np.asarray(Image.open(io.BytesIO(picture(11, (32, 32))))).copy()
    with torch.no_grad():
        posterior = autoencoder.encode(to_float(torch.from_numpy(pixels).permute(2, 0, 1))[None])
    torch.testing.assert_close(bfloat16(first.moments), posterior.sample(noise)[0], rtol=2**-8, atol=1e-5)


def test_whoever_encodes_when_the_bytes_are_the_same(places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"shards": places(square=False, bad=(7, 12)), "buckets": BUCKETS, "max_bad_fraction": 0.5}
    assert encode(recipe(out=tmp_path / "whole", **settings), quiet=True) is not None
    whole = files(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")}
    summary = encode(recipe(out=tmp_path / "whole", **settings), quiet=True)
    assert summary is not None and (summary["shards_found_done"], summary["skipped"]) == (4, 2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")} == before

    # Two ranks, one after the other; the second one is asked to stop in the middle and begins again.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert encode(recipe(out=tmp_path / "ranks", **settings), quiet=True) is None
    assert "shard-000002.tar" in files(tmp_path / "ranks") and "shard-000001.tar" not in files(tmp_path / "ranks")
    monkeypatch.setenv("RANK", "1")
    add = encode_module._Progress.add

    def add_and_stop(self, number: int) -> None:
        add(self, number)
        if self.done == PER_SHARD + 4:  # between the two windows of its second shard
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(encode_module._Progress, "add", add_and_stop)
    with pytest.raises(Preempted, match="the same command goes on"):
        encode(recipe(out=tmp_path / "ranks", **settings), quiet=True)
    assert "index.json" not in files(tmp_path / "ranks")
    monkeypatch.setattr(encode_module._Progress, "add", add)
    summary = encode(recipe(out=tmp_path / "ranks", **settings), quiet=True)
    assert summary is not None and summary["shards_found_done"] == 1
    assert files(tmp_path / "ranks") == whole


def test_a_bucket_holds_what_a_folder_holds(places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    settings = {"shards": places(square=False, bad=(7,)), "max_bad_fraction": 0.5}
    encode(recipe(out=tmp_path, **settings), quiet=True)
    with moto_server() as endpoint:
        use_endpoint(monkeypatch, endpoint)
        boto3.client("s3").create_bucket(Bucket="lab")
        summary = encode(recipe(out="s3://lab/set", **settings), quiet=True)
        assert summary is not None and summary["samples"] == 19
        store = open_store("s3://lab/set")
        assert {key: store.open_range(key).read() for key, _ in store.list()} == files(tmp_path)
        again = encode(recipe(out="s3://lab/set", **settings), quiet=True)
        assert again is not None and again["shards_found_done"] == 4
        with pytest.raises(TrainingError, match="s3://lab/set was begun with latents 'moments'"):
            encode(recipe(out="s3://lab/set", latents="sample", **settings), quiet=True)


def test_bad_samples_are_listed_and_too_many_stop_the_work(places, tmp_path: Path) -> None:
    shards = places(bad=(3, 6, 8))
    summary = encode(recipe(shards, tmp_path / "some", max_bad_fraction=0.003), quiet=True)
    assert summary is not None and (summary["samples"], summary["skipped"]) == (17, 3)
    found = {
        name: [json.loads(line) for line in content.splitlines()]
        for name, content in files(tmp_path / "some").items()
        if name.startswith("quarantine/")
    }
    assert set(found) == {"quarantine/shard-000000.jsonl", "quarantine/shard-000001.jsonl"}
    assert found["quarantine/shard-000000.jsonl"] == [{"key": "0003", "row": 3, "reason": "empty caption"}]
    assert [(line["key"], line["row"]) for line in found["quarantine/shard-000001.jsonl"]] == [("0006", 1), ("0008", 3)]
    assert all(line["reason"] for line in found["quarantine/shard-000001.jsonl"])
    with pytest.raises(TrainingError, match=r"3 of 9 samples of .* more than max_bad_fraction 0.002"):
        encode(recipe(shards, tmp_path / "few", max_bad_fraction=0.002), quiet=True)
    left = files(tmp_path / "few")
    assert "quarantine/shard-000001.jsonl" in left and "shard-000001.tar" not in left and "index.json" not in left
    with pytest.raises(TrainingError, match=r"shard-000001.tar: no sample can be used \(first: empty caption\)"):
        encode(recipe(places(bad=(5, 6, 7, 8, 9)), tmp_path / "none"), quiet=True)


def test_numbers_that_are_not_finite_are_not_stored(places, networks, tmp_path: Path, monkeypatch) -> None:
    whole = Conditioner.features

    def features(self, captions):
        found = whole(self, captions)
        for row, caption in enumerate(captions):
            if caption == "picture 4":
                found[2].tokens[row, 1, 1] = float("nan")
        return found

    monkeypatch.setattr(Conditioner, "features", features)
    summary = encode(recipe(places(), tmp_path, max_bad_fraction=0.5), quiet=True)
    assert summary is not None and summary["skipped"] == 1
    (line,) = files(tmp_path)["quarantine/shard-000000.jsonl"].splitlines()
    assert json.loads(line) == {"key": "0004", "row": 4, "reason": "the features of a caption are not finite"}


def test_two_encodings_never_share_a_place(places, tmp_path: Path) -> None:
    encode(recipe(places(), tmp_path / "out"), quiet=True)
    before = files(tmp_path / "out")
    with pytest.raises(TrainingError, match="was begun with text_padding 'attended', the recipe now gives 'masked'"):
        encode(recipe(places(), tmp_path / "out", text_padding="masked"), quiet=True)
    with pytest.raises(TrainingError, match="was begun with source"):
        encode(recipe(places(square=False), tmp_path / "out"), quiet=True)
    with pytest.raises(TrainingError, match="was begun with crop 'centre', the recipe now gives 'random'"):
        encode(recipe(places(), tmp_path / "out", crop="random"), quiet=True)
    assert files(tmp_path / "out") == before
    (tmp_path / "out" / "encoding.json").write_text("{")
    with pytest.raises(TrainingError, match="encoding.json is damaged"):
        encode(recipe(places(), tmp_path / "out"), quiet=True)
    (tmp_path / "out" / "encoding.json").unlink()
    with pytest.raises(TrainingError, match="holds index.json and no encoding.json"):
        encode(recipe(places(), tmp_path / "out"), quiet=True)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"mine")
    with pytest.raises(TrainingError, match="holds a.jpg and no encoding.json"):
        encode(recipe(places(), tmp_path / "pictures"), quiet=True)
    with pytest.raises(TrainingError, match="is encoded already"):
        encode(recipe(str(tmp_path / "out"), tmp_path / "again"), quiet=True)
    with pytest.raises(TrainingError, match="pictures of 30x30 px: both sides must be multiples of 4"):
        encode(recipe(places(), tmp_path / "odd", image_size=30), quiet=True)


def random_dit(conditioner: Conditioner) -> DiT:
    sizes = {"text_dim": conditioner.text_dim, "pooled_dim": conditioner.pooled_dim}
    dit = DiT(DiTConfig(latent_channels=4, depth=2, width=32, num_heads=2, max_grid=8, base_grid=4, **sizes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return dit


@pytest.mark.parametrize("text_padding", PADDINGS)
def test_a_step_on_stored_samples_is_the_step_on_pictures(text_padding: str, places, networks, tmp_path: Path) -> None:
    frozen = networks[text_padding]
    encode(recipe(places(), tmp_path, text_padding=text_padding), quiet=True)
    dit = random_dit(frozen.conditioner)
    arguments = {"seed": 5, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    loaders = [
        iter(build_loader(LoaderConfig(shards=url, image_size=32, num_streams=2), **arguments))
        for url in (places(), str(tmp_path))
    ]
    checks = [
        DiffusionChecks(DiffusionConfig(), frozen.conditioner, dit.config, Pace(torch.device("cpu"))) for _ in "ab"
    ]
    masks: list[torch.Tensor | None] = []

    step = partial(diffusion_step, diffusion=DiffusionConfig(), seed=5, global_batch_size=8, patch_size=2)

    def told(*arguments):
        masks.append(arguments[4])
        return dit(*arguments)

    for _, raw, stored in zip(range(8), *loaders, strict=False):
        assert raw.encoded is None and stored.encoded is not None
        assert raw.keys == stored.keys and raw.captions == stored.captions
        assert torch.equal(raw.sample_numbers, stored.sample_numbers)
        for sample_latents in (True, False):
            results = [
                step(told, batch, frozen, sample_latents=sample_latents, checks=own)
                for batch, own in zip((raw, stored), checks, strict=True)
            ]
            (loss, scalars), (stored_loss, stored_scalars) = results
            assert stored_loss.item() == pytest.approx(loss.item(), rel=2e-3)
            assert stored_scalars["latent_std"].item() == pytest.approx(scalars["latent_std"].item(), rel=2e-3)
        drop = torch.rand(4, 3, generator=torch.Generator().manual_seed(int(raw.sample_numbers[0]))) < 0.3
        text = frozen.conditioner.encode(raw.captions, drop)
        features = stored_text(frozen.conditioner, stored.encoded, torch.device("cpu"))
        found = frozen.conditioner.join(features, drop)
        torch.testing.assert_close(found.text_embeds, text.text_embeds, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(found.pooled, text.pooled, rtol=2**-8, atol=1e-6)
        assert (found.text_mask is None) == (text_padding == "attended")
        assert found.text_mask is None or torch.equal(found.text_mask, text.text_mask)
    heard = [own.text.read(own.text.numbers()[None]) for own in checks]
    assert heard[0] == heard[1] and not heard[0].complaints
    assert all(0.0 < rate < 0.5 for rate in heard[0].fields["drop_rates"].values())
    assert all((mask is None) == (text_padding == "attended") for mask in masks)


def test_encoded_data_of_other_networks_is_refused(places, networks, tmp_path: Path) -> None:
    encode(recipe(places(), tmp_path / "out"), quiet=True)
    index, frozen = load_index(str(tmp_path / "out")), networks["attended"]
    training = tiny.dit_recipe(tmp_path, tmp_path)
    check_encodings(training, frozen, [index, load_index(places())])

    def refused(message: str, recipe_=training, networks_=frozen, **changes) -> None:
        changed = replace(index, encoding={**(index.encoding or {}), **changes})
        with pytest.raises(TrainingError, match=message):
            check_encodings(recipe_, networks_, [changed])

    mine = frozen.autoencoder_fingerprint[:12]
    refused(f"out was encoded with autoencoder ffffffffffff, the recipe gives {mine}", autoencoder="f" * 64)
    refused("was encoded with text encoders 000000000000, the recipe gives", text_encoders="0" * 64)
    masked = replace(training, text_padding="masked")
    refused("was encoded with text_padding: attended, the recipe gives masked", masked, networks["masked"])
    refused("holds a sample of each posterior", replace(training, latents="mean"), latents="sample")
    refused("holds pictures of 36x32 px; their sides must be multiples of 8 up to 64", sizes=[[32, 32], [36, 32]])
    refused("holds pictures of 32x128 px", sizes=[[32, 128]])


def test_a_filter_means_the_same_on_pictures_and_on_what_was_encoded(places, tmp_path: Path) -> None:
    """Sizes are those of the original, and damage is not a reason to pass over a sample."""
    source = places(square=False)
    encode(recipe(source, tmp_path / "encoded", buckets=BUCKETS), quiet=True)
    filters = (FilterRule(field="width", min=40), FilterRule(field="score", max=16))
    keys = []
    for shards in (source, str(tmp_path / "encoded")):
        config = LoaderConfig(
            shards=shards, image_size=32, buckets=BUCKETS, filters=filters, num_streams=1, window_micro_batches=2
        )
        loader = build_loader(config, seed=0, micro_batch_size=2, rank=0, world_size=1)
        keys.append({key for batch in islice(loader, 40) for key in batch.keys})
    wide = {f"{n:04d}" for n in range(NUM_SAMPLES) if SIZES[n % len(SIZES)][0] >= 40 and n <= 16}
    assert keys == [wide, wide]
