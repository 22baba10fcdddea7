"""Filters: what a rule keeps, what it counts as missing, and which rule a sample is counted under."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.filters import FilterRule, first_failed, label
from launch.config_io import dump_yaml, from_dict, read_yaml, to_dict
from launch.errors import ConfigError

YAML = """\
filters:
  - {field: aesthetic, min: 5.0}
  - {field: punsafe, max: 0.1, missing: keep}
  - {field: LANGUAGE, one_of: [en, de]}
  - {field: width, min: 256}
"""
RULES = (
    FilterRule(field="aesthetic", min=5.0),
    FilterRule(field="punsafe", max=0.1, missing="keep"),
    FilterRule(field="LANGUAGE", one_of=("en", "de")),
    FilterRule(field="width", min=256.0),
)
GOOD = {"aesthetic": 6, "punsafe": 0.01, "LANGUAGE": "en"}


@dataclass(frozen=True, kw_only=True)
class Holder:
    filters: tuple[FilterRule, ...] = ()


def _keeps(rule: FilterRule, meta: dict[str, Any], width: int = 640, height: int = 320) -> bool:
    return first_failed([rule], meta, width, height) is None


def test_rules_come_from_a_recipe(tmp_path: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(YAML)
    rules = from_dict(Holder, read_yaml(tmp_path / "recipe.yaml")).filters
    assert rules == RULES
    assert [label(rule) for rule in rules] == ["aesthetic >= 5", "punsafe <= 0.1", "LANGUAGE in en, de", "width >= 256"]
    holder = Holder(
        filters=(*rules, FilterRule(field="n", one_of=(1, 2.5, True, "x")), FilterRule(field="b", equals=False))
    )
    back = from_dict(Holder, to_dict(holder))
    assert back == holder and [type(v) for v in back.filters[4].one_of] == [int, float, bool, str]
    assert back.filters[5].equals is False
    (tmp_path / "again.yaml").write_text(dump_yaml(holder))
    assert from_dict(Holder, read_yaml(tmp_path / "again.yaml")) == holder


def test_the_first_rule_that_fails_is_named() -> None:
    assert first_failed(RULES, GOOD, 256, 256) is None
    assert first_failed(RULES, GOOD | {"aesthetic": 4.99, "LANGUAGE": "fr"}, 100, 100) == "aesthetic >= 5"
    assert first_failed(RULES, GOOD | {"LANGUAGE": "fr"}, 100, 100) == "LANGUAGE in en, de"
    assert first_failed(RULES, GOOD, 255, 256) == "width >= 256"
    assert first_failed((), {}, 0, 0) is None


META = st.fixed_dictionaries(
    {},
    optional={
        "aesthetic": st.one_of(st.floats(0, 10), st.just("high"), st.none()),
        "punsafe": st.one_of(st.floats(0, 1), st.none()),
        "LANGUAGE": st.sampled_from(["en", "de", "fr", 3]),
    },
)


@given(st.lists(st.tuples(META, st.integers(0, 512)), max_size=30))
def test_counts_add_up(samples: list[tuple[dict[str, Any], int]]) -> None:
    counts = Counter(first_failed(RULES, meta, width, width) for meta, width in samples)
    alone = [{label(rule) for rule in RULES if not _keeps(rule, meta, width, width)} for meta, width in samples]
    assert counts[None] == sum(not failed for failed in alone)
    for place, rule in enumerate(RULES):
        earlier = {label(r) for r in RULES[:place]}
        assert counts[label(rule)] == sum(label(rule) in failed and not failed & earlier for failed in alone)
    assert sum(counts.values()) == len(samples)


@pytest.mark.parametrize("value", ["7", True, None, [7], {"x": 7}, float("nan"), float("inf")])
def test_what_is_no_number_counts_as_missing_for_bounds(value: Any) -> None:
    assert not _keeps(FilterRule(field="x", min=0), {"x": value})
    assert _keeps(FilterRule(field="x", min=0, missing="keep"), {"x": value})
    assert not _keeps(FilterRule(field="x", min=0), {}) and _keeps(FilterRule(field="x", min=0, missing="keep"), {})


def test_values_are_compared_within_their_type() -> None:
    one = FilterRule(field="x", equals=1)
    assert _keeps(one, {"x": 1}) and _keeps(one, {"x": 1.0})
    assert not _keeps(one, {"x": True}) and not _keeps(one, {"x": "1"}) and not _keeps(one, {"x": 2})
    true = FilterRule(field="x", equals=True)
    assert _keeps(true, {"x": True}) and not _keeps(true, {"x": False}) and not _keeps(true, {"x": 1})
    mixed = FilterRule(field="x", one_of=("a", 1), missing="keep")
    assert _keeps(mixed, {"x": "a"}) and _keeps(mixed, {"x": True}) and not _keeps(mixed, {"x": "b"})
    assert not _keeps(FilterRule(field="x", equals="a", missing="keep"), {"x": "b"})  # there, and another


def test_bounds_are_inclusive_and_go_together() -> None:
    both = FilterRule(field="x", min=1, max=2)
    assert [_keeps(both, {"x": x}) for x in (0.99, 1, 1.5, 2, 2.01)] == [False, True, True, True, False]
    assert label(both) == "1 <= x <= 2" and label(FilterRule(field="x", min=0.125)) == "x >= 0.125"


def test_sizes_come_from_the_index_alone() -> None:
    meta = {"width": 10, "height": 10, "pixels": 1, "aspect_ratio": 9.0}
    for field, value in (("width", 640), ("height", 320), ("pixels", 640 * 320), ("aspect_ratio", 2.0)):
        assert _keeps(FilterRule(field=field, min=value, max=value), meta)
    assert _keeps(FilterRule(field="aspect_ratio", equals=2.0), meta, 320, 640)  # longest over shortest side
    assert not _keeps(FilterRule(field="width", min=0), meta, 0, 0)
    assert _keeps(FilterRule(field="width", min=1000, missing="keep"), meta, 0, 0)


def test_dotted_names_reach_into_objects() -> None:
    rule = FilterRule(field="scores.clip", min=0.3)
    assert _keeps(rule, {"scores": {"clip": 0.4}}) and not _keeps(rule, {"scores": {"clip": 0.2}})
    assert not _keeps(rule, {"scores": 0.4}) and not _keeps(rule, {"scores": {}}) and not _keeps(rule, {})
    assert _keeps(rule, {"scores.clip": 0.5, "scores": {"clip": 0.1}})  # the plain name comes first


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"field": "", "min": 1}, "field is empty"),
        ({"field": "x"}, "needs either"),
        ({"field": "x", "min": 1, "equals": 2}, "needs either"),
        ({"field": "x", "one_of": [1], "equals": 1}, "needs either"),
        ({"field": "x", "min": 2, "max": 1}, "above"),
        ({"field": "x", "min": "5"}, "expected a number"),
        ({"field": "x", "min": 5, "missing": "ignore"}, "missing"),
        ({"field": "x", "minimum": 5}, "did you mean"),
    ],
)
def test_impossible_rules_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        from_dict(Holder, {"filters": [values]}, "recipe 'x'")
    assert "\n" not in str(error.value)
