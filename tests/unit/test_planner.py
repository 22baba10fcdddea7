"""The formula of a rank's memory."""

import pytest

from launch.planner import state_bytes

N = 1_000_000


def per_parameter(**options) -> dict[str, float]:
    return {part: size / N for part, size in state_bytes(N, **options).items()}


def test_many_ranks_leave_what_the_paper_says_of_mixed_precision():
    """arXiv:1910.02054, sec. 5: 2 + 2 + 12/W, 2 + 14/W and 16/W bytes per parameter, and the average's 4/W."""
    many = {"world_size": N, "compute_bytes": 2}
    assert sum(per_parameter(zero_stage=1, **many).values()) == pytest.approx(4, abs=1e-4)
    assert sum(per_parameter(zero_stage=2, **many).values()) == pytest.approx(2, abs=1e-4)
    assert sum(per_parameter(zero_stage=3, **many).values()) == pytest.approx(0, abs=1e-4)


def test_every_stage_holds_no_more_than_the_one_before():
    for world_size in (2, 8, 64):
        for compute_bytes in (2, 4):
            totals = [
                sum(state_bytes(N, zero_stage=stage, world_size=world_size, compute_bytes=compute_bytes).values())
                for stage in (0, 1, 2, 3)
            ]
            assert totals == sorted(totals, reverse=True), (world_size, compute_bytes, totals)


def test_parts_of_two_ranks_in_float32():
    def of(stage: int) -> dict[str, float]:
        return per_parameter(zero_stage=stage, world_size=2, compute_bytes=4, averages=2)

    assert of(0) == {"weights": 4, "gradients": 8, "masters": 0, "moments": 8, "averages": 8}
    assert of(1) == {"weights": 4, "gradients": 4, "masters": 2, "moments": 4, "averages": 4}
    assert of(2) == {"weights": 4, "gradients": 4, "masters": 2, "moments": 4, "averages": 4}
    assert of(3) == {"weights": 2, "gradients": 4, "masters": 2, "moments": 4, "averages": 4}


def test_offload_leaves_weights_and_passing_gradients_on_the_device():
    for stage in (1, 2, 3):
        parts = per_parameter(zero_stage=stage, world_size=4, compute_bytes=2, offload=True)
        assert {part for part in parts if not part.startswith("host_")} <= {"weights", "gradients"}
        assert parts["host_moments"] == 2 and parts["host_masters"] == parts["host_averages"] == 1


@pytest.mark.parametrize("options", [{"zero_stage": 4}, {"zero_stage": 0, "offload": True}])
def test_what_is_not_there_is_refused(options):
    with pytest.raises(ValueError, match="zero_stage"):
        state_bytes(N, world_size=2, compute_bytes=4, **options)
