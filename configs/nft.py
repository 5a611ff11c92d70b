"""DiffusionNFT (arXiv 2509.16117): samples of the ODE; the velocity is drawn to good ones and from bad ones.

    python -m mixgrpo_jax.train --config=configs/nft.py:signs --workdir=runs/nft

Samples are drawn by an average of the parameters, "old", which follows them once an iteration. Advantages are by the
prompt's mean and the whole batch's standard deviation. Each sample is trained at three noise levels of its schedule, at
random, and not at all of them; the released code also holds the velocity to that of before training, by 1e-4 times the
squared distance (`terms.mse_base`), for another evaluation at each of them.

Hardware: 2 CPU cores. Expected result: a held-out strict score from 0.64 to 0.905 in 16 iterations (0.895 to 0.914,
three seeds; benchmarks/RESULTS.md).
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """DiffusionNFT on the task `on`."""
    config = configs.load(on, __file__)
    config.plan = configs.choose("plan", "ode", config.plan, train_fraction=0.3, train_choice="random")
    config.sampler.solver = "dpm_midpoint"
    config.objective = configs.choose("objective", "nft", beta=0.3)
    config.averages.old = configs.average("old", decay=0.5, rate=0.001, by="iteration")
    config.batch.shared_noise = False
    config.advantage.std_scope = "batch"
    config.advantage.ddof = 0
    config.advantage.epsilon = 1e-4
    return config
