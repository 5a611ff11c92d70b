import numpy as np
import pytest

from mixgrpo_jax.flow.plans import Plan
from mixgrpo_jax.flow.rollout import Rollout, Rows
from mixgrpo_jax.rewards.contract import Score
from mixgrpo_jax.rl.credit import Credit, Seen, shares

GROUPS = np.repeat([0, 1, 2], 4)
SCORES = {"a": np.random.default_rng(0).random(12), "b": np.random.default_rng(1).random(12) * 100}
WEIGHTS = {"a": 1.0, "b": 3.0}


def advantages(scores, group, weights, credit=Credit()):  # noqa: B008
    return credit.of_samples(scores, group, weights)


def test_by_hand():
    reward = {"r": np.array([1.0, 2.0, 3.0, 6.0])}
    ids = np.zeros(4, int)
    result = advantages(reward, ids, {"r": 2.0})
    std = np.sqrt(14 / 3)  # deviations -2, -1, 0, 3 and one degree of freedom
    np.testing.assert_allclose(result, np.array([-2, -1, 0, 3]) / std, rtol=1e-6)
    biased = advantages(reward, ids, {"r": 2.0}, Credit(ddof=0, epsilon=0.5))
    np.testing.assert_allclose(biased, np.array([-2, -1, 0, 3]) / (np.sqrt(14 / 4) + 0.5), rtol=1e-6)


def test_the_largest_of_a_group_of_12_is_below_the_clip():
    reward = np.zeros(12)
    reward[5] = 1.0
    result = advantages({"r": reward}, np.zeros(12, int), {"r": 1.0})
    np.testing.assert_allclose(result.max(), 11 / np.sqrt(12), rtol=1e-6)  # 3.18 < 5
    assert advantages({"r": reward}, np.zeros(12, int), {"r": 1.0}, Credit(clip=2.0)).max() == 2.0


@pytest.mark.parametrize("config", [Credit(), Credit("rewards"), Credit(std_scope="batch")])
def test_invariant_to_permutation_and_to_names_of_groups(config):
    order = np.random.default_rng(2).permutation(12)
    result = advantages(SCORES, GROUPS, WEIGHTS, config)
    shuffled = advantages({k: v[order] for k, v in SCORES.items()}, 7 * GROUPS[order] + 3, WEIGHTS, config)
    np.testing.assert_allclose(shuffled, result[order], rtol=1e-5)


def test_normalised_advantages_ignore_scales_and_raw_rewards_do_not():
    scaled = SCORES | {"b": 1000 * SCORES["b"] + 5}
    by_advantage, by_reward = Credit("advantages"), Credit("rewards")
    np.testing.assert_allclose(
        advantages(SCORES, GROUPS, WEIGHTS, by_advantage), advantages(scaled, GROUPS, WEIGHTS, by_advantage), atol=1e-5
    )
    raw = advantages(scaled, GROUPS, WEIGHTS, by_reward)
    np.testing.assert_allclose(raw, advantages({"b": SCORES["b"]}, GROUPS, {"b": 1.0}, by_reward), atol=2e-4)
    assert np.abs(raw - advantages(SCORES, GROUPS, WEIGHTS, by_advantage)).max() > 0.1


@pytest.mark.parametrize(
    "config", [Credit(), Credit("rewards", trim=0.3), Credit(mean_scope="batch", std_scope="batch")]
)
def test_a_sample_without_a_score_is_in_nobodys_statistics(config):
    absent = {"a": [1, 7], "b": [7, 8]}
    scores = {name: np.where(np.isin(np.arange(12), absent[name]), np.nan, SCORES[name]) for name in SCORES}
    there = ~np.isin(np.arange(12), [1, 7, 8])
    result = advantages(scores, GROUPS, WEIGHTS, config)
    alone = advantages({name: values[there] for name, values in SCORES.items()}, GROUPS[there], WEIGHTS, config)
    np.testing.assert_array_equal(result[there], alone)
    assert np.isnan(result[~there]).all() and result.dtype == np.float32


def test_weights_are_shares():
    result = advantages(SCORES, GROUPS, {"a": 1.0, "b": 1.0})
    parts = [advantages(SCORES, GROUPS, {name: 1.0}) for name in "ab"]
    np.testing.assert_allclose(result, sum(parts) / 2, atol=1e-6)
    np.testing.assert_allclose(result, advantages(SCORES, GROUPS, {"a": 5.0, "b": 5.0}), atol=1e-6)


