"""An iteration of MixGRPO on a small FLUX: this package's programs beside a straight PyTorch loop, on the same machine.

    python -m benchmarks.torch_loop

The PyTorch loop does what the published method does: every sample draws its whole trajectory, one by one or all of them
as one batch, and each update accumulates the gradient over samples and window steps. Both sides have the same weights,
prompts, trajectories and optimiser, compute in fp32, and keep all activations. Decoding and rewards are left out. The
repetitions are interleaved, and what is printed are medians as ratios, since machines have other things to do.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.programs import make_programs
from mixgrpo_jax.flow.schedules import shifted_sigmas
from mixgrpo_jax.models import flux
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.models.nn.patches import image_ids
from mixgrpo_jax.models.trainable import make_trainable
from mixgrpo_jax.rl.update import Batch
from mixgrpo_jax.runtime import mesh as meshes

_REPETITIONS = flags.DEFINE_integer("repetitions", 3, "Iterations measured of each, after one that is not.")
_START = flags.DEFINE_integer("start", 3, "First step of the window.")

MODEL = flux.flux_small(  # 40 million parameters
    num_layers=2,
    num_single_layers=5,
    num_attention_heads=8,
    attention_head_dim=64,
    joint_attention_dim=512,
    pooled_projection_dim=256,
    axes_dims_rope=(16, 24, 24),
)


def make_config() -> Any:
    """Two prompts x 4 samples of 128 x 64 pixels (256 tokens beside 64 of text), 10 steps, 3 of them stochastic."""
    config = configs.base()
    config.model.image_size, config.model.text_length = (128, 64), 64
    config.batch.prompts, config.batch.group, config.batch.updates, config.batch.micro_batch = 2, 4, 4, 2
    config.plan.num_steps, config.plan.length = 10, 3
    config.averages.ema.decay, config.evaluation.average = 0.0, ""
    return config


def random_params(seed: int = 0) -> Any:
    """Weights of which none is zero, as a fresh model's gates would be."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: flux.init(MODEL, jax.random.key(0)))

    def draw(leaf):
        std = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.02
        return rng.normal(scale=std, size=leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


class Ours:
    """The package's rollout and update."""

    def __init__(self, settings: configs.Settings, params: Any, cond: dict[str, np.ndarray]):
        mesh = meshes.make_mesh(settings.config.mesh, jax.devices()[:1])
        parts = Parts(FAMILY, {"transformer": MODEL})
        trainable = make_trainable(
            parts, jax.tree.map(jnp.asarray, params), settings.model.lora, jax.random.key(0), False
        )
        self.programs = make_programs(settings, parts, trainable, mesh)
        self.state = self.programs.init(trainable.params)
        self.plan = settings.planner.plan(settings.planner.initial()._replace(start=_START.value), len(cond["text"]))
        self.cond = cond
        self.evaluations = 0

    def rollout(self) -> None:
        """Draws the samples."""
        key = jax.random.key(0)
        self.drawn = jax.block_until_ready(
            self.programs.rollout(self.state.params, {"base": None}, self.plan, self.cond, key)
        )
        self.evaluations = int(self.drawn.executed)

    def update(self, advantage: np.ndarray) -> None:
        """Takes the optimiser steps."""
        batch = Batch(None, self.drawn.rows, advantage[None, :, None], np.ones_like(advantage), self.cond, {})
        self.state, metrics = jax.block_until_ready(self.programs.update(self.state, None, batch, self.plan))
        assert metrics["ratio/max_deviation"][0].max() < 1e-4


class Torch:
    """A loop over samples (`batch` 1) or over batches of them."""

    def __init__(self, settings: configs.Settings, folder: str, cond: dict[str, np.ndarray], batch: int):
        self.model = diffusers.FluxTransformer2DModel.from_pretrained(folder).train()
        options = settings.config.optimizer
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=options.learning_rate,
            betas=(options.b1, options.b2),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        planner = settings.planner
        self.sigmas = shifted_sigmas(planner.num_steps, planner.shift)
        self.window = range(_START.value, _START.value + planner.window_length)
        self.sampler, self.objective, self.batch = settings.sampler, settings.objective, batch
        self.updates, self.count, group = settings.config.batch.updates, settings.samples, settings.config.batch.group
        self.cond = {name: torch.tensor(a).repeat_interleave(group, 0) for name, a in cond.items()}
        self.ids = torch.tensor(np.asarray(image_ids(16, 16)), dtype=torch.float32)
        self.evaluations = 0

    def velocity(self, x: torch.Tensor, sigma: float, index: torch.Tensor) -> torch.Tensor:
        """The model at one noise level."""
        text = self.cond["text"][index]
        self.evaluations += len(index)
        return self.model(
            hidden_states=x,
            timestep=torch.full((len(index),), sigma),
            guidance=torch.full((len(index),), 3.5),
            encoder_hidden_states=text,
            pooled_projections=self.cond["pooled"][index],
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=self.ids,
            return_dict=False,
        )[0]

    def transition(self, x: torch.Tensor, step: int, index: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Mean and standard deviation of a stochastic step: Flow-GRPO's kernel."""
        sigma, sigma_next = map(float, self.sigmas[step : step + 2])
        dt = sigma_next - sigma
        below = 1 - (sigma if sigma < 1 else float(self.sigmas[1]))
        g2 = self.sampler.eta**2 * sigma / below
        v = self.velocity(x, sigma, index)
        mean = x * (1 + g2 / (2 * sigma) * dt) + v * (1 + g2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, (g2 * -dt) ** 0.5

    @torch.no_grad()
    def rollout(self) -> None:
        """Draws the samples; each has its whole trajectory."""
        generator, self.evaluations, drawn = torch.Generator().manual_seed(0), 0, []
        noise = torch.randn(2, 256, MODEL.in_channels, generator=generator).repeat_interleave(4, 0)
        for index in torch.arange(self.count).split(self.batch):
            x, rows = noise[index], []
            for step in range(len(self.sigmas) - 1):
                if step in self.window:
                    mean, std = self.transition(x, step, index)
                    x_next = mean + std * torch.randn(x.shape, generator=generator)
                    rows.append((x, x_next, self.log_prob(mean, std, x_next)))
                    x = x_next
                else:
                    sigma, sigma_next = map(float, self.sigmas[step : step + 2])
                    x = x + (sigma_next - sigma) * self.velocity(x, sigma, index)
            drawn.append((index, rows))
        self.drawn = drawn

    def log_prob(self, mean: torch.Tensor, std: float, x_next: torch.Tensor) -> torch.Tensor:
        """Mean log-density of each sample's step."""
        density = -((x_next - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
        return density.mean((1, 2))

    def update(self, advantage: np.ndarray) -> None:
        """Takes the optimiser steps, each over its share of the samples and all of the window."""
        share, scores = self.count // self.updates, torch.tensor(advantage, dtype=torch.float32)
        rows = [torch.cat([r[s][f] for _, r in self.drawn]) for s in range(len(self.window)) for f in range(3)]
        for samples in torch.arange(self.count).split(share):
            for index in samples.split(min(self.batch, share)):
                for offset, step in enumerate(self.window):
                    x, x_next, old = (a[index] for a in rows[3 * offset : 3 * offset + 3])
                    ratio = torch.exp(self.log_prob(*self.transition(x, step, index), x_next) - old)
                    clipped = ratio.clip(1 - self.objective.clip_low, 1 + self.objective.clip_high)
                    loss = torch.maximum(-scores[index] * ratio, -scores[index] * clipped).sum()
                    (loss / (share * len(self.window))).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()


def timed(function: Callable[..., None], *args: Any) -> float:
    """Seconds of a call."""
    start = time.monotonic()
    function(*args)
    return time.monotonic() - start


def main(_):  # noqa: D103
    settings, rng, params = configs.resolve(make_config()), np.random.default_rng(1), random_params()
    cond = {"text": rng.normal(size=(2, 64, 512)), "pooled": rng.normal(size=(2, 256))}
    cond = {name: a.astype(np.float32) for name, a in cond.items()}
    advantage = rng.normal(size=settings.samples).astype(np.float32)
    sides: dict[str, Any] = {"ours": Ours(settings, params, cond)}
    with tempfile.TemporaryDirectory() as folder:
        flux.TRANSFORMER.save_folder(folder, MODEL, params)
        for name, batch in (("PyTorch, one by one", 1), ("PyTorch, batched", settings.samples)):
            sides[name] = Torch(settings, folder, cond, batch)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    evaluations = {}
    for _ in range(1 + _REPETITIONS.value):
        for name, side in sides.items():
            rollout = timed(side.rollout)
            evaluations[name] = side.evaluations
            seconds[name].append((rollout, timed(side.update, advantage)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count / 1e6:.1f} million parameters; {settings.arithmetic()}; the window starts at step {_START.value}\n")
    print("| | rollout evaluations | rollout | update | iteration |\n|---|---|---|---|---|")
    medians = {name: [statistics.median(p) for p in zip(*times[1:])] for name, times in seconds.items()}
    ours = [*medians["ours"], sum(medians["ours"])]
    for name, (rollout, update) in medians.items():
        ratios = (theirs / own for theirs, own in zip((rollout, update, rollout + update), ours))
        print(f"| {name} | {evaluations[name]} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    app.run(main)
