"""FLUX.1-dev, fully fine-tuned, at the sizes of MixGRPO's paper; recipes are put on it by the files beside this one.

    python -m mixgrpo_jax.encode --source=black-forest-labs/FLUX.1-dev --prompts=prompts.txt --target=data/flux_dev

The model and the rewards' files come from the hub, once you have accepted FLUX.1-dev's licence there and set HF_TOKEN;
or set model.folder and reward_options to where they are. data/flux_dev holds the prompts' cached features: 4 MB a
prompt with all 512 positions.

Hardware: the paper's run had 32 GPUs of 80 GB, one prompt each. Expected result: a folder of features; the recipes on
it say theirs.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The model, its data and its batch."""
    config = configs.base()
    config.iterations = 300
    config.model.folder = "black-forest-labs/FLUX.1-dev"
    config.model.image_size = (720, 720)
    config.model.text_length = 512
    config.model.dtype = "bfloat16"
    config.model.remat = "auto"  # as little is recomputed as fits
    config.model.attention = "auto"  # the accelerator's fused kernel
    config.data.name = "features"
    config.data.folder = "data/flux_dev"
    config.batch.prompts, config.batch.group = 32, 12
    config.batch.updates, config.batch.micro_batch, config.batch.decode = 4, 3, 1  # an update's 96 samples over 32
    config.plan.num_steps, config.plan.length, config.plan.iterations_per_window = 25, 4, 25
    config.rewards = dict(hps=1.0, image_reward=1.0, pickscore=1.0)
    config.watched = ()
    clip = dict(tokenizer="openai/clip-vit-large-patch14")
    config.reward_options = dict(
        hps=dict(clip, weights="xswu/HPSv2/HPS_v2.1_compressed.pt"),
        image_reward=dict(weights="THUDM/ImageReward/ImageReward.pt", tokenizer="google-bert/bert-base-uncased"),
        pickscore=dict(clip, weights="yuvalkirstain/PickScore_v1", normalise="mixgrpo"),
    )
    config.mesh.data, config.mesh.fsdp, config.mesh.context = 1, -1, -1  # 96 samples an update do not divide by 64
    config.evaluation.prompts, config.evaluation.batch = 64, 32
    config.evaluation.num_steps, config.evaluation.shift = 50, 0.0
    config.averages.ema.decay, config.evaluation.average = 0.0, ""  # the paper keeps none
    config.checkpoint.every = 50
    return config