def test_scopes():
    reward = SCORES["a"]
    group_mean = np.array([reward[g == GROUPS].mean() for g in GROUPS])
    ids, weight = GROUPS, {"a": 1.0}
    result = advantages(SCORES, ids, weight, Credit(std_scope="batch", ddof=0, epsilon=1e-4))
    np.testing.assert_allclose(result, (reward - group_mean) / (reward.std() + 1e-4), rtol=1e-5)
    result = advantages(SCORES, ids, weight, Credit(std_scope="none"))
    np.testing.assert_allclose(result, reward - group_mean, rtol=1e-5)
    result = advantages(SCORES, ids, weight, Credit(mean_scope="batch", std_scope="batch"))
    np.testing.assert_allclose(result, (reward - reward.mean()) / reward.std(ddof=1), rtol=1e-5)


def test_groups_may_differ_in_size_and_equal_rewards_teach_nothing():
    ids = np.array([0, 0, 0, 1, 1, 2])
    reward = {"r": np.array([0.1, 0.1, 0.1, 1.0, 3.0, 7.0], np.float32)}
    result = advantages(reward, ids, {"r": 1.0})
    np.testing.assert_allclose(result, [0, 0, 0, -np.sqrt(0.5), np.sqrt(0.5), 0], atol=1e-6)


