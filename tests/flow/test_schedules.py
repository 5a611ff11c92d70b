import numpy as np
import pytest

from mixgrpo_jax.flow.schedules import compressed_suffix, resolution_shift, shifted_sigmas

# Reference sigmas of T = 25, shift 3.
GOLDEN = [
    *(1.0000000, 0.9863013, 0.9718309, 0.9565217, 0.9402985, 0.9230770, 0.9047619, 0.8852459, 0.8644067, 0.8421053),
    *(0.8181818, 0.7924529, 0.7647059, 0.7346938, 0.7021276, 0.6666666, 0.6279069, 0.5853658, 0.5384616, 0.4864865),
    *(0.4285714, 0.3636364, 0.2903226, 0.2068966, 0.1111111, 0.0),
]


def test_golden_schedule():
    np.testing.assert_allclose(shifted_sigmas(25, 3.0), GOLDEN, rtol=0, atol=1.5e-7)


@pytest.mark.parametrize("num_steps", [1, 10, 25, 1000])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_schedule_falls_from_one_to_zero(num_steps, shift):
    sigmas = shifted_sigmas(num_steps, shift)
    assert sigmas.dtype == np.float32 and sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("num_steps, shift", [(4, 3.0), (10, 3.0), (28, 1.0)])
def test_linspace_is_what_the_scheduler_of_diffusers_sets_by_itself(num_steps, shift):
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    sigmas = shifted_sigmas(num_steps, shift, "linspace")
    np.testing.assert_allclose(sigmas, scheduler.sigmas, rtol=0, atol=1e-6)
    tail = compressed_suffix(num_steps, shift, 2, 1.0, "linspace")  # by another linspace: one may round otherwise
    np.testing.assert_allclose(sigmas[2:], tail, rtol=0, atol=6e-8)
    assert len(compressed_suffix(num_steps, shift, 2, 0.5, "linspace")) == max((num_steps - 1) // 2, 2)


def test_unit_shift_is_uniform():
    np.testing.assert_allclose(shifted_sigmas(8, 1.0), np.linspace(1, 0, 9))


def test_resolution_shift_is_flux_dynamic_shift():
    assert resolution_shift(256) == pytest.approx(np.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(np.exp(1.15))
    t = np.linspace(1, 1 / 28, 28)
    expected = np.exp(0.84) / (np.exp(0.84) + (1 / t - 1))
    tokens = 256 + (0.84 - 0.5) / (1.15 - 0.5) * (4096 - 256)
    np.testing.assert_allclose(shifted_sigmas(28, resolution_shift(tokens))[:-1], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (0.4, [0.94030, 0.88525, 0.81818, 0.73469, 0.62791, 0.48649, 0.29032, 0]),
        (0.2, [0.94030, 0.79245, 0.53846, 0]),
    ],
)
def test_published_flash_suffixes(ratio, expected):
    np.testing.assert_allclose(compressed_suffix(25, 3.0, 4, ratio), expected, rtol=0, atol=5.1e-6)


def test_total_steps_as_the_window_moves():
    totals = [start + 4 + len(compressed_suffix(25, 3.0, start + 4, 0.4)) - 1 for start in range(18)]
    assert totals == [11, 12, 13, 13, 14, 14, 15, 16, 16, 17, 17, 18, 19, 19, 20, 20, 21, 22]


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.4, 0.77])
@pytest.mark.parametrize("window_end", range(25))
def test_suffix_joins_the_window_to_the_data(window_end, ratio):
    suffix = compressed_suffix(25, 3.0, window_end, ratio)
    assert 2 <= len(suffix) <= 26 - window_end
    assert suffix[0] == shifted_sigmas(25, 3.0)[window_end] and suffix[-1] == 0
    assert (np.diff(suffix) < 0).all()


@pytest.mark.parametrize("num_steps", [3, 10, 25, 49])
def test_uncompressed_suffix_is_the_schedules_tail(num_steps):
    for window_end in range(num_steps + 1):
        tail = shifted_sigmas(num_steps, 3.0)[window_end:]
        np.testing.assert_array_equal(compressed_suffix(num_steps, 3.0, window_end, 1.0), tail)


def test_no_suffix_after_the_last_step():
    np.testing.assert_array_equal(compressed_suffix(25, 3.0, 25, 0.4), [0.0])
