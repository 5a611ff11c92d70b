import asyncio

import numpy as np
import pytest

from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.serving.batching import Batcher, ScoreError
from mixgrpo_jax.rewards.serving.wire import BadRequest, Request
from tests.rewards.conftest import brightness


def request(name, pictures, prompts=None, rewards=()):
    return Request(name, rewards, pictures, prompts or ["x"] * len(pictures), [{}] * len(pictures))


@pytest.fixture(scope="module")
def runner():
    """One event loop for all: a batcher stays with the one it was first used in."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def answers(runner):
    """`answers(batcher, *requests)`: what becomes of requests that arrive together, scores or errors."""
    return lambda *args: runner.run(answer(*args))


async def answer(batcher, *requests):
    running = asyncio.create_task(batcher.run())
    asked = [batcher.score(request, request.digest()) for request in requests]
    result = await asyncio.gather(*asked, return_exceptions=True)
    running.cancel()
    return result


def counted(score=brightness, where="host", **limits):
    """A batcher of one reward, and the list of the sizes of its batches."""
    sizes = []

    def counting(images, prompts, metadata):
        assert len(images) == len(prompts) == len(metadata)
        sizes.append(len(images))
        return score(images, prompts, metadata)

    return Batcher({"bright": Reward("bright", where, counting)}, **{"max_batch": 16} | limits), sizes


def test_requests_that_arrive_together_are_scored_together(answers, pictures):
    batcher, sizes = counted()
    parts = np.split(pictures, 10)
    scores = answers(batcher, *(request(str(i), part) for i, part in enumerate(parts)))
    np.testing.assert_allclose(np.concatenate([s["bright"] for s in scores]), brightness(pictures, [], []))
    assert sizes == [16, 16, 8]


def test_images_of_other_sizes_and_other_rewards_are_scored_apart(answers, pictures):
    sizes = []

    def score(images, prompts, metadata):
        sizes.append(images.shape[:2])
        return np.ones(len(images))

    batcher = Batcher({name: Reward(name, "host", score) for name in "ab"}, max_batch=16)
    scores = answers(
        batcher,
        request("1", pictures[:2]),
        request("2", pictures[:3, :4]),
        request("3", pictures[:4], rewards=("a",)),
        request("4", pictures[:5]),
    )
    assert [list(s) for s in scores] == [["a", "b"], ["a", "b"], ["a"], ["a", "b"]]
    assert sizes == [(7, 8)] * 2 + [(3, 4)] * 2 + [(4, 8)]


def test_device_rewards_see_few_sizes_of_batch(answers, pictures):
    batcher, sizes = counted(where="device", max_batch=20)
    for i, count in enumerate((1, 3, 5, 8, 18)):
        (scores,) = answers(batcher, request(str(i), pictures[:count]))
        np.testing.assert_allclose(scores["bright"], brightness(pictures[:count], [], []))
    assert sizes == [1, 4, 8, 8, 20]


def test_an_id_is_scored_once(answers, pictures):
    batcher, sizes = counted()
    one = request("same", pictures[:3])
    first, second = answers(batcher, one, one)
    (third,) = answers(batcher, one)
    assert first is second is third and sizes == [3]
    assert "mixgrpo_jax_reward_repeats_total{} 2" in batcher.counters.text(0)


def test_an_id_is_for_one_request(answers, pictures):
    batcher, _ = counted()
    right, wrong = answers(batcher, request("same", pictures[:3]), request("same", pictures[3:6]))
    assert len(right["bright"]) == 3
    assert isinstance(wrong, BadRequest) and wrong.field == "id"


def test_old_answers_are_forgotten(answers, pictures):
    batcher, sizes = counted(remember=2)
    for name in "abcab":
        answers(batcher, request(name, pictures[:1]))
    assert len(sizes) == 5
    answers(batcher, request("b", pictures[:1]))
    assert len(sizes) == 5


def test_a_caller_who_hangs_up_finds_the_answer_later(runner, pictures):
    batcher, sizes = counted()

    async def main():
        running = asyncio.create_task(batcher.run())
        one = request("same", pictures[:3])
        gone = asyncio.create_task(batcher.score(one, one.digest()))
        await asyncio.sleep(0)
        gone.cancel()
        scores = await batcher.score(one, one.digest())
        running.cancel()
        return scores

    assert len(runner.run(main())["bright"]) == 3 and sizes == [3]


def test_a_score_that_is_not_finite_is_its_own_request_s(answers, pictures):
    batcher, sizes = counted()
    pictures[6] = 0
    before, bad, after = answers(batcher, *(request(str(i), pictures[4 * i : 4 * i + 4]) for i in range(3)))
    assert isinstance(bad, ScoreError) and (bad.code, bad.reward, bad.sample) == ("not_finite", "bright", 2)
    assert "'bright' gave nan for sample 2 ('x')" in str(bad)
    np.testing.assert_allclose(before["bright"], brightness(pictures[:4], [], []))
    np.testing.assert_allclose(after["bright"], brightness(pictures[8:12], [], []))
    assert sizes == [12]


def test_a_request_that_a_reward_cannot_score_does_not_spoil_the_others(answers, pictures):
    def score(images, prompts, metadata):
        if "bad" in prompts:
            raise KeyError("number")
        return brightness(images, prompts, metadata)

    batcher, _ = counted(score)
    good, bad = answers(batcher, request("1", pictures[:2]), request("2", pictures[:2], ["x", "bad"]))
    assert len(good["bright"]) == 2
    assert isinstance(bad, ScoreError) and bad.code == "reward_failed" and "'bright' failed: KeyError" in str(bad)
    (again,) = answers(batcher, request("2", pictures[:2], ["x", "bad"]))
    assert isinstance(again, ScoreError)  # asked again, not remembered


def test_scores_of_another_shape_are_refused(answers, pictures):
    batcher, _ = counted(lambda images, prompts, metadata: np.ones((len(images), 2)))
    (error,) = answers(batcher, request("1", pictures[:3]))
    assert isinstance(error, ScoreError) and "shape (3, 2) for 3 images" in str(error)


def test_unknown_rewards_are_refused(answers, pictures):
    batcher, _ = counted()
    (error,) = answers(batcher, request("1", pictures[:3], rewards=("hps",)))
    assert isinstance(error, BadRequest) and error.field == "rewards"
    with pytest.raises(BadRequest, match="there are bright"):
        raise error
