"""MixGRPO on FLUX.2 [klein] base 4B: 24 images a prompt, a window of 4 of 10 steps, guided at 4.

    python -m mixgrpo_jax.train --config=configs/flux2_klein_mixgrpo.py --workdir=runs/flux2_klein
    python -m mixgrpo_jax.train --config=configs/flux2_klein_mixgrpo.py:1024 --workdir=runs/flux2_klein_1024

The ratio is clipped at 1e-5: at the 1e-4 of other models this one collapses, as others report. Data: see
flux2_klein.py. The programs are the ones that the small runs use.

Hardware: not run at this size here; `estimate --architecture=flux2-klein-4b` says what fits. Expected result: not
measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(side=512):
    """The recipe on the model, for square pictures."""
    config = configs.load("mixgrpo", __file__, "flux2_klein", side)
    config.objective.clip_low = config.objective.clip_high = 1e-5
    config.ratio_tolerance = config.objective.clip_high / 2
    return config
