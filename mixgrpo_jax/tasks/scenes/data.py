"""Scenes: small pictures of coloured shapes, and prompts of GenEval's six kinds that ask for them.

"a photo of a red circle and a blue square" is a picture of 24 x 24 pixels with just these on a plain ground. What a
prompt asks for comes with it as GenEval's metadata, and can be checked exactly, so a model trained here can be scored
by GenEval's own rule. The test split holds prompts that training never shows.
"""

import functools
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from transformers import PreTrainedTokenizerFast

from mixgrpo_jax.tasks import rendered
from mixgrpo_jax.tasks.rendered import batches as batches
from mixgrpo_jax.tasks.rendered import collate as collate
from mixgrpo_jax.tasks.scenes import shapes
from mixgrpo_jax.tasks.scenes.shapes import PALETTE, SHAPES, SIZE, Shape

NOISE = 150.0  # a photograph's noise is of any standard deviation up to this one, in levels of 255
PROMPT_LENGTH = 12  # tokens of the longest prompt, "a photo of a red circle left of a blue square </s>"

# Of a split's prompts; those of one shape are few, and easy.
KINDS = {
    "single_object": 0.1,
    "two_object": 0.2,
    "counting": 0.2,
    "colors": 0.1,
    "position": 0.2,
    "color_attr": 0.2,
}
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # towards x, y

_CORNERS = np.array(list(itertools.product((0, 1), repeat=2)))  # of a picture: x, y


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: shapes, each (name, colour or "" for any), one of KINDS, and how two of them lie."""

    kind: str
    shapes: tuple[tuple[str, str], ...]
    relation: str = ""  # of the first to the second

    @property
    def prompt(self) -> str:
        """The sentence that asks for this scene, in GenEval's words."""
        if self.kind == "counting":
            return f"a photo of {COUNTS[len(self.shapes)]} {plural(self.shapes[0][0])}"
        said = [" ".join(["a", colour, name] if colour else ["a", name]) for name, colour in self.shapes]
        return "a photo of " + f" {self.relation or 'and'} ".join(said)

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval's metadata of this prompt."""
        if self.kind == "counting":
            name, count = self.shapes[0][0], len(self.shapes)
            include, exclude = [_clause(name, count)], [_clause(name, count + 1)]
            return {"tag": self.kind, "include": include, "exclude": exclude, "prompt": self.prompt}
        include = [_clause(name, 1, colour) for name, colour in self.shapes]
        if self.relation:  # what others lie by comes first
            include = [include[1], include[0] | {"position": [self.relation, 0]}]
        return {"tag": self.kind, "include": include, "prompt": self.prompt}


def _clause(name: str, count: int, colour: str = "") -> dict[str, Any]:
    return {"class": name, "count": count} | ({"color": colour} if colour else {})


def plural(name: str) -> str:
    """Several of a shape.

    >>> plural("circle"), plural("cross")
    ('circles', 'crosses')
    """
    return name + ("es" if name.endswith("s") else "s")


@functools.cache
def scenes(split: str, kind: str) -> list[Scene]:
    """The scenes of a kind that `split` may ask for, in order.

    One in four prompts is held out for testing, by a hash of its words. Prompts for a single shape are in both: they
    are too few to hold any out. Prompts for a position may name colours, where GenEval's do not: there are 48 without,
    and a model learns so few by heart.
    """
    pairs = list(itertools.permutations(SHAPES, 2))
    every = {
        "single_object": [Scene(kind, ((a, ""),)) for a in SHAPES],
        "two_object": [Scene(kind, ((a, ""), (b, ""))) for a, b in pairs],
        "counting": [Scene(kind, ((a, ""),) * count) for a in SHAPES for count in COUNTS],
        "colors": [Scene(kind, ((a, colour),)) for a in SHAPES for colour in PALETTE],
        "position": [
            Scene(kind, ((a, one), (b, other)), relation)
            for a, b in pairs
            for one, other in itertools.product(["", *PALETTE], repeat=2)
            for relation in RELATIONS
        ],
        "color_attr": [
            Scene(kind, ((a, one), (b, other))) for a, b in pairs for one, other in itertools.permutations(PALETTE, 2)
        ],
    }[kind]
    if kind == "single_object":
        return every
    return [scene for scene in every if (zlib.crc32(scene.prompt.encode()) % 4 == 0) == (split == "test")]


def sample_scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes drawn from those of `split` ("train" or "test"), kinds by their weights; a pure function."""
    rng = rendered.generator(seed, split)
    kinds = rng.choice(list(KINDS), size=count, p=list(KINDS.values()))
    return [_pick(rng, scenes(split, str(kind))) for kind in kinds]


def _pick(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


def lay_out(scene: Scene, rng: np.random.Generator) -> list[Shape]:
    """A scene's shapes, each in a corner of the picture, and in any colour where none is asked for.

    Two shapes that are related lie in neighbouring corners, and so do two different ones that only "and" joins, from
    left to right as they are named.
    """
    relation = scene.relation or ("left of" if len(set(scene.shapes)) > 1 else "")
    corners = rng.permutation(_CORNERS)
    while relation and tuple(corners[0] - corners[1]) != RELATIONS[relation]:
        corners = rng.permutation(_CORNERS)
    places = corners * [shapes.WIDTH - SIZE, shapes.HEIGHT - SIZE]
    return [
        Shape(name, colour or _pick(rng, list(PALETTE)), int(left), int(top))
        for (name, colour), (left, top) in zip(scene.shapes, places)
    ]


def photograph(scene: Scene, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A scene as a data set would have it, somehow laid out, with more or less noise.

    The detector fails on many such pictures, so a model that draws what the data show is no better, and one that learns
    from rewards can be.
    """
    return rendered.photograph(shapes.render(lay_out(scene, rng)), NOISE, rng)


class Scenes(rendered.Rendered):
    """TFDS builder of the rendered scenes."""

    VERSION = tfds.core.Version("1.8.0")
    BUILDER_CONFIGS = (rendered.Sizes(name="full", description="20,000 training and 512 test scenes."),)
    IMAGE_SIZE = (shapes.HEIGHT, shapes.WIDTH)
    TEXTS = ("prompt", "metadata")

    def examples(self, split: str, count: int, seed: int) -> Iterator[dict]:
        """Photographs of scenes, and the same with less noise, with their prompts; metadata are JSON."""
        for key, scene in enumerate(sample_scenes(split, count, seed)):
            pictures = photograph(scene, rendered.generator(seed, split, key))
            yield pictures | {"prompt": scene.prompt, "metadata": json.dumps(scene.metadata)}


def load(
    split: str, data_dir: str | os.PathLike | None = None, config: str | rendered.Sizes = "full"
) -> grain.MapDataset:
    """The scenes of `split`, by random access, built on first use.

    An element has `image` and `clean` (uint8 [24, 24, 3]), `prompt`, and `metadata`: GenEval's. The arguments are those
    of `rendered.load`.
    """
    return rendered.load(Scenes, split, data_dir, config).map(_element)


def _element(example: dict) -> dict:
    metadata = json.loads(example["metadata"].decode())
    return example | {"prompt": example["prompt"].decode(), "metadata": metadata}


def groups(metadata: dict) -> dict[str, str]:
    """What an element is counted under when scores are reported: its kind."""
    return {"kind": metadata["tag"]}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the prompts: one token for each word, then </s>; pad 0, eos 1, unknown 2."""
    grammar = ["a", "photo", "of", "and", "left", "right", "above", "below", *COUNTS.values()]
    return rendered.word_tokenizer([*grammar, *PALETTE, *SHAPES, *map(plural, SHAPES)], PROMPT_LENGTH)
