import dataclasses
import json
import pathlib
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import ml_collections
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.fields import meanings, meanings_of
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.rl.credit import Credit
from mixgrpo_jax.rl.samples import Objective
from mixgrpo_jax.rl.update import Average
from tests.python import ROOT, run_program

HERE = str(pathlib.Path(__file__).parents[1] / "configs" / "any.py")
RECIPES = sorted(p.stem for p in pathlib.Path(HERE).parent.glob("*.py"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves(name):
    settings = configs.resolve(configs.load(name, HERE))
    batch = settings.batch
    assert settings.samples == batch.prompts * batch.group
    assert (
        settings.passes() * settings.micro_batch() * batch.updates
        == settings.trained_samples * settings.planner.num_trained
    )
    assert str(settings.samples) in settings.arithmetic()


@pytest.mark.parametrize(
    ("ways", "at_most", "micro_batch", "passes"),
    [(1, 24, 24, 3), (1, 7, 6, 12), (4, 24, 24, 3), (8, 2, 8, 9), (24, 1, 24, 3), (16, 1, 1, 72), (16, 24, 24, 3)],
)
def test_a_pass_takes_of_each_device_what_divides_its_part(ways, at_most, micro_batch, passes):
    config = configs.load("signs", HERE)
    config.batch.micro_batch = at_most
    settings = configs.resolve(config)  # 24 samples an update, three places
    assert (settings.micro_batch(ways), settings.passes(ways)) == (micro_batch, passes)
    assert f"in {passes} passes of {micro_batch};" in settings.arithmetic(ways)


def test_recipes_differ_from_their_task_in_the_method_only():
    others = ("flux", "sd35", "quickstart", "signs", "scenes")
    methods = [name for name in RECIPES if not name.startswith(others)]
    for on in ("flux_dev", "sd35_medium", "flux2_klein"):  # each with a schedule of its own
        model = configs.load(on, HERE).plan
        for name in methods:
            plan = configs.load(name, HERE, on).plan
            assert all(plan[field] == model[field] for field in configs.SCHEDULE), (name, on)
    for on in ("signs", "scenes"):
        task = configs.load(on, HERE).to_dict()
        for name in methods:
            recipe = configs.load(name, HERE, on).to_dict()
            changed = {key for key in task if recipe[key] != task[key]}
            method = {"plan", "sampler", "batch", "advantage", "select", "objective", "terms"}
            method |= {"optimizer"} if recipe["optimizer"] == task["optimizer"] | {"mix": "min_norm"} else set()
            method |= {"ratio_tolerance"} if name in ("grpo_guard", "gcpo") else set()
            keeps = recipe["averages"].keys() - task["averages"].keys()  # more averages, and the task's as they were
            rewards = {"rewards", "watched", "reward_options"} if changed & {"watched", "rewards"} else set()
            assert changed <= method | rewards | ({"averages"} if keeps else set()), (name, on)
            gone = {"ocr"} & task["rewards"].keys() if name in GRADIENTS else set()  # what has no gradient is watched
            assert {k: v for k, v in task["rewards"].items() if k not in gone}.items() <= recipe["rewards"].items()
            assert task["reward_options"].items() <= recipe["reward_options"].items()
            assert {*task["watched"], *gone} <= set(recipe["watched"]), (name, on)
            assert task["averages"].items() <= recipe["averages"].items(), (name, on)


# Of recipes of clean samples, of credit and of rewards' gradients on FLUX.1-dev: the clip, and the places trained.
GRADIENTS = dict(draft=1, refl=1, leap_align=2, adjoint=3, rsm_first_order=7)
PUBLISHED = dict(awm=(1.0, 4), vgrpo=(1e-2, 4), dgpo=(0.05, 4), dpo=(None, 3), apo=(None, 3), crd=(None, 3))
PUBLISHED |= dict(branch_grpo=(1e-4, 3), branch_grpo_pruned=(1e-4, 2), tree_rpo=(1e-4, 3), tmpo_tree=(0.2, 3))
PUBLISHED |= dict.fromkeys(("creflow", "marble", "omninft"), (None, 7))
PUBLISHED |= dict.fromkeys(("gdpo", "dr_grpo", "slas", "poca", "otca", "vipo", "edit_grpo", "pec"), (1e-4, 4))
PUBLISHED |= dict.fromkeys(("adagrpo", "reward_range"), (1e-4, 4))
PUBLISHED |= {name: (None, places) for name, places in GRADIENTS.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_clean_samples_and_of_credit_resolve_on_a_released_model(name):
    settings = configs.resolve(configs.load(name, HERE, "flux_dev"))
    clip = getattr(settings.objective, "clip_high", getattr(settings.objective, "clip", None))
    assert (clip, settings.planner.num_trained) == PUBLISHED[name]


CLIPS = dict(grpo_guard=2e-6, flow_dppo=1e-5, tempflow=1e-4, pcpo=1e-4, rsm=1e-4, dancegrpo_extremes=1e-4)
CLIPS |= dict(flash_grpo=1e-4, gcpo=5e-5, op_grpo=1e-4, tmpo=0.2, uni_tmpo=None)


@pytest.mark.parametrize("name", CLIPS)
def test_recipes_resolve_on_a_released_model_with_published_clips(name):
    objective = configs.resolve(configs.load(name, HERE, "flux_dev")).objective
    clip = getattr(objective, "clip_high", getattr(objective, "clip", None))
    assert clip == (CLIPS[name] and pytest.approx(CLIPS[name]))
    assert getattr(objective, "old_log_prob", "update") == "update"


def test_published_settings():
    dance = configs.resolve(configs.load("dancegrpo", HERE))
    assert (dance.planner.window_length, dance.planner.num_trained, dance.sampler.kernel) == (9, 5, "dance")
    flow = configs.resolve(configs.load("flow_grpo", HERE))
    assert (flow.planner.window_length, flow.planner.num_trained, flow.terms["kl_base"]) == (10, 9, 0.004)
    assert flow.roles == {"base"} and flow.keep_base
    star = configs.resolve(configs.load("mixgrpo_flash_star", HERE))
    assert (star.planner.strategy, star.planner.suffix_ratio, star.planner.solver_order) == ("frozen", 0.2, 2)
    nft = configs.resolve(configs.load("nft", HERE))
    assert (nft.planner.num_steps, nft.planner.num_trained, nft.objective.draws) == (10, 3, "old")
    assert (nft.roles, nft.averages["old"].by, nft.keep_base) == ({"old"}, "iteration", False)


def test_unknown_fields_and_wrong_types_are_refused():
    config = configs.base().lock()
    with pytest.raises(AttributeError, match=r'lerning_rate.*Did you mean "learning_rate"'):
        config.optimizer.lerning_rate = 1.0
    with pytest.raises(TypeError, match="float"):
        config.iterations = 3.5
    with pytest.raises(configs.ConfigError, match=r"there is no .*flow_grop.py; choose from .*flow_grpo"):
        configs.load("flow_grop", HERE)


def put(config, field, value):
    *path, last = field.split(".")
    section = config
    for name in path:
        section = section[name]
    section[last] = value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("iterations", 0, "iterations=0: it must be positive"),
        ("batch.group", 1, "batch.group=1: a group of one has no advantage; use at least 2"),
        ("batch.updates", 5, "batch.updates=5 does not divide the 96 trained samples.*nearest that do: 4, 6"),
        ("batch.micro_batch", 0, "batch.micro_batch=0: it must be positive"),
        ("batch.decode", 0, "batch.decode=0: it must be positive"),
        ("plan.length", 11, "plan.length=11.*shorten it"),
        ("plan.strategy", "sliding", "plan.strategy='sliding'.*progressive"),
        ("plan.num_steps", 1, "plan.num_steps=1"),
        ("plan.solver_order", 2, "plan.solver_order=2: sampler.solver='euler' is of order 1; .*'dpm_midpoint'"),
        ("plan.solver_order", 4, "plan.solver_order=4: choose 1, 2 or 3"),
        ("sampler.kernel", "ode", "sampler.kernel='ode' is unknown; choose from"),
        ("objective.clip_low", 0.0, "objective.clip_low=0.0 must be positive"),
        ("objective.old_log_prob", "before", "objective.old_log_prob='before' is unknown; choose from .*'update'"),
        ("terms", dict(kl=0.0), "terms.kl is unknown: write KIND_ROLE"),
        ("terms", dict(kl_bsae=0.1), "role 'bsae'"),
        ("terms", dict(mse_rollout=0.1), "terms.mse_rollout: .*log-probs alone are kept: kl_rollout"),
        ("advantage.ddof", 3, "advantage.ddof=3"),
        ("advantage.spread", "wide", "advantage.spread='wide' is unknown; choose from .*'even'.*module:function"),
        ("evaluation.batch", 0, "evaluation.batch=0: it must be positive"),
        ("evaluation.solver_order", 2, "evaluation.solver_order=2: evaluation.solver='euler' is of order 1"),
        ("evaluation.average", "old", "evaluation.average='old': no such average is kept; give averages.old.decay"),
        ("averages.ema.decay", 1.0, r"averages.ema.decay=1.0 is not in \[0, 1\)"),
        ("averages.ema.decay", 0.0, "evaluation.average='ema': no such average is kept.*evaluation.average=''"),
        ("averages.ema.by", "epoch", "averages.ema.by='epoch' is unknown; choose 'update' or 'iteration'"),
        ("ratio_tolerance", 6e-4, "ratio_tolerance=0.0006: beyond half the clip range, 0.0005.*old_log_prob='update'"),
        ("optimizer.name", "lion", "optimizer.name='lion'.*adafactor, adamw"),
        ("optimizer.dtype", "float16", "optimizer.dtype='float16'.*choose"),
        ("optimizer.final_rate", 2.0, "optimizer.final_rate=2.0: it must be at least 0 and at most 1"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate=0.0: it must be positive"),
        ("rewards.ocr", -1.0, "rewards.ocr=-1.0: a weight must not be negative"),
        ("rewards", dict(ocr=0.0), "rewards={'ocr': 0.0}: give one a positive weight"),
        ("reward_options", dict(ocrr=dict(where="host")), "reward_options.ocrr: .*did you mean ocr?"),
        ("seed", -1, "seed=-1: it must be in 0..4294967295"),
        ("ratio_tolerance", -1.0, "ratio_tolerance=-1.0: it must be at least 0"),
        ("missing_share", 1.0, "missing_share=1.0: a share of the images, from 0 to below 1"),
        ("missing_share", -0.1, "missing_share=-0.1: a share"),
        ("reward_wait", -1.0, "reward_wait=-1.0: seconds, at least 0"),
        ("model.guidance", -1.0, "model.guidance=-1.0: it must be at least 0"),
        ("model.image_size", (0, 16), r"model.image_size=\(0, 16\): it must be positive"),
        ("mesh.data", 0, "mesh.data=0: give a number of devices"),
        ("mesh.rollout_fsdp", -2, "mesh.rollout_fsdp=-2: it must be positive"),
        ("checkpoint.keep", 0, "checkpoint.keep=0: it must be positive"),
        ("optimizer.max_grad_norm", -1.0, "optimizer.max_grad_norm=-1.0: it must be positive"),
        ("optimizer.b1", 1.0, "optimizer.b1=1.0: it must be at least 0 and below 1"),
        ("optimizer.b2", -0.1, "optimizer.b2=-0.1: it must be at least 0 and below 1"),
        ("optimizer.eps", 0.0, "optimizer.eps=0.0: it must be positive"),
        ("optimizer.mix", "sum", "optimizer.mix='sum' is unknown; choose from min_norm, none"),
        ("optimizer.warmup", -1, "optimizer.warmup=-1: it must be at least 0"),
        ("optimizer.weight_decay", -1.0, "optimizer.weight_decay=-1.0: it must be at least 0"),
        ("evaluation.shift", -1.0, "evaluation.shift=-1.0: it must be at least 0"),
        ("rewards.beauty", 1.0, "rewards.beauty.*choose from"),
        ("watched", ("beauty",), "watched='beauty'.*choose from"),
        ("model.remat", "all", "model.remat='all'.*choose"),
        ("model.dtype", "float7", "model.dtype='float7'.*choose"),
        ("model.attention", "flash", "model.attention='flash'.*choose"),
        ("model.lora.rank", -1, "lora.rank=-1 must be positive"),
        ("checkpoint.every", 0, "checkpoint.every=0: it must be positive"),
        ("evaluation.trained_steps", 21, r"evaluation.trained_steps=21 is not in 0..10"),
        ("data.name", "scene", "data.name='scene'.*choose from features, scenes, signs"),
        ("evaluation.solver", "rk4", "evaluation.solver='rk4'.*choose"),
        ("objective.name", "nftt", "objective.name='nftt' is unknown; choose from .*grpo, .*nft"),
        ("objective.name", "nowhere:Loss", "objective.name='nowhere:Loss': No module named 'nowhere'; write 'module:"),
    ],
)
def test_what_cannot_be_is_refused_by_name(field, value, message):
    config = configs.load("signs", HERE)
    put(config, field, value)
    with pytest.raises(configs.ConfigError, match=message):
        configs.resolve(config)


@pytest.mark.parametrize(("dtype", "source"), [("bfloat16", "update"), ("float32", "rollout")])
def test_bfloat16_takes_the_log_probs_of_before_from_the_update(dtype, source):
    config = configs.load("signs", HERE)
    config.model.dtype = dtype
    settings = configs.resolve(config)
    assert settings.objective.old_log_prob == source
    assert config.ratio_tolerance <= settings.objective.tolerance == 5e-4


def test_a_negative_prompt_has_no_part_in_what_is_not_guided():
    config = configs.load("signs", HERE)
    config.model.guidance, config.model.negative_prompt = 1.0, "grey"
    with pytest.raises(configs.ConfigError, match=r"negative_prompt='grey' has no part in model.guidance=1.0: set a"):
        configs.resolve(config)


def test_a_group_that_starts_from_one_noise_needs_a_stochastic_step():
    config = configs.load("nft", HERE)
    config.batch.shared_noise = True
    with pytest.raises(configs.ConfigError, match=r"batch.shared_noise=True with plan.name='ode'.*shared_noise=False"):
        configs.resolve(config)
    assert configs.resolve(configs.load("flow_grpo_fast", HERE)).batch.shared_noise


def floats(section, path=""):
    """The names of all float fields of a config."""
    for name, value in section.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from floats(value, f"{path}{name}.")
        elif isinstance(value, float):
            yield f"{path}{name}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_number_is_finite(value):
    fields = list(floats(configs.base()))
    assert {"optimizer.max_grad_norm", "sampler.eta", "rewards.ocr", "model.lora.alpha"} < set(fields)
    for field in fields:
        config = configs.base()
        put(config, field, value)
        with pytest.raises(configs.ConfigError, match=f"^{field}={value}: it must be finite$"):
            configs.resolve(config)


@pytest.mark.parametrize(
    ("section", "other"), [("objective", "nft"), ("plan", "ode"), ("plan", "per_prompt"), ("select", "extremes")]
)
def test_a_method_is_not_changed_by_its_name_alone(section, other):
    config = configs.load("signs", HERE).lock()
    config[section].name = other
    remedy = rf'{section}.name=\'{other}\': .*--config=configs/RECIPE.py.*{section} = choose\("{section}", "{other}"\)'
    with pytest.raises(configs.ConfigError, match=remedy):
        configs.resolve(config)
    config.unlock()
    if other in ("nft", "ode"):  # which go together
        config.plan, config.objective = configs.choose("plan", "ode"), configs.choose("objective", "nft")
    config[section] = configs.choose(section, other)
    config.averages.old = configs.average("old")
    config.batch.shared_noise, config.batch.micro_batch = other not in ("nft", "ode"), 8
    config.sampler.solver = "dpm_midpoint"
    chosen = {"objective": "objective", "plan": "planner", "select": "select"}[section]
    made = getattr(configs.resolve(config), chosen)
    assert type(made).__name__.lower() == other.replace("_", "")


@pytest.mark.parametrize(
    ("recipe", "section", "name", "message"),
    [
        ("signs", "objective", "nft", "recorded deterministic steps.*plan.*ode"),
        ("nft", "objective", "grpo", "recorded stochastic steps.*plan.*window"),
        ("nft", "plan", "window", "recorded deterministic steps.*plan.*ode"),
        ("draft", "plan", "ode", "recorded steps up to the clean sample.*plan.*tail"),
        ("draft", "plan", "window", "recorded deterministic steps.*plan.*"),
        ("draft", "objective", "grpo", "recorded stochastic steps.*plan.*window"),
    ],
)
def test_a_plan_that_records_other_steps_than_the_objective_needs_is_refused(recipe, section, name, message):
    config = configs.load(recipe, HERE)
    config.averages.old, config.batch.shared_noise = configs.average("old"), False
    config[section] = configs.choose(section, name)
    with pytest.raises(configs.ConfigError, match=rf"objective.name='\w+', plan.name='\w+': .*{message}"):
        configs.resolve(config)


def test_gradients_of_rewards_are_not_mixed():
    config = configs.load("draft", HERE)
    config.optimizer.mix = "min_norm"
    with pytest.raises(configs.ConfigError, match=r"optimizer.mix='min_norm' with objective.name='draft'.*mix='none'"):
        configs.resolve(config)


def test_replayed_samples_need_an_objective_that_corrects_for_them():
    config = configs.load("op_grpo", HERE)
    assert configs.resolve(config).objective.old_log_prob == "update"
    config.objective = configs.choose("objective", "grpo")
    with pytest.raises(configs.ConfigError, match=r"select.name='replay', objective.name='grpo'.*op_grpo"):
        configs.resolve(config)


def test_stale_samples_keep_the_log_probs_of_their_rollout():
    config = configs.load("signs", HERE)
    config.model.dtype = "bfloat16"
    assert configs.resolve(config).objective.old_log_prob == "update"
    config.one_step_off_policy = True
    assert configs.resolve(config).objective.old_log_prob == "rollout"
    config.objective.old_log_prob = "update"
    with pytest.raises(configs.ConfigError, match=r"objective.old_log_prob='update' with one_step_off_policy=True"):
        configs.resolve(config)


def test_an_objective_that_needs_an_average_says_how_to_keep_it():
    config = configs.load("nft", HERE)
    del config.averages.old
    with pytest.raises(configs.ConfigError, match=r"'nft'.*role 'old'.*config.averages.old = average\(\"old\"\)"):
        configs.resolve(config)
    config = configs.load("signs", HERE)
    config.terms.mse_old = 0.1
    with pytest.raises(configs.ConfigError, match="role 'old'"):
        configs.resolve(config)


FLAGS = """
import sys
from absl import app
from ml_collections import config_flags
from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.fields import meanings, meanings_of

flag = config_flags.DEFINE_config_file("config", lock_config=True)


def main(_):
    assert flag.value.is_locked and flag.value.plan.is_locked and flag.value.averages.ema.is_locked
    try:
        print(configs.resolve(flag.value).arithmetic())
    except configs.ConfigError as error:
        print("ConfigError", error)


for argument in sys.argv[1:]:
    sys.argv[1:] = ["--config=configs/mixgrpo.py:signs", argument]
    flags = app.flags.FLAGS
    flags.unparse_flags()
    flags["config"].value = None
    try:
        app.run(main)
    except SystemExit as stop:
        assert not stop.code, argument
    except AttributeError as error:
        print("AttributeError", error)
"""


def test_flags_reach_every_field_and_are_refused_as_assignments_are():
    said = {
        "--config.plan.bound=6": "8 prompts x 12 = 96 samples",  # None until then
        "--config.evaluation.average=": "8 prompts x 12 = 96 samples",
        "--config.batch.prompts=16": "16 prompts x 12 = 192 samples",
        "--config.objective.name=nft": "ConfigError objective.name='nft'",
        "--config.plan.name=ode": "ConfigError plan.name='ode'",
        "--config.select.name=extremes": "ConfigError select.name='extremes'",
        "--config.plan.sede=1": "AttributeError",
    }
    said |= {f"--config.{old}=1": f"AttributeError '{old} is now {new}" for old, new in configs.RENAMED.items()}
    lines = run_program(FLAGS, *said, cwd=ROOT).splitlines()
    lines = [line for line in lines if not line.startswith("Did you mean")]
    for line, (flag, expected) in zip(lines, said.items(), strict=True):
        assert line.replace('"', "'").startswith(expected), (flag, line)


@pytest.mark.parametrize(("old", "new"), configs.RENAMED.items())
def test_a_renamed_field_says_where_it_is(old, new):
    section, field = old.split(".")
    for config in (configs.base(), configs.base().lock(), configs.load("mixgrpo", HERE)):
        for act in (lambda part: setattr(part, field, 1), lambda part: getattr(part, field)):
            with pytest.raises(AttributeError) as caught:
                act(config[section])
            assert f"{old} is now {new}" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: configs.choose("objective", "ntf"), "objective.name='ntf' is unknown; choose from .*grpo, .*nft"),
        (lambda: configs.choose("plan", "windw"), "plan.name='windw' is unknown; choose from .*window"),
        (
            lambda: configs.choose("objective", "nft", bta=0.1),
            "objective.bta is no field of NFT, did you mean beta.; it has beta, adv_max",
        ),
        (lambda: configs.choose("objectives", "nft"), "section='objectives' is unknown; choose from objective, plan"),
        (lambda: configs.choose("select", "os:nothing"), "select.name='os:nothing': .*write 'module:Class'"),
        (
            lambda: configs.average("old", dcay=0.1),
            "averages.old.dcay is no field of Average, did you mean decay.; it has decay",
        ),
    ],
)
def test_a_choice_that_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(configs.ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("spread", "routes", "message"),
    [
        ("temporal", (), "advantage.spread='temporal' with objective.name='nft': it trains on clean samples"),
        ("routes", ("ocrr:image",), "advantage.routes='ocrr' is unknown; choose from colour, ocr; did you mean ocr"),
        ("regions", ("ocr:above",), "advantage.routes='above' is unknown; choose from inside, outside"),
        ("nodes", (), "advantage.spread='nodes' with batch.shared_noise=False: .*; set batch.shared_noise=True"),
    ],
)
def test_credit_that_nothing_can_give_is_refused(spread, routes, message):
    config = configs.load("nft", HERE)
    config.advantage.spread, config.advantage.routes = spread, routes
    with pytest.raises(configs.ConfigError, match=message):
        configs.resolve(config)


