"""MixGRPO on FLUX.1-dev by LoRA: rank 64 on the attentions, 1024 x 1024, for a small slice.

    python -m mixgrpo_jax.train --config=configs/flux_dev_lora.py --workdir=runs/flux_dev_lora
    python -m mixgrpo_jax.convert --source=runs/flux_dev_lora --target=lora --to=lora

Data: see flux_dev.py. The base is frozen in bf16 (23.8 GB over the slice); adapters and their optimiser are fp32. Rate,
rank and alpha are those of Flow-GRPO's FLUX runs.

Hardware: v5e:4x4, 16 chips, holds it by `estimate`: 7.8 GiB a chip. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The recipe on the model, with adapters."""
    config = configs.load("mixgrpo", __file__, "flux_dev")
    config.model.image_size = (1024, 1024)
    config.model.lora.rank, config.model.lora.alpha = 64, 128.0
    config.batch.prompts = 16
    config.optimizer.learning_rate = 3e-4
    config.checkpoint.every = 10
    return config
