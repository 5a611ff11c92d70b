from mixgrpo_jax import config as configs
from mixgrpo_jax.engine import fields


def test_every_field_of_a_config_is_a_line_with_its_value():
    config = configs.base()
    config.rewards, config.averages.old = {"hps": 2.0}, configs.average("old", by="iteration")
    found = {path: (value, meaning) for path, value, meaning in fields.fields(config)}
    assert all(meaning for _, meaning in found.values())
    assert found["rewards.hps"] == (2.0, "trained on, by weight.") and found["averages.old.by"][0] == "iteration"
    assert found["optimizer.b2"] == (0.999, "AdamW's.") and found["model.lora.rank"][1].startswith("r; 0 trains all")
    assert found["batch.group"] == (12, "samples a prompt.") and found["reward_options"][0] == {}
    lines = [line for line in fields.listed(config).splitlines() if line.startswith("  --config.")]
    assert [line.split("=")[0] for line in lines] == [f"  --config.{path}" for path in found]
    assert max(map(len, lines)) <= 120