@pytest.mark.parametrize(("noise", "eta"), [((0.5, 1.0, 1.5), 0.7), ((), 1.1)])
def test_more_noise_than_a_kernel_has_is_refused(noise, eta):
    config = configs.load("tmpo_tree", HERE)
    config.plan.noise, config.sampler.eta = noise, eta
    with pytest.raises(configs.ConfigError, match=rf"sampler.eta={eta} with sampler.kernel='cps'.*plan.noise"):
        configs.resolve(config)


@dataclass(frozen=True)
class Toy(Objective):
    """An objective of one's own."""

    strength: float = 1.0
    places: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"x0"})
    roles: ClassVar[frozenset[str]] = frozenset({"old"})
    span: ClassVar = "group"


def test_an_objective_of_ones_own_is_named_by_its_class():
    config = configs.load("signs", HERE)
    config.objective = configs.choose("objective", f"{__name__}:Toy", strength=0.5)
    config.averages.old = configs.average("old", by="iteration")
    config.lock()
    config.objective.places = 3  # None until then
    settings = configs.resolve(config)
    assert settings.objective == Toy(0.5, 3) and settings.roles == {"old"}
    config.batch.updates, config.batch.micro_batch = 3, 8
    with pytest.raises(
        configs.ConfigError, match=r"batch.updates=3 does not divide the 8 batch.prompts .*whole groups"
    ):
        configs.resolve(config)


