"""Counter-based random numbers: known answers, independence of the batch, and the right distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from models import prng
from models.errors import ModelError

WORD = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the authors of Random123 publish for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(word.item() for word in prng.philox((c0, c1, c2, c3), key)) == expected


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_a_value_depends_on_its_own_sample_alone(numbers, seed, data):
    batch = torch.tensor(numbers)
    order = torch.tensor(data.draw(st.permutations(range(len(numbers)))))
    for draw in (prng.uniform, prng.normal):
        together = draw(seed, prng.NOISE, batch, (2, 3))
        assert torch.equal(draw(seed, prng.NOISE, batch[order], (2, 3)), together[order])
        assert torch.equal(draw(seed, prng.NOISE, batch[-1:], (2, 3)), together[-1:])


def test_every_part_of_the_address_matters():
    def draw(seed=1, stream=prng.NOISE, number=1):
        return prng.normal(seed, stream, torch.tensor([number]), (8,))

    others = [
        draw(seed=2),
        draw(seed=1 + 2**32),
        draw(stream=prng.TIME),
        draw(stream=prng.POSTERIOR),
        draw(number=2),
        draw(number=1 + 2**32),
    ]
    values = torch.cat([draw(), *others]).flatten()
    assert values.unique().numel() == values.numel()


def test_elements_do_not_depend_on_how_many_are_drawn():
    numbers = torch.arange(5)
    long = prng.uniform(3, prng.TIME, numbers, (11,))
    assert torch.equal(prng.uniform(3, prng.TIME, numbers, (6,)), long[:, :6])
    assert torch.equal(prng.uniform(3, prng.TIME, numbers), long[:, 0])


def test_shapes_and_types():
    assert prng.uniform(0, prng.TIME, torch.arange(4)).shape == (4,)
    noise = prng.normal(0, prng.NOISE, torch.arange(4), (3, 2, 5))
    assert noise.shape == (4, 3, 2, 5) and noise.dtype == torch.float32
    assert prng.normal(0, prng.NOISE, torch.arange(0), (3,)).shape == (0, 3)


def test_distributions():
    uniforms = prng.uniform(7, prng.TIME, torch.arange(2000), (13,))
    normals = prng.normal(7, prng.NOISE, torch.arange(2000), (13,))
    assert uniforms.min() > 0.0 and uniforms.max() < 1.0
    assert stats.kstest(uniforms.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normals.flatten().numpy(), "norm").pvalue > 1e-3
    n = normals.numel()
    assert abs(normals.mean()) < 4 / math.sqrt(n)
    assert abs(normals.var() - 1) < 4 * math.sqrt(2 / n)
    correlation = torch.corrcoef(normals.T) - torch.eye(13)  # between elements, the two of a Box-Muller pair included
    assert correlation.abs().max() < 5 / math.sqrt(2000)
    neighbours = torch.corrcoef(torch.stack((normals[:-1].flatten(), normals[1:].flatten())))[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(n)


def test_uniforms_stay_inside_for_extreme_words(monkeypatch):
    for word in (0, WORD):
        monkeypatch.setattr(prng, "philox", lambda counter, key, word=word: (torch.full_like(counter[0], word),) * 4)
        value = prng.uniform(0, prng.TIME, torch.arange(1)).item()
        assert 0.0 < value < 1.0
        assert torch.isfinite(prng.normal(0, prng.NOISE, torch.arange(1), (4,))).all()


@pytest.mark.parametrize(("seed", "stream"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_out_of_range_is_a_users_mistake(seed, stream):
    with pytest.raises(ModelError, match="out of range") as caught:
        prng.uniform(seed, stream, torch.arange(2))
    assert caught.value.exit_code == 2


def test_numbers_must_be_whole():
    with pytest.raises(ValueError, match="int64"):
        prng.uniform(0, 0, torch.rand(3))
