"""FLUX.2 [klein] base 4B by LoRA, at 512 x 512 or 1024 x 1024: get_config("1024").

    python -m mixgrpo_jax.encode --source=black-forest-labs/FLUX.2-klein-base-4B --prompts=prompts.txt \
        --max_length=512 --target=data/flux2_klein

The model comes from the hub (Apache 2.0); for the rewards' files see flux_dev.py. Sampling and training are guided at
4, each of two evaluations; `--config.model.guidance=1` trains without guidance, at half the cost. A prompt's features
take 7.9 MB, most of it for padding, which the model attends to: see docs/flux2.md.

Hardware: not run at this size here; `estimate --architecture=flux2-klein-4b` says what fits. Expected result: a folder
of features; the recipe on it says its own.
"""

from mixgrpo_jax import config as configs
from mixgrpo_jax.flow.schedules import empirical_shift


def get_config(side=512):
    """The model, its data and its batch, for square pictures."""
    config = configs.load("flux_dev", __file__)
    config.model.folder = "black-forest-labs/FLUX.2-klein-base-4B"
    config.model.image_size = (int(side), int(side))
    config.model.text_length = 512
    config.model.guidance = 4.0
    config.model.lora.rank, config.model.lora.alpha = 32, 64.0
    config.data.folder = "data/flux2_klein"
    config.batch.prompts, config.batch.group = 16, 24
    config.batch.updates, config.batch.micro_batch = 2, 4
    config.plan.num_steps, config.evaluation.num_steps = 10, 50
    for steps in (config.plan, config.evaluation):
        steps.shift = empirical_shift((int(side) // 16) ** 2, steps.num_steps)
    config.optimizer.learning_rate = 1e-4
    return config