def test_one_seed_moves_every_random_choice():
    config = configs.load("flow_grpo_fast", HERE)
    config.plan.length, config.plan.bound = 4, 10
    config.plan.train_fraction, config.plan.train_choice = 0.5, "random"
    seen = {}
    for seed in (1, 2, 1):
        config.seed = seed
        planner = configs.resolve(config).planner
        state, starts, trained = planner.initial(), [], []
        for _ in range(20):
            starts.append(state.start)
            trained.append(planner.plan(state, 2).train[:, 0].tolist())
            state = planner.advance(state)
        assert len(set(starts)) > 3 and len(set(map(tuple, trained))) > 3
        again = seen.setdefault(seed, (starts, trained))
        assert again == (starts, trained)
    assert all(a != b for a, b in zip(seen[1], seen[2]))


def sections():
    """The dataclasses behind base()'s fields, and every method that may be chosen: (path, class, its fields)."""
    of = dict(model=configs.Model, data=configs.Data, mesh=configs.Mesh, batch=configs.BatchSizes, sampler=Sampler)
    of |= dict(advantage=Credit, optimizer=configs.Optimizer, evaluation=configs.Evaluation, checkpoint=configs.Saves)
    of |= {
        "monitors": configs.Monitors,
        "profile": configs.Profile,
        "pretrain": configs.Pretrain,
        "model.lora": LoraConfig,
        "averages.ema": Average,
    }
    for section, table in configs.TABLES.items():
        of |= {f"{section}:{name}": configs.find(section, name) for name in table}
    return list(of.items())


