"""Captions: where they come from, how they are drawn, and that a run without sources draws what it always drew."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from data.captions import CaptionConfig, CaptionSource, candidates, choose_caption, choose_index
from launch.config_io import from_dict, to_dict
from launch.errors import ConfigError

MIXED = CaptionConfig(
    sources=(
        CaptionSource(field="txt", weight=1.0),
        CaptionSource(field="long", weight=3.0),
        CaptionSource(field="tags"),
    )
)


def test_without_sources_the_draws_are_pinned() -> None:
    """A demo's figures and every old run hang on these."""
    five = {"captions": list("abcde")}
    drawn = "".join(choose_caption("t", five, 3, number) for number in range(48))
    assert drawn == "aaccdcdcebbcdbecacdddcdaaecadaecaeabbddeeebbcced"
    doubled = {"captions": ["a", "b", " a ", "", None, 5, "c"]}
    drawn = "".join(choose_caption("t", doubled, 0, number) for number in range(48))
    assert drawn == "bbabaaaacacccbbbaccbbbbaaaaccaabaabaacbcacabbbaa"
    drawn = "".join(choose_caption(None, {"captions": list("xyz")}, 2**62, 10**12 + n) for n in range(24))
    assert drawn == "zxzyzzyxxxyzyzxzyyxyzyxy"


def test_without_sources_the_list_comes_before_the_text_before_the_field() -> None:
    meta: dict[str, Any] = {"captions": ["one", "two"], "caption": "field"}
    assert choose_caption(" a \n b ", meta) == "one"
    assert choose_caption(" a \n b ", {"captions": ["", 3], "caption": "field"}) == "a b"
    assert choose_caption(" ", {"captions": "no list", "caption": " the  field "}) == "the field"
    assert choose_caption(None, {"caption": ["no text"]}) == choose_caption(None, {}) == ""
    assert candidates("t", meta) == [("one", 0.5), ("two", 0.5)] and candidates(" t ", {}) == [("t", 1.0)]
    assert candidates(None, {}) == []


def test_sources_share_by_weight_and_lists_share_theirs_evenly() -> None:
    meta = {"long": " a  long\ttext ", "tags": ["x", "", "y", None, "x", 7], "caption": "unused"}
    found = dict(candidates("short", meta, MIXED))
    assert found == {"short": 1.0, "a long text": 3.0, "x": pytest.approx(2 / 3), "y": pytest.approx(1 / 3)}
    # A source that the sample lacks leaves the draws to the others.
    assert candidates(None, {"long": 5, "tags": "just text"}, MIXED) == [("just text", 1.0)]
    assert candidates(None, {"caption": "unused"}, MIXED) == [] and choose_caption(None, {}, 0, 1, MIXED) == ""


def test_without_a_number_the_heaviest_comes_first() -> None:
    assert choose_caption("short", {"long": "long one"}, config=MIXED) == "long one"
    assert choose_caption("short", {"tags": ["x", "y"]}, config=MIXED) == "short"


def test_frequencies_match_the_weights() -> None:
    meta = {"long": "long", "tags": ["x", "y"]}
    counts = Counter(choose_caption("short", meta, 11, number, MIXED) for number in range(4000))
    expected = {"short": 800, "long": 2400, "x": 400, "y": 400}
    assert set(counts) == set(expected)
    assert chisquare([counts[text] for text in expected], list(expected.values())).pvalue > 0.01
    equal = Counter(choose_caption(None, {"captions": list("abcd")}, 5, number) for number in range(4000))
    assert chisquare([equal[text] for text in "abcd"]).pvalue > 0.01


@given(st.integers(0, 2**63), st.integers(0, 2**40), st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_a_draw_is_a_function_of_seed_and_number(seed: int, number: int, weights: list[float]) -> None:
    place = choose_index(weights, seed, number)
    assert 0 <= place < len(weights) and place == choose_index(weights, seed, number)
    doubled = choose_index([2 * weight for weight in weights], seed, number)
    assert doubled == place  # weights are relative


def test_draws_differ_between_seeds_and_numbers() -> None:
    meta = {"long": "long", "tags": ["x", "y"]}
    by_seed = [[choose_caption("short", meta, seed, n, MIXED) for n in range(50)] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1] and len(set(by_seed[0])) > 1


@pytest.mark.parametrize(
    ("max_chars", "expected"),
    [(None, "two words more"), (14, "two words more"), (13, "two words"), (9, "two words"), (8, "two"), (2, "tw")],
)
def test_captions_are_cut_between_words(max_chars: int | None, expected: str) -> None:
    assert choose_caption(" two  words more", {}, config=CaptionConfig(max_chars=max_chars)) == expected


def test_texts_that_are_alike_after_the_cut_are_one() -> None:
    config = CaptionConfig(sources=(CaptionSource(field="a"), CaptionSource(field="b")), max_chars=5)
    assert candidates(None, {"a": "hello there", "b": "hello you"}, config) == [("hello", 2.0)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sources": [{"field": ""}]}, "field is empty"),
        ({"sources": [{"field": "txt", "weight": 0}]}, "above 0"),
        ({"sources": [{"field": "txt"}, {"field": "txt"}]}, "given twice"),
        ({"max_chars": 0}, "at least 1"),
        ({"sources": [{"feild": "txt"}]}, "field"),
    ],
)
def test_impossible_configs_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        from_dict(CaptionConfig, values)
    assert "\n" not in str(error.value)


def test_the_config_is_a_part_of_a_recipe() -> None:
    config = from_dict(CaptionConfig, {"sources": [{"field": "txt"}, {"field": "long", "weight": 3}], "max_chars": 300})
    assert config.sources[1].weight == 3.0 and from_dict(CaptionConfig, to_dict(config)) == config
