"""The policy of bad steps against plain restatements of it."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.step_policy import StepPolicy, StepPolicyConfig

CONFIG = StepPolicyConfig(spike_factor=3.0, spike_quantile=0.5, window=5, min_norms=2, max_bad_steps=3)
NORMS = st.lists(
    st.one_of(st.floats(0, 100), st.just(1.0), st.sampled_from([math.nan, math.inf])), min_size=1, max_size=40
)


def judged(policy: StepPolicy, norm: float) -> bool:
    left_out = policy.judge(norm)
    assert (policy.close_step() is not None) == left_out
    return left_out


@given(NORMS)
def test_a_step_is_bad_if_not_finite_or_far_above_the_good_ones_before(norms):
    policy, good, in_a_row, bad = StepPolicy(CONFIG), [], 0, 0
    for norm in norms:
        window = sorted(good[-5:])
        limit = 3 * window[(len(window) - 1) // 2] if len(window) >= 2 else math.inf
        spike = 0 < limit < norm
        expected = not math.isfinite(norm) or spike
        assert judged(policy, norm) == expected
        good += [] if expected else [norm]
        in_a_row, bad = (in_a_row + 1, bad + 1) if expected else (0, bad)
        assert (policy.bad_in_a_row, policy.skipped_steps) == (in_a_row, bad)
        assert policy.gives_up == (in_a_row >= 3)


@given(NORMS, st.integers(0, 40))
def test_a_resume_at_any_step_decides_alike(norms, cut):
    whole = StepPolicy(CONFIG)
    for norm in norms[:cut]:
        judged(whole, norm)
    resumed = StepPolicy(CONFIG)
    resumed.load(json.loads(json.dumps(whole.state())))
    assert [judged(whole, norm) for norm in norms[cut:]] == [judged(resumed, norm) for norm in norms[cut:]]
    assert whole.state() == resumed.state()


def test_without_a_factor_only_what_is_not_finite_is_bad():
    policy = StepPolicy(StepPolicyConfig(spike_factor=0, min_norms=1))
    assert [judged(policy, norm) for norm in (1.0, 1.0, 1e30, math.inf)] == [False, False, False, True]


def test_a_discriminator_follows_the_generator_and_knows_no_spikes():
    policy = StepPolicy(CONFIG)
    for norm in (1.0, 1.0):
        judged(policy, norm)
    policy.judge(1.0)
    assert not policy.judge_discriminator(1e9)
    assert policy.close_step() is None
    policy.judge(1e9)
    assert policy.judge_discriminator(1.0)
    assert policy.close_step().reason == "spike"
    policy.judge(2.0)
    assert policy.judge_discriminator(math.nan)
    assert policy.close_step().reason == "discriminator"
    assert policy.state()["norms"] == [1.0, 1.0, 1.0, 2.0]  # the generator's update was made


@settings(max_examples=300)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=5, max_size=80))
def test_a_roll_back_goes_to_the_newest_weights_that_none_took_away(steps):
    """Against a run that keeps its weights as the list of steps applied. A commit may come at any step, amid bad ones
    too, as when the run is stopped there."""
    policy = StepPolicy(CONFIG)
    weights: list[int] = []
    commits: dict[int, tuple[list[int], dict]] = {}  # those that no roll-back took away
    told: list[int] = []  # commits of the last roll-backs in a row to the same one
    for step, (bad, dice) in enumerate(steps):
        if policy.gives_up:
            first_bad = step - policy.bad_in_a_row
            limit = policy.trusted(first_bad)
            mine = [s for s in commits if s <= first_bad]
            if not mine:
                return
            assert max(mine) == max(s for s in commits if s <= limit)
            restored = max(mine)
            assert policy.trusted(restored) == restored
            assert policy.roll_backs_to(restored) == (told.count(restored) if told[-1:] == [restored] else 0)
            told.append(restored)
            weights = list(commits[restored][0])
            policy.roll_back(commits[restored][1], restored, step)
            for undone in [s for s in commits if restored < s <= step]:
                assert policy.trusted(undone) == restored
                del commits[undone]
            assert policy.roll_backs == len(told)
            gone = {s for first, end in policy.passed_over for s in range(first, end)}
            assert not gone & set(weights)
        if not judged(policy, math.nan if bad else 1.0):
            weights.append(step)
        if dice == 0:
            commits[step + 1] = (list(weights), policy.state())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"spike_factor": 1.0}, "spike_factor 1.0 must be greater than 1"),
        ({"spike_quantile": 1.5}, "spike_quantile 1.5 is a share"),
        ({"min_norms": 300}, "min_norms 300 must be from 1 to window 256"),
        ({"max_bad_steps": 0}, "max_bad_steps 0 must be 1 or more"),
    ],
)
def test_a_policy_without_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        StepPolicyConfig(**changes)