def test_trimming_leaves_the_lowest_out_of_the_statistics_only():
    reward = np.array([-100.0, 1.0, 2.0, 3.0])
    result = advantages({"r": reward}, np.zeros(4, int), {"r": 1.0}, Credit(trim=0.25, clip=1e3))
    np.testing.assert_allclose(result, [-102, -1, 0, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("combine", "sum"),
        ("shape", "square"),
        ("spread", "thin"),
        ("epsilon", -1.0),
        ("mean_scope", "none"),
        ("std_scope", "all"),
        ("ddof", 2),
        ("trim", 1.0),
        ("clip", 0.0),
        ("power", 0.0),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"advantage\..*{field}={value!r}"):
        Credit(**{field: value})


def test_gdpo_normalises_each_reward_by_group_and_then_the_batch():
    credit = Credit(shape="whiten", ddof=0, epsilon=0.0)
    result = advantages(SCORES, GROUPS, WEIGHTS, credit)
    by_group = {
        name: np.concatenate([(r - r.mean()) / r.std() for r in values.reshape(3, 4)])
        for name, values in SCORES.items()
    }
    combined = by_group["a"] / 4 + 3 * by_group["b"] / 4
    np.testing.assert_allclose(result, (combined - combined.mean()) / combined.std(), rtol=1e-5)
    assert not advantages({"r": np.ones(4)}, np.zeros(4), {"r": 1.0}, Credit(shape="whiten")).any()


def test_tanh_bends_and_is_the_same_near_zero():
    hard, soft = (advantages(SCORES, GROUPS, WEIGHTS, Credit(shape=shape, clip=3.0)) for shape in ("none", "tanh"))
    np.testing.assert_allclose(soft, 3 * np.tanh(hard / 3), rtol=1e-5)
    tiny = Credit(shape="tanh", clip=1e3)
    np.testing.assert_allclose(advantages(SCORES, GROUPS, WEIGHTS, tiny), hard, rtol=1e-5)


def test_slas_is_a_power_of_the_deviation_over_the_batchs_spread():
    reward, credit = {"a": SCORES["a"]}, Credit(std_scope="none", shape="power", power=1.5, ddof=0, clip=1e3)
    result = advantages(reward, GROUPS, {"a": 1.0}, credit)
    d = np.concatenate([r - r.mean() for r in SCORES["a"].reshape(3, 4)])
    bent = np.sign(d) * np.abs(d) ** 1.5
    np.testing.assert_allclose(result, bent / bent.std(), rtol=1e-5)
    np.testing.assert_allclose(  # whatever the rewards' units
        advantages({"a": 100 * SCORES["a"] + 7}, GROUPS, {"a": 1.0}, credit), result, rtol=1e-4
    )
    straight = advantages(reward, GROUPS, {"a": 1.0}, Credit(std_scope="none", shape="power", ddof=0))
    np.testing.assert_allclose(straight, d / d.std(), rtol=1e-5)


ADVANTAGE = np.array([1.0, -2.0, 0.5], np.float32)


def maps(**values):
    return {name: Score(np.zeros(3), None if a is None else np.asarray(a, float)) for name, a in values.items()}


def test_even_credit_is_the_samples_own():
    spread = Credit().over_places(ADVANTAGE, maps(r=None), {"r": 1.0})
    assert spread.shape == (1, 3, 1) and spread.dtype == np.float32
    np.testing.assert_array_equal(spread[0, :, 0], ADVANTAGE)


def test_maps_of_ones_give_even_credit():
    spread = Credit(spread="map").over_places(ADVANTAGE, maps(a=np.ones((3, 4)), b=np.ones((3, 4))), WEIGHTS)
    np.testing.assert_array_equal(spread, np.broadcast_to(ADVANTAGE[None, :, None], (1, 3, 4)))


def test_credit_by_maps_is_the_product_with_their_weighted_mean():
    scores = maps(a=[[0, 2], [1, 1], [4, 0]], b=[[2, 0], [1, 3], [0, 0]], c=None)
    spread = Credit(spread="map").over_places(ADVANTAGE, scores, {"a": 1.0, "b": 3.0, "c": 6.0})
    # The reward without a map has no say in where: a has a quarter of what is left, b three quarters.
    expected = [[1.5, 0.5], [-2.0, -5.0], [0.5, 0.0]]
    np.testing.assert_allclose(spread, [expected], rtol=1e-6)


def test_credit_by_maps_needs_a_map():
    with pytest.raises(ValueError, match=r"advantage\.spread='map': none of the rewards r gives a map; choose 'even'"):
        Credit(spread="map").over_places(ADVANTAGE, maps(r=None), {"r": 1.0})


def largest(rewards, group, share, credit):
    return np.max([share[name] * rewards[name] for name in share], axis=0)


def signs(advantage, group, credit):
    return np.sign(advantage) * credit.clip / 2


def by_place(advantage, scores, share, seen, credit):
    return credit.clip * 2 * advantage[None, :, None] * np.arange(1, seen + 1)[:, None, None]


def test_functions_of_ones_own():
    credit = Credit(**{field: f"{__name__}:{name.__name__}" for field, name in OWN.items()}, clip=0.5)
    result = credit.of_samples(SCORES, GROUPS, WEIGHTS)
    expected = np.sign(np.maximum(SCORES["a"] / 4, 3 * SCORES["b"] / 4)) * 0.25
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    np.testing.assert_allclose(credit.over_places(ADVANTAGE, {}, {"a": 1.0}, 2)[:, 1, 0], [-2, -4])


OWN = {"combine": largest, "shape": signs, "spread": by_place}


@pytest.mark.parametrize("field", OWN)
def test_names_are_looked_up_when_the_settings_are_made(field):
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        Credit(**{field: "no_such_module:function"})
    with pytest.raises(ValueError, match=rf"advantage\.{field}='best' is unknown; choose from .*module:function"):
        Credit(**{field: "best"})


def test_shares_sum_to_one():
    assert shares({"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize("combine", ["advantages", "rewards"])
def test_equal_rewards_teach_nothing_also_without_epsilon(combine):
    rewards = {"r": np.array([0.1] * 3 + [0.3, 0.1, 0.2])}  # the mean of three 0.1 is not 0.1
    advantage = Credit(combine=combine, epsilon=0.0).of_samples(rewards, np.repeat([0, 1], 3), {"r": 1.0})
    np.testing.assert_allclose(advantage, [0, 0, 0, 1, -1, 0], atol=1e-6)
    assert (advantage[:3] == 0).all()


def seen(parts, tokens=None, positions=4, rows=(), plan=None):
    x0 = np.zeros((len(next(iter(parts.values()))), positions, 2))
    return Seen(parts, Rollout(x0, rows, 0, 0), plan, tokens or {"image": slice(None)})


def parts_of(credit=Credit()):  # noqa: B008
    return credit.of_rewards(SCORES, GROUPS, WEIGHTS), credit.of_samples(SCORES, GROUPS, WEIGHTS)


def test_the_named_reward_gives_the_map_though_it_is_only_watched():
    scores = maps(a=[[9, 9]] * 3, look=[[0, 2], [1, 1], [4, 0]])
    spread = Credit(spread="map", map="look").over_places(ADVANTAGE, scores, {"a": 1.0})
    np.testing.assert_allclose(spread, [[[0, 2], [-2, -2], [2, 0]]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"spread='map': none of the rewards nobody gives a map"):
        Credit(spread="map", map="nobody").over_places(ADVANTAGE, scores, {"a": 1.0})


def test_regions_learn_from_their_own_rewards():
    parts, whole = parts_of()
    look = np.tile([1.0, 0.0, 0.25, 1.0], (12, 1))
    scores = {name: Score(values) for name, values in SCORES.items()} | {"look": Score(whole, look)}
    credit = Credit(spread="regions", map="look", routes=("a:inside", "b:outside"), clip=1e3)
    result = credit.over_places(whole, scores, WEIGHTS, seen(parts))
    np.testing.assert_allclose(result[0, :, 0], parts["a"] / 4, rtol=1e-5)
    np.testing.assert_allclose(result[0, :, 1], 3 * parts["b"] / 4, rtol=1e-5)
    np.testing.assert_allclose(result[0, :, 2], parts["a"] / 16 + 9 * parts["b"] / 16, rtol=1e-5)
    ones = scores | {"look": Score(whole, np.ones((12, 4)))}
    everywhere = Credit(spread="regions", map="look", routes=("a:inside",)).over_places(
        whole, ones, WEIGHTS, seen(parts)
    )
    np.testing.assert_allclose(everywhere, np.broadcast_to(whole[None, :, None], (1, 12, 4)), rtol=1e-5, atol=1e-7)


def test_modalities_learn_from_the_rewards_that_speak_of_them():
    parts, whole = parts_of()
    tokens = {"picture": slice(0, 3), "sound": slice(3, 4)}
    credit = Credit(spread="routes", routes=("a:picture",))
    result = credit.over_places(whole, {}, WEIGHTS, seen(parts, tokens))
    np.testing.assert_allclose(result[0, :, :3], np.tile(whole[:, None], 3), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result[0, :, 3], 3 * parts["b"] / 4, rtol=1e-5)
    alone = Credit(spread="routes", routes=("a:image", "b:image")).over_places(whole, {}, WEIGHTS, seen(parts))
    np.testing.assert_allclose(alone, np.broadcast_to(whole[None, :, None], (1, 12, 4)), rtol=1e-5, atol=1e-7)
    for route in ("a:sound", "c:image"):
        with pytest.raises(ValueError, match=f"{route} does not fit: rewards are a, b, places image"):
            Credit(spread="routes", routes=(route,)).over_places(whole, {}, WEIGHTS, seen(parts))
    with pytest.raises(ValueError, match=r"advantage.routes: 'a' names no place; write REWARD:PLACE"):
        Credit(routes=("a",))


def test_a_sample_without_a_score_has_no_credit_anywhere():
    scores = {"a": np.where(np.arange(12) == 3, np.nan, SCORES["a"]), "b": SCORES["b"]}
    credit = Credit(spread="routes")
    whole = credit.of_samples(scores, GROUPS, WEIGHTS)
    result = credit.over_places(whole, {}, WEIGHTS, seen(credit.of_rewards(scores, GROUPS, WEIGHTS)))
    assert (np.isnan(result).any((0, 2)) == (np.arange(12) == 3)).all()


def test_steps_have_credit_for_how_far_they_bring_a_sample():
    rng = np.random.default_rng(0)
    x0, path = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 4, 3, 2))  # three steps of four samples
    zeros = np.zeros((3, 4))
    rows = Rows(path[:3], path[1:], zeros[..., None], zeros, zeros, zeros)
    train = np.array([[0, 1], [2, 2]])  # of two prompts, at two of the steps
    plan = Plan((), train, train, train, train, train)
    advantage = np.array([1.0, -2.0, 0.5, 3.0])
    given = Seen({}, Rollout(x0, (rows,), 0, 0), plan, {})
    result = Credit(spread="temporal").over_places(advantage, {}, {"a": 1.0}, given)

    def cosine(x, b):
        return (x * x0[b]).sum() / np.linalg.norm(x) / np.linalg.norm(x0[b])

    for b in range(4):
        steps = train[:, b // 2]
        gain = np.array([max(cosine(path[t + 1, b], b) - cosine(path[t, b], b), 0) + 1e-3 for t in steps])
        np.testing.assert_allclose(result[:, b, 0], advantage[b] * gain / gain.mean(), rtol=1e-3)
    np.testing.assert_allclose(result.mean(0)[:, 0], advantage, rtol=1e-5)
    with pytest.raises(ValueError, match=r"spread='temporal': the plan records no steps"):
        Credit(spread="temporal").over_places(advantage, {}, {"a": 1.0}, seen({"a": advantage}))


def test_pareto_with_one_reward_is_the_best_and_the_worst():
    result = advantages(SCORES, GROUPS, {"a": 1.0}, Credit("pareto"))
    plain = advantages(SCORES, GROUPS, {"a": 1.0})
    for group in range(3):
        own, values = result[group == GROUPS], SCORES["a"][group == GROUPS]
        assert set(np.flatnonzero(own)) == {values.argmax(), values.argmin()}
    np.testing.assert_allclose(result, np.where(result != 0, 4 / 2 * plain, 0), rtol=1e-5)


def test_pareto_fronts_are_of_samples_that_no_other_beats():
    a, b = np.array([3.0, 2.0, 1.0, 0.0, 1.5]), np.array([0.0, 2.0, 3.0, 0.0, 1.5])
    result = advantages({"a": a, "b": b}, np.zeros(5), {"a": 1.0, "b": 1.0}, Credit("pareto"))
    plain = advantages({"a": a, "b": b}, np.zeros(5), {"a": 1.0, "b": 1.0})
    chosen = np.array([True, True, True, True, False])  # (1.5, 1.5) is beaten by (2, 2), and beats (0, 0)
    np.testing.assert_allclose(result, np.where(chosen, 5 / 4 * plain, 0), rtol=1e-5, atol=1e-7)
