import pathlib

import pytest

from mixgrpo_jax import config as configs

HERE = str(pathlib.Path(__file__).parents[1] / "configs" / "any.py")
RECIPES = sorted(p.stem for p in pathlib.Path(HERE).parent.glob("*.py"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves(name):
    settings = configs.resolve(configs.load(name, HERE))
    batch = settings.config.batch
    assert settings.samples == batch.prompts * batch.group
    assert settings.passes * batch.micro_batch * batch.updates == settings.samples * settings.plan.num_trained
    assert str(settings.samples) in settings.arithmetic()


def test_recipes_differ_from_their_task_in_the_method_only():
    for on in ("signs", "scenes"):
        task = configs.load(on, HERE).to_dict()
        for name in [name for name in RECIPES if not name.startswith(("flux", "quickstart", "signs", "scenes"))]:
            recipe = configs.load(name, HERE, on).to_dict()
            changed = {key for key in task if recipe[key] != task[key]}
            assert changed <= {"plan", "sampler", "batch", "advantage", "objective"}, (name, on)


def test_published_settings():
    dance = configs.resolve(configs.load("dancegrpo", HERE))
    assert (dance.plan.window_length, dance.plan.num_trained, dance.sampler.kernel) == (9, 5, "dance")
    flow = configs.resolve(configs.load("flow_grpo", HERE))
    assert (flow.plan.window_length, flow.plan.num_trained) == (10, 9)
    star = configs.resolve(configs.load("mixgrpo_flash_star", HERE))
    assert (star.plan.strategy, star.plan.suffix_ratio, star.plan.solver_order) == ("frozen", 0.2, 2)


def test_unknown_fields_and_wrong_types_are_refused():
    config = configs.base().lock()
    with pytest.raises(AttributeError, match="lerning_rate"):
        config.optimizer.lerning_rate = 1.0
    with pytest.raises(TypeError, match="float"):
        config.iterations = 3.5
    with pytest.raises(configs.ConfigError, match=r"there is no .*flow_grop.py; choose from .*flow_grpo"):
        configs.load("flow_grop", HERE)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch.group", 1, "batch.group=1: a group of one has no advantage; use at least 2"),
        ("batch.updates", 5, "batch.updates=5 does not divide the 96 samples.*nearest that do: 4, 6"),
        ("batch.micro_batch", 7, "batch.micro_batch=7 does not divide the 24 samples an update.*nearest that do: 6, 8"),
        ("batch.micro_batch", 0, "batch.micro_batch=0 must be positive"),
        ("plan.length", 11, "length=11.*shorten it"),
        ("plan.strategy", "sliding", "strategy='sliding'.*progressive"),
        ("plan.num_steps", 1, "num_steps=1"),
        ("sampler.kernel", "ode", "sampler.kernel='ode' is unknown; choose from"),
        ("objective.clip_low", 0.0, "objective.clip_low=0.0 must be positive"),
        ("advantage.ddof", 3, "advantage.ddof=3"),
        ("evaluation.batch", 60, "evaluation.batch=60 does not divide the 256"),
        ("optimizer.ema_decay", 1.0, r"ema_decay=1.0 is not in \[0, 1\)"),
        ("optimizer.ema_decay", 0.0, "evaluation.ema=True with optimizer.ema_decay=0: no average is kept"),
        ("optimizer.name", "lion", "optimizer.name='lion'.*adafactor, adamw"),
        ("optimizer.dtype", "float16", "optimizer.dtype='float16'.*choose"),
        ("optimizer.final_rate", 2.0, r"final_rate=2.0 is not in \[0, 1\]"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate=0.0 must be positive"),
        ("rewards.ocr", -1.0, "rewards=.*positive weight"),
        ("rewards.beauty", 1.0, "rewards.beauty.*choose from"),
        ("model.remat", "all", "model.remat='all'.*choose"),
        ("model.dtype", "float7", "model.dtype='float7'.*choose"),
        ("model.attention", "flash", "model.attention='flash'.*choose"),
        ("model.lora.rank", -1, "lora.rank=-1 must be positive"),
        ("evaluation.trained_steps", 21, r"evaluation.trained_steps=21 is not in 0..10"),
        ("data.name", "scene", "data.name='scene'.*choose from features, scenes, signs"),
        ("evaluation.solver", "rk4", "evaluation.solver='rk4'.*choose"),
    ],
)
def test_what_cannot_be_is_refused_by_name(field, value, message):
    config = configs.load("signs", HERE)
    section = config
    *path, last = field.split(".")
    for name in path:
        section = section[name]
    section[last] = value
    with pytest.raises(configs.ConfigError, match=message):
        configs.resolve(config)
