"""How a policy does on prompts that it is not trained on."""

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mixgrpo_jax.config import ConfigError, Evaluation, Settings, refusing
from mixgrpo_jax.data.prompts import Prompt
from mixgrpo_jax.flow import plans, rollout, schedules
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.rewards.contract import Reward, Score
from mixgrpo_jax.rewards.scoring import score_chunks
from mixgrpo_jax.runtime import compiler, distributed, progress, runs
from mixgrpo_jax.runtime.files import Path, place, replaced
from mixgrpo_jax.runtime.metrics import scored
from mixgrpo_jax.tasks import load_task

DIVERSITY = ("diversity/latents", "diversity/pixels")  # of several samples of a prompt, among its scores


def make_draw(policy: Policy, options: Evaluation, attach: Callable[[Any, Any], Any]) -> Callable[..., tuple]:
    """`draw(trained, frozen, cond, noise) -> images, latents`, by a config's `evaluation`: deterministic, and jitted.

    With `trained_steps` K, the trained policy takes the first K steps and the base the others (hybrid inference): what
    a picture says is decided early, what it looks like late.
    """
    shift = options.shift or schedules.resolution_shift(policy.latent_shape[0])
    sigmas = schedules.shifted_sigmas(options.num_steps, shift, options.spacing)
    orders = plans.solver_orders(options.solver_order, options.num_steps)
    switch = options.num_steps if options.trained_steps is None else options.trained_steps

    def draw(trained, frozen, cond, noise):
        x, base = noise, frozen["base"]
        for params, steps in ((attach(trained, base), slice(0, switch)), (base, slice(switch, options.num_steps))):
            if steps.start < steps.stop:
                velocity = functools.partial(policy.velocity, params)
                grid = sigmas[steps.start : steps.stop + 1]
                x = rollout.integrate(velocity, grid, x, cond, orders=orders[steps], solver=options.solver)
        return policy.decode(frozen, x), x

    return jax.jit(draw, compiler_options=compiler.options(jax.devices()))


class Assessment(NamedTuple):
    """Held-out pictures [N, H, W, 3] uint8 and their scores {name: [N]}, NaN where there is none.

    Of several samples a prompt, those of a prompt follow each other.
    """

    images: np.ndarray
    scores: dict[str, np.ndarray]

    def save(self, path: str | os.PathLike) -> None:
        """Write both to a .npz file, whole."""
        arrays: dict[str, Any] = {"images": self.images, **self.scores}
        with replaced(path) as temporary:
            np.savez_compressed(temporary, **arrays)

    def excerpt(self, edge: int = 512) -> "Assessment":
        """All scores, and the pictures of the first prompts: 24, or as many as take 1 MiB; at most `edge` pixels long.

        It is small enough to keep at every evaluation.
        """
        images = self.images[: max(24, 2**20 // self.images[0].nbytes)]
        height, width = images.shape[1:3]
        if (shrink := max(height, width) / edge) > 1:
            size = (round(width / shrink), round(height / shrink))
            images = np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BOX)) for each in images])
        return Assessment(images, self.scores)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Assessment | None":
        """Read what `save` wrote; None, with a warning, where it is not there or broken."""
        try:
            with place(path).open("rb") as opened, np.load(opened) as file:
                scores = {name: file[name] for name in file.files}
            return cls(scores.pop("images"), scores)
        except runs.BROKEN as error:
            print(f"WARNING: {path} cannot be read, and nothing is compared with it: {error}", file=sys.stderr)
            return None