@pytest.mark.parametrize(("path", "kind"), sections())
def test_every_field_is_explained_where_it_is_declared(path, kind):
    said = meanings_of(kind)
    for field in dataclasses.fields(kind):
        assert said.get(field.name), f"{path}.{field.name} is not in {kind.__name__}'s docstring"


def test_every_section_of_base_is_one_of_those_dataclasses_or_explained_beside_it():
    config, known = configs.base(), {path.partition(":")[0] for path, _ in sections()}
    assert meanings(configs.base.__doc__, list(config)).keys() | known == {*config, *known}
    for path, kind in sections():
        section = config
        if ":" not in path:
            for name in path.split("."):
                section = section[name]
            assert set(section) == {field.name for field in dataclasses.fields(kind)}, path


@pytest.mark.parametrize("name", ["mixgrpo", "nft", "flux_dev_lora"])
def test_a_config_goes_through_json_and_back(name):
    config = configs.load(name, HERE)
    back = ml_collections.ConfigDict(json.loads(config.to_json_best_effort()))
    ours, theirs = configs.resolve(config), configs.resolve(back)
    for field in dataclasses.fields(ours):
        if field.name not in ("config", "model"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


HEAVY = ["onnxruntime", "tensorflow_datasets", "transformers", "matplotlib", "orbax", "safetensors", "flax", "grain"]
LIGHT = """
import sys
import mixgrpo_jax.config

print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_the_config_alone_imports_no_model_reward_or_task():
    loaded = set(run_program(LIGHT).split())
    assert "jax" in loaded and not loaded & {*HEAVY, "clu", "tensorflow", "torch", "PIL"}


def test_help_comes_without_matplotlib_and_what_only_rewards_and_tasks_need():
    program = "import sys, mixgrpo_jax.train; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    heavy = {"onnxruntime", "tensorflow_datasets", "transformers", "matplotlib", "grain", "tensorflow", "torch"}
    assert not set(run_program(program).split()) & heavy
    command = [sys.executable, "-m", "mixgrpo_jax.train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--workdir" in done.stdout and done.stdout.startswith("Post-train a policy")
    assert "--config.optimizer.learning_rate=1e-05 " in done.stdout
