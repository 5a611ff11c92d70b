import numpy as np
import pytest

from mixgrpo_jax.runtime.intervals import bootstrap, paired

RNG = np.random.default_rng(7)


def partly_read(right, shape):
    """Scores as a reader of signs gives them: most are 1, the others a share of the digits."""
    return np.where(RNG.random(shape) < right, 1.0, RNG.integers(0, 4, shape) / 4)


SCORES = {  # name: (draw, mean of the distribution)
    "normal": (lambda shape: RNG.normal(0.5, 0.1, shape), 0.5),
    "ocr, 0.64 read": (lambda shape: partly_read(0.64, shape), 0.64 + 0.36 * 0.375),
    "ocr, 0.9 read": (lambda shape: partly_read(0.9, shape), 0.9 + 0.1 * 0.375),
    "strict, 0.92 right": (lambda shape: (RNG.random(shape) < 0.92) * 1.0, 0.92),
}


@pytest.mark.parametrize("n", [64, 512])
@pytest.mark.parametrize("name", SCORES)
def test_intervals_hold_the_mean_as_often_as_they_say(name, n):
    draw, mean = SCORES[name]
    found = bootstrap(draw((n, 2000)))
    assert 0.93 <= np.mean((found.low <= mean) & (mean <= found.high)) <= 0.97


def test_an_interval_lies_about_the_mean_within_the_scores_and_is_the_same_again():
    scores = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.5, 1.0]])
    found, alone = bootstrap(scores), bootstrap(scores[:, 0])
    assert found.mean.tolist() == [0.625, 1.0] and found.low[0] < 0.625 < found.high[0] <= 1
    assert (alone.mean, alone.low, alone.high) == (found.mean[0], found.low[0], found.high[0])
    assert (found.low[1], found.high[1]) == (1, 1)
    assert np.diff(bootstrap(scores[:, 0], level=0.5)[1:]) < np.diff(alone[1:])


def test_missing_scores_are_left_out():
    scores = np.array([0.0, 1.0, 1.0, 0.5] * 8)
    found = bootstrap(np.append(scores, np.full(8, np.nan)))
    assert found.mean == 0.625 and 0.4 < found.low < 0.625 < found.high < 0.85
    assert np.isnan(bootstrap([np.nan, np.nan])).all() and np.isnan(bootstrap([1.0])[1:]).all()


def test_a_change_is_of_pairs():
    before = RNG.random(64)  # which differ much more than they change
    after = before + 0.01
    after[:16] = before[:16]
    found = paired(np.append(before, [np.nan, 0.0]), np.append(after, [1.0, np.nan]))
    assert (found.before, found.after) == pytest.approx((before.mean(), after.mean()))
    assert (found.improved, found.worsened) == (0.75, 0)
    assert 0 < found.change.low < found.change.mean == pytest.approx(0.0075) and found.change.high < 0.01
    assert np.isnan(paired([np.nan], [1.0]).after)