class HeldOut:
    """The held-out prompts of a task, or those that are `listed`, and how a policy is scored on them by rewards.

    Every prompt has so many `samples`. Where there are several, how they differ is a score of each prompt beside those
    of the rewards: that of their final latents and that of their pixels, which count from 0 to 1, see `diversity`.
    """

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        rewards: Sequence[Reward],
        attach: Callable[[Any, Any], Any] = lambda trained, base: trained,
        listed: Sequence[Prompt] | None = None,
        samples: int = 1,
        check: Callable[[Mapping[str, Score]], None] = lambda scores: None,
    ):
        """`check` may refuse the scores that the rewards give."""
        self.check = check
        self.options, self.policy, self.samples = settings.evaluation, policy, samples
        config = settings.config
        self._score = functools.partial(
            score_chunks, rewards, missing_share=config.missing_share, wait=config.reward_wait
        )
        self.task = load_task(settings.data.name if listed is None else "features")
        if listed is None:
            dataset = self.task.load("test", settings.data.folder)
            if self.options.prompts > len(dataset):
                raise ConfigError(
                    f"evaluation.prompts={self.options.prompts}: {settings.data.name} holds {len(dataset)} out; ask "
                    "for fewer"
                )
            self.elements = [dataset[i] for i in range(self.options.prompts)]
        else:
            self.elements = [{"prompt": prompt.text, "metadata": prompt.metadata} for prompt in listed]
        self.prompts = [element["prompt"] for element in self.elements]
        self.metadata = [element["metadata"] for element in self.elements]
        if listed is not None or settings.data.name != "features":  # whose lengths were checked as they were encoded
            with refusing(f"model.text_length={settings.model.text_length}: "):
                policy.tokenize(self.prompts)
        self.groups = [self.task.groups(metadata) for metadata in self.metadata]
        # apart from every iteration's
        self.key = jax.random.fold_in(jax.random.key(settings.config.seed), 2**31 - 1)
        self._draw = make_draw(policy, self.options, attach)
        self._features = jax.jit(policy.features)

    def draw(self, trained: Any, frozen: Any) -> Assessment:
        """Pictures of the prompts, with the scores that need no reward: how a prompt's samples differ.

        The noise is the same every time: that of a prompt's sample depends on both their indices, not on its batch.
        """
        count, k = len(self.prompts), self.samples
        size, images, apart = min(self.options.batch, count), [], []
        for start in progress.over(range(0, count, size), "drawing held-out pictures, batch", -(-count // size)):
            index = np.arange(start, start + size) % count  # a short last batch is filled up: one program
            chosen = [self.elements[i] for i in index]
            if "features" in chosen[0]:
                cond = self.task.collate(chosen)["features"]
            else:
                cond = self._features(frozen, self.policy.tokenize([element["prompt"] for element in chosen]))
            drawn = [self._draw(trained, frozen, cond, self._noise(index, sample)) for sample in range(k)]
            images.append(np.stack([distributed.gather(image) for image, _ in drawn], 1))
            if k > 1:
                latents = np.stack([distributed.gather(latent) for _, latent in drawn], 1)
                apart.append([diversity(latents), diversity(images[-1]) / 255])
        pictures = np.concatenate(images)[:count]
        values = np.concatenate(apart, 1)[:, :count].repeat(k, 1) if k > 1 else ()
        return Assessment(pictures.reshape(-1, *pictures.shape[2:]), dict(zip(DIVERSITY, values)))

    def _noise(self, index: np.ndarray, sample: int) -> jax.Array:
        key = jax.random.fold_in(self.key, sample) if sample else self.key
        return rollout.initial_noise(Sampler(), key, jnp.asarray(index), self.policy.latent_shape)

    def assess(self, trained: Any, frozen: Any) -> Assessment:
        """Pictures of the prompts and their scores by every reward."""
        images, apart = self.draw(trained, frozen)
        columns = ([value for value in column for _ in range(self.samples)] for column in (self.prompts, self.metadata))
        with progress.doing(f"scoring {len(images)} pictures"):
            scores = distributed.map_rows(self._score, [images], [np.arange(len(images))], *columns)
        self.check(scores)
        return Assessment(images, {name: score.value for name, score in scores.items()} | apart)

    def keep(self, workdir: Path, iteration: int, assessment: Assessment) -> Assessment:
        """Write an assessment's excerpt and the prompts into workdir/held_out, on process 0: the report shows them.

        Returns the excerpt.
        """
        excerpt = assessment.excerpt()
        if distributed.is_first():
            folder = workdir / runs.HELD_OUT
            folder.mkdir(parents=True, exist_ok=True)
            excerpt.save(folder / f"{iteration}.npz")
            with replaced(folder / runs.PROMPTS) as file:
                file.write_text(json.dumps(self.prompts))
        return excerpt


def diversity(samples: np.ndarray) -> np.ndarray:
    """How K samples of each of P prompts differ: the mean distance of two of them, [P, K, ...] -> [P].

    The distance is the root mean square of the difference, over all numbers of a sample: it does not grow with the
    picture's size. Equal samples are 0 apart, independent ones of unit variance sqrt(2).
    """

    def distance(pair: tuple[np.ndarray, np.ndarray]) -> float:
        return float(np.sqrt(np.square(pair[0].astype(np.float32) - pair[1]).mean()))

    return np.array([np.mean(list(map(distance, itertools.combinations(of_prompt, 2)))) for of_prompt in samples])


def table(
    scores: dict[str, np.ndarray],
    groups: Sequence[dict[str, str]] = (),
    before: dict[str, np.ndarray] | None = None,
) -> str:
    """Mean scores as text: over all samples, then by each label of their groups, {kind: label} for each sample.

    With the scores of `before`, each has three columns: before, after, and the change. What does not fit
    `progress.COLUMNS` stands below. Of labels that name the same samples the first is shown.
    """
    rows = {"all": np.ones(len(next(iter(scores.values()))), bool)}
    for kind in dict.fromkeys(kind for group in groups for kind in group):
        labels = np.array([group.get(kind, "") for group in groups])
        rows |= {f"{kind} {label}": labels == label for label in np.unique(labels)}
    once: dict[bytes, tuple[str, np.ndarray]] = {}
    for row, chosen in rows.items():
        once.setdefault(chosen.tobytes(), (row, chosen))
    title = max(len(row) for row, _ in once.values()) + 2

    def cell(name: str, chosen: np.ndarray) -> str:
        after = scored(scores[name][chosen]).mean()
        if before is None:
            return f"{after:.3f}"
        was = scored(before[name][chosen]).mean()
        return f"{was:>8.3f}{after:>8.3f}{after - was:>+8.3f}"

    least = 10 if before is None else 26
    columns = {name: max(len(name) + 2, least) for name in scores}
    fit = max((progress.COLUMNS - title - 6) // max(columns.values()), 1)
    lines = []
    for some in (list(columns)[start : start + fit] for start in range(0, len(columns), fit)):
        lines.append(f"{'':<{title}}{'n':>6}" + "".join(f"{name:>{columns[name]}}" for name in some))
        if before is not None:
            heads = f"{'before':>8}{'after':>8}{'change':>8}"
            lines.append(" " * (title + 6) + "".join(f"{heads:>{columns[name]}}" for name in some))
        for row, chosen in once.values():
            cells = "".join(f"{cell(name, chosen):>{columns[name]}}" for name in some)
            lines.append(f"{row:<{title}}{chosen.sum():>6}{cells}")
    return "\n".join(lines)
