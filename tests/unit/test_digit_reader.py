"""The reader of digit pictures, on the real sample, and the scores of prompt following."""

from pathlib import Path

import pytest
import torch

from data.digits import COLOURS, write_digits
from data.digits import LAYOUTS as DATA_LAYOUTS
from eval.config import EvalData, EvalRecipe, ReaderConfig
from eval.digit_reader import IMAGE_SIZE, LAYOUTS, DigitReader, fit_reader, label, load_reader, save_reader
from eval.errors import EvalError
from eval.features import DigitFeatures, feature_statistics
from eval.fid import frechet_distance
from eval.held_out import HeldOut, load_held_out
from eval.prompt_following import Scores, Shown, judge, score, shown_by_meta, table
from models.errors import ModelError

NAMES = tuple(COLOURS)
SMALL = ReaderConfig(num_pictures=1024, epochs=8, batch_size=32)


def fitted(root: Path, config: ReaderConfig) -> tuple[DigitReader, float, HeldOut]:
    train = load_held_out(str(root / "train"), IMAGE_SIZE, config.num_pictures)
    reader, fit_s = fit_reader(config, label(zip(train.keys, train.pictures, train.metas, strict=True), NAMES), NAMES)
    return reader, fit_s, train


def read_real(reader: DigitReader, root: Path, split: str) -> tuple[Scores, HeldOut]:
    held_out = load_held_out(str(root / split), IMAGE_SIZE, 512)
    expected = [shown_by_meta(meta, key) for meta, key in zip(held_out.metas, held_out.keys, strict=True)]
    return score([judge(a, b) for a, b in zip(expected, reader.read(held_out.pictures), strict=True)]), held_out


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digits(str(root), num_train=SMALL.num_pictures, num_test=96, num_combinations=32)
    return root


@pytest.fixture(scope="module")
def small(digits: Path) -> tuple[DigitReader, HeldOut]:
    reader, _, train = fitted(digits, SMALL)
    return reader, train


def test_the_reader_knows_the_sample() -> None:
    assert LAYOUTS == DATA_LAYOUTS


def test_a_few_pictures_teach_it_to_read_held_out_ones(small, digits: Path) -> None:
    scores, _ = read_real(small[0], digits, "test")
    assert scores.count > 0.95
    assert scores.colour > 0.85
    assert scores.digit > 0.5  # chance 0.1; the full fit reads far more, see the long test


def test_colours_do_not_betray_digits(small) -> None:
    """Recoloured ink reads as the same digits and layout, and moved strokes as the same colour."""
    reader, train = small
    pictures = train.pictures[:200]
    recoloured = pictures[:, [2, 0, 1]]  # red, green, blue change places
    for plain, other in zip(reader.read(pictures), reader.read(recoloured), strict=True):
        assert (plain.layout, plain.digits) == (other.layout, other.digits)


