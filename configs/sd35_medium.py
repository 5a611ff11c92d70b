"""Stable Diffusion 3.5 Medium by LoRA at 512 x 512, at the sizes of Flow-GRPO's and MixGRPO's runs.

    python -m mixgrpo_jax.encode --source=stabilityai/stable-diffusion-3.5-medium --prompts=prompts.txt \
        --max_length=128 --target=data/sd35_medium

If you accept its licence there and set HF_TOKEN, the model comes from the hub. For the rewards' files see flux_dev.py.
Sampling and training are guided at 4.5, each of two evaluations; `--config.model.guidance=1` trains without guidance,
at half the cost.

Hardware: the published runs had 24 or 32 GPUs of 80 or 96 GB. Expected result: a folder of features; the recipes on it
say theirs.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The model, its data and its batch."""
    config = configs.load("flux_dev", __file__)
    config.model.folder = "stabilityai/stable-diffusion-3.5-medium"
    config.model.image_size = (512, 512)
    config.model.text_length = 128
    config.model.guidance = 4.5
    config.model.lora.rank, config.model.lora.alpha = 32, 64.0
    config.data.folder = "data/sd35_medium"
    config.batch.prompts, config.batch.group = 48, 24
    config.batch.updates, config.batch.micro_batch = 2, 6
    config.plan.num_steps, config.plan.spacing = 10, "linspace"
    config.optimizer.learning_rate, config.optimizer.weight_decay = 3e-4, 1e-4
    config.averages.ema.decay, config.evaluation.average = 0.9, "ema"
    config.evaluation.num_steps, config.evaluation.shift, config.evaluation.spacing = 40, 3.0, "linspace"
    return config
