"""Buckets: the shapes a resolution has, which one a picture gets, and how a window is cut into micro-batches."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buckets import BucketConfig, Size, assign_buckets, group_window, make_buckets
from launch.config_io import dump_yaml, from_dict, to_dict
from launch.errors import ConfigError

CONFIGS = st.builds(
    BucketConfig,
    resolutions=st.lists(st.sampled_from([64, 128, 192, 256, 512, 768, 1024]), min_size=1, max_size=3, unique=True).map(
        tuple
    ),
    max_aspect_ratio=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    multiple=st.sampled_from([16, 32, 64]),
)
SHAPES = st.sampled_from(make_buckets(256, BucketConfig(resolutions=(256, 512), max_aspect_ratio=2.5)))
WINDOWS = st.integers(1, 8).flatmap(
    lambda size: st.tuples(
        st.just(size), st.integers(0, 12).flatmap(lambda n: st.lists(SHAPES, min_size=n * size, max_size=n * size))
    )
)


# --- the shapes ---------------------------------------------------------------------------------------------------


def test_without_a_config_there_is_one_square() -> None:
    assert make_buckets(100, None) == ((100, 100),)


def test_the_shapes_of_256_and_1024_pixels() -> None:
    assert make_buckets(256, BucketConfig()) == ((192, 320), (256, 256), (320, 192))
    assert make_buckets(256, BucketConfig(max_aspect_ratio=1.0)) == ((256, 256),)
    wide = [size for size in make_buckets(1024, BucketConfig()) if size[0] > size[1]]
    assert wide == [(1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704)]


@settings(max_examples=50, deadline=None)
@given(CONFIGS)
def test_every_resolution_has_its_square_and_both_orientations(config: BucketConfig) -> None:
    buckets = make_buckets(256, config)
    assert len(set(buckets)) == len(buckets)
    for resolution in config.resolutions:
        assert (resolution, resolution) in buckets
    for width, height in buckets:
        assert width % config.multiple == height % config.multiple == 0
        assert max(width, height) <= config.max_aspect_ratio * min(width, height)
        assert (height, width) in buckets
        # Of some resolution, and the long side could not bear a longer short side.
        long, short = max(width, height), min(width, height)
        assert any(long * short <= r * r < long * (short + config.multiple) for r in config.resolutions)


def test_shapes_are_sorted_by_resolution_and_aspect() -> None:
    buckets = make_buckets(0, BucketConfig(resolutions=(512, 256)))
    assert buckets[:3] == ((192, 320), (256, 256), (320, 192)) and buckets[5] == (512, 512)
    aspects = [width / height for width, height in buckets[3:]]
    assert aspects == sorted(aspects)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"multiple": 0}, "at least 1"),
        ({"max_aspect_ratio": 0.5}, "longest over shortest"),
        ({"max_aspect_ratio": math.nan}, "longest over shortest"),
        ({"resolutions": (256, 256)}, "given twice"),
        ({"resolutions": (250,)}, "no multiple"),
        ({"resolutions": (0,)}, "no multiple"),
    ],
)
def test_impossible_configs_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        BucketConfig(**values)
    assert "\n" not in str(error.value)


def test_an_image_size_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="resolution 100 is no multiple of multiple=64"):
        make_buckets(100, BucketConfig())


def test_silly_numbers_are_refused_before_they_cost_memory() -> None:
    with pytest.raises(ValueError, match="resolution 8001 is more than 8000 px"):
        make_buckets(8001, None)
    with pytest.raises(ValueError, match="resolution 1000000000 is more"):
        BucketConfig(resolutions=(1_000_000_000,), multiple=1)
    with pytest.raises(ValueError, match="multiple=1: more than 10000 buckets of resolution 8000; raise it"):
        make_buckets(8000, BucketConfig(max_aspect_ratio=1e9, multiple=1))


def test_the_config_is_a_part_of_a_recipe() -> None:
    config = from_dict(BucketConfig, {"resolutions": [256, 512], "max_aspect_ratio": 2})
    assert config == BucketConfig(resolutions=(256, 512)) and from_dict(BucketConfig, to_dict(config)) == config
    assert "resolutions" in dump_yaml(config)
    with pytest.raises(ConfigError, match="250"):
        from_dict(BucketConfig, {"resolutions": [250]})


# --- a picture's bucket -------------------------------------------------------------------------------------------


def test_a_picture_goes_to_the_nearest_aspect_of_the_largest_resolution_it_fills() -> None:
    buckets = make_buckets(0, BucketConfig(resolutions=(256, 512)))
    sizes = [(256, 256), (600, 600), (511, 600), (640, 384), (4000, 1000), (10, 10), (0, 0)]
    chosen = [buckets[n] for n in assign_buckets(*np.array(sizes).T, buckets)]
    # 511 x 600 fills 448 x 576, which is nearer in aspect than the square it would not fill.
    assert chosen == [(256, 256), (512, 512), (448, 576), (640, 384), (640, 384), (256, 256), (256, 256)]


@settings(max_examples=100, deadline=None)
@given(CONFIGS, st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), min_size=1, max_size=50))
def test_nothing_is_enlarged_without_need(config: BucketConfig, sizes: list[Size]) -> None:
    buckets = make_buckets(256, config)
    chosen = assign_buckets([w for w, _ in sizes], [h for _, h in sizes], buckets)
    per_resolution = [make_buckets(resolution, BucketConfig(**_shape_of(config))) for resolution in config.resolutions]
    for (width, height), number in zip(sizes, chosen.tolist(), strict=True):
        bucket = buckets[number]
        if not (width and height):
            continue
        nearest = [
            min(group, key=lambda b: abs(_log_aspect(b) - _log_aspect((width, height)))) for group in per_resolution
        ]
        filled = [b for b in nearest if b[0] <= width and b[1] <= height]
        if filled:
            assert bucket[0] <= width and bucket[1] <= height
            assert bucket[0] * bucket[1] >= max(w * h for w, h in filled) * (1 - 1e-9)
        # Nearest in aspect among the shapes of its own resolution.
        own = next(group for group in per_resolution if bucket in group)
        best = min(abs(_log_aspect(b) - _log_aspect((width, height))) for b in own)
        assert abs(_log_aspect(bucket) - _log_aspect((width, height))) <= best + 1e-9


def test_huge_sides_do_not_overflow() -> None:
    buckets = make_buckets(0, BucketConfig(resolutions=(1024,)))
    chosen = assign_buckets([2**31 - 1, 1], [1, 2**31 - 1], buckets)
    assert [buckets[n] for n in chosen] == [(1408, 704), (704, 1408)]


def _shape_of(config: BucketConfig) -> dict[str, Any]:
    return {"max_aspect_ratio": config.max_aspect_ratio, "multiple": config.multiple}


def _log_aspect(size: Size) -> float:
    return math.log(size[0] / size[1])


# --- windows ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(WINDOWS, st.booleans())
def test_a_window_is_cut_into_whole_micro_batches(window: tuple[int, list[Size]], fixed: bool) -> None:
    size, own = window
    groups = group_window(own, size, fixed)
    assert all(len(members) == size for _, members in groups)
    assert sorted(place for _, members in groups for place in members) == list(range(len(own)))
    assert groups == group_window(np.array(own).reshape(-1, 2), size, fixed)  # arrays do too


@settings(max_examples=200, deadline=None)
@given(WINDOWS, st.booleans())
def test_full_groups_come_first_and_keep_their_order_and_shape(window: tuple[int, list[Size]], fixed: bool) -> None:
    size, own = window
    waiting: dict[Size, list[int]] = {}
    expected = []
    for place, shape in enumerate(own):  # a reader that fills boxes
        box = waiting.setdefault(shape, [])
        box.append(place)
        if len(box) == size:
            expected.append((shape, box.copy()))
            box.clear()
    assert group_window(own, size, fixed)[: len(expected)] == expected


@settings(max_examples=200, deadline=None)
@given(WINDOWS)
def test_leftover_pictures_take_a_shape_of_their_own_run(window: tuple[int, list[Size]]) -> None:
    size, own = window
    groups = group_window(own, size, fixed=False)
    left = groups[sum(own.count(shape) // size for shape in set(own)) :]
    for target, members in left:
        shapes = [own[place] for place in members]
        assert target in shapes
        # Of the smallest resolution in the run: areas within one resolution differ by less than 30 %.
        assert target[0] * target[1] * 0.7 <= min(w * h for w, h in shapes)
    # Runs are cut from a line: resolutions ascend, and within one a shape stands in one stretch.
    line = [own[place] for _, members in left for place in members]
    ranks = [w * h > 256 * 256 for w, h in line]
    assert ranks == sorted(ranks)
    stretches = [shape for n, shape in enumerate(line) if n == 0 or line[n - 1] != shape]
    assert len(set(stretches)) == len(stretches)
    for rank in (False, True):
        aspects = [w / h for (w, h), r in zip(line, ranks, strict=True) if r == rank]
        assert aspects in (sorted(aspects), sorted(aspects, reverse=True))


@settings(max_examples=200, deadline=None)
@given(WINDOWS)
def test_fixed_samples_are_only_ever_cut(window: tuple[int, list[Size]]) -> None:
    size, own = window
    for (width, height), members in group_window(own, size, fixed=True):
        assert width == min(own[place][0] for place in members)
        assert height == min(own[place][1] for place in members)


def test_portraits_and_landscapes_of_one_area_are_not_mixed() -> None:
    portrait, square, landscape = (192, 320), (256, 256), (320, 192)
    own = [portrait, landscape, square, landscape, portrait, square]
    shapes = [shape for shape, _ in group_window(own, 3, fixed=False)]
    # Sorted by area alone, the run of the four oblong ones would hold both orientations.
    assert [members for _, members in group_window(own, 3, fixed=False)] in (
        [[1, 3, 2], [5, 0, 4]],
        [[0, 4, 2], [5, 1, 3]],
    )
    assert set(shapes) == {portrait, landscape}


def test_a_run_across_resolutions_takes_the_smaller_one() -> None:
    own = [(512, 512), (256, 256), (512, 512), (512, 512)]
    assert group_window(own, 4, fixed=False) == [((256, 256), [1, 0, 2, 3])]
    assert group_window(own, 4, fixed=True) == [((256, 256), [1, 0, 2, 3])]


def test_unreadable_samples_go_with_others_and_never_set_the_shape() -> None:
    assert group_window([(0, 0), (512, 512)], 2, fixed=True) == [((512, 512), [0, 1])]


def test_a_window_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="3 samples is no multiple of micro_batch_size=2"):
        group_window([(64, 64)] * 3, 2, fixed=False)