def test_the_fit_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(small, digits: Path) -> None:
    _, train = small
    few = ReaderConfig(num_pictures=64, epochs=1, batch_size=32)
    samples = list(zip(train.keys, train.pictures, train.metas, strict=True))[:64]
    data = label(samples, NAMES)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = fit_reader(few, data, NAMES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, _ = fit_reader(few, data, NAMES)
    other, _ = fit_reader(ReaderConfig(num_pictures=64, epochs=1, batch_size=32, seed=1), data, NAMES)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_saved_and_loaded_it_reads_the_same(small, tmp_path: Path) -> None:
    reader, train = small
    assert save_reader(tmp_path / "reader", reader) == reader.fingerprint
    loaded = load_reader(tmp_path / "reader")
    assert loaded.fingerprint == reader.fingerprint
    assert loaded.read(train.pictures[:50]) == reader.read(train.pictures[:50])
    with pytest.raises(ModelError, match="never overwritten"):
        save_reader(tmp_path / "reader", reader)


def test_the_distance_grows_with_the_damage(small, digits: Path) -> None:
    reader, train = small
    network = DigitFeatures(reader)
    reference = feature_statistics(network, load_held_out(str(digits / "test"), IMAGE_SIZE, 96).pictures)
    pictures = train.pictures[:256]
    noise = torch.randint(-60, 61, pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = (pictures + noise).clamp(0, 255).to(torch.uint8)
    one_colour = pictures.amax(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    plain = frechet_distance(feature_statistics(network, pictures), reference)
    assert frechet_distance(feature_statistics(network, noisy), reference) > 1.5 * plain
    assert frechet_distance(feature_statistics(network, one_colour), reference) > 1.5 * plain
    assert network(pictures).shape == (256, 128)


def test_other_sizes_and_other_data_are_refused(small) -> None:
    with pytest.raises(EvalError, match="32x32 pictures, got 64x64"):
        small[0].read(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    with pytest.raises(EvalError, match="sample cat-1 has no digit JSON"):
        label([("cat-1", picture, {})], NAMES)
    odd = {"layout": "single", "objects": [{"digit": 1, "colour": "mauve"}]}
    with pytest.raises(EvalError, match="mauve"):
        label([("x", picture, odd)], NAMES)
    with pytest.raises(EvalError, match="no pictures"):
        label([], NAMES)


def pair(*digits: int, colours: tuple[str, ...] = ("red", "blue"), layout: str = "horizontal") -> Shown:
    return Shown(layout=layout, digits=digits, colours=colours[: len(digits)])


@pytest.mark.parametrize(
    ("read", "count", "digits", "colours"),
    [
        (pair(7, 3), True, (True, True), (True, True)),
        (pair(7, 4), True, (True, False), (True, True)),
        (pair(3, 7), True, (False, False), (True, True)),  # the right digits in the wrong places
        (pair(7, 3, colours=("blue", "blue")), True, (True, True), (False, True)),
        (pair(7, 3, layout="vertical"), True, (False, False), (False, False)),
        (pair(7, layout="single"), False, (False, False), (False, False)),
    ],
)
def test_an_object_is_right_only_in_its_place(read: Shown, count: bool, digits: tuple, colours: tuple) -> None:
    verdict = judge(pair(7, 3), read)
    assert (verdict.count, verdict.digits, verdict.colours) == (count, digits, colours)


def test_scores_weigh_objects_not_pictures() -> None:
    single = pair(1, layout="single")
    verdicts = [judge(single, single), judge(pair(7, 3), pair(7, 4)), judge(pair(7, 3), single)]
    scores = score(verdicts)
    assert scores == Scores(colour=3 / 5, digit=2 / 5, count=2 / 3, num_pictures=3, num_objects=5)
    with pytest.raises(EvalError, match="no pictures to score"):
        score([])
    assert table(scores, scores)["digit"] == {"generated": 2 / 5, "real": 2 / 5}
    assert set(table(scores, scores, scores, scores)["count"]) == {
        "generated",
        "held_out_combinations",
        "real",
        "real_held_out_combinations",
    }


def test_recipes_that_cannot_work_say_so() -> None:
    with pytest.raises(ValueError, match=r"data\.train: missing"):
        EvalRecipe(model="m", data=EvalData(test="t"), reader=ReaderConfig())
    with pytest.raises(ValueError, match=r"reader: missing"):
        EvalRecipe(model="m", data=EvalData(test="t", combinations="c"))
    with pytest.raises(ValueError, match=r"num_prompts: 0"):
        EvalRecipe(model="m", data=EvalData(test="t"), num_prompts=0)


@pytest.mark.all
def test_the_full_fit_reads_real_held_out_pictures(tmp_path: Path) -> None:
    """The upper bound of the demo's prompt following, as its own recipe fits the reader."""
    write_digits(str(tmp_path))
    reader, fit_s, _ = fitted(tmp_path, ReaderConfig())
    for split in ("test", "combinations"):
        scores, _ = read_real(reader, tmp_path, split)
        print(f"{split}: {scores}, fitted in {fit_s:.1f} s")
        assert scores.digit >= 0.96
        assert scores.colour >= 0.99
        assert scores.count >= 0.995
