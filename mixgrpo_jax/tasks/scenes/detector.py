"""A detector of the shapes in the pictures of the task `scenes`, by segmentation: exact on clean ones.

GenEval's rewards of this task, by that detector, are here too.
"""

import functools

import numpy as np
import scipy.ndimage

from mixgrpo_jax.rewards.contract import Images, Reward, Score
from mixgrpo_jax.rewards.geneval import Detection, scores
from mixgrpo_jax.rewards.preprocess import pooled
from mixgrpo_jax.tasks.scenes.shapes import GROUND, HEIGHT, PALETTE, SHAPES, SIZE, WIDTH, coverage

CONTRAST = 0.4  # distance from the ground, in the RGB unit cube, from which a pixel belongs to an object
SPECK = 8  # pixels; what is smaller is no object
MARGIN = 1  # pixels around a shape's box that should be ground
REACH = 1  # pixels by which noise may move a segment's centre

_NAMES = list(PALETTE)
_GROUND = np.array(GROUND, np.float32) / 255
_AXES = _GROUND - np.array(list(PALETTE.values()), np.float32) / 255  # from each colour to the ground
_CONNECTED = np.zeros((3, 3, 3), int)  # within a picture, diagonally too; never from one picture to another
_CONNECTED[1] = 1


def geneval(strict: bool = False) -> Reward:
    """GenEval's rule on scenes: are the shapes there, in number, colour and place? Graded, or with `strict` 0 or 1."""

    def score(images: Images, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        del prompts
        return scores(detect(images), metadata, strict)

    return Reward("geneval_strict" if strict else "geneval", "host", score)


def shapes(cell: tuple[int, int] = (8, 4)) -> Reward:
    """Where a picture stands out from the ground, as a map beside a score of 0, in cells of a latent position's pixels.

    It is the detector's own segmentation: to be watched, and named in advantage.map.
    """

    def score(images: Images, prompts: list[str], metadata: list[dict]) -> Score:
        del prompts, metadata
        strength = np.linalg.norm(_GROUND - np.asarray(images, np.float32) / 255, axis=-1)
        return Score(np.zeros(len(images), np.float32), pooled((strength > CONTRAST).astype(np.float32), cell))

    return Reward("shapes", "host", score)


def geneval_strict() -> Reward:
    """The same with `strict`."""
    return geneval(strict=True)


def detect(images: Images) -> list[list[Detection]]:
    """The shapes in each picture, uint8 [B, 24, 24, 3], in reading order of their first pixel.

    Pixels that stand out from the ground are cut into connected segments. A segment has the colour of the palette that
    is nearest to its strongest pixels; along the line from the ground to it, every pixel has a coverage a. The class is
    that of the template t which explains most of the coverage around the segment's middle, at up to one pixel from it,
    and the score, 1 for a clean shape, is the explained share, where positive:

        1 - sum (a - t)^2 / sum (t - mean t)^2.

    Raises:
        ValueError: images of another shape or dtype.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != (HEIGHT, WIDTH, 3):
        raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 [B, {HEIGHT}, {WIDTH}, 3]")
    return [list(detections) for detections in _detect(images.tobytes(), len(images))]


@functools.lru_cache(maxsize=1)  # several rewards look at the same pictures
def _detect(data: bytes, count: int) -> list[list[Detection]]:
    images = np.frombuffer(data, np.uint8).reshape(count, HEIGHT, WIDTH, 3)
    depth = _GROUND - images.astype(np.float32) / 255
    strength = np.linalg.norm(depth, axis=-1)
    labels, _ = scipy.ndimage.label(strength > CONTRAST, _CONNECTED)
    found: list[list[Detection]] = [[] for _ in images]
    for number, place in enumerate(scipy.ndimage.find_objects(labels), 1):
        segment = labels[place] == number
        if np.count_nonzero(segment) < SPECK:
            continue
        picture, rows, columns = place
        strong = strength[place][segment]
        seen = depth[place][segment][strong >= np.median(strong)].mean(0)
        colour = int(np.square(_AXES - seen).sum(-1).argmin())
        middle = ((rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2)
        found[picture.start].append(_classify(depth[picture.start], colour, *middle))
    return found


def _classify(depth: np.ndarray, colour: int, row: int, column: int) -> Detection:
    """The shape that explains most of what is around a pixel; depth [H, W, 3] is the ground minus the picture."""
    templates, variance = _templates()
    axis = _AXES[colour]
    edge = SIZE  # added around the picture, more than windows reach out of it
    covered = np.zeros((HEIGHT + 2 * edge, WIDTH + 2 * edge), np.float32)
    covered[edge:-edge, edge:-edge] = np.clip(depth @ axis / (axis @ axis), 0, 1)
    top, left = row - SIZE // 2 - REACH, column - SIZE // 2 - REACH  # of the first box that is tried
    side = templates.shape[-1] + 2 * REACH
    around = covered[top - MARGIN + edge :, left - MARGIN + edge :][:side, :side]
    windows = np.lib.stride_tricks.sliding_window_view(around, templates.shape[1:])  # [dy, dx, side, side]
    explained = 1 - np.square(windows[:, :, None] - templates).sum((-1, -2)) / variance
    dy, dx, shape = (int(i) for i in np.unravel_index(explained.argmax(), explained.shape))
    box = (left + dx, top + dy, left + dx + SIZE, top + dy + SIZE)
    return Detection(SHAPES[shape], float(max(explained[dy, dx, shape], 0)), box, _NAMES[colour])


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Coverage of every shape with ground around it, [shapes, SIZE + 2 MARGIN, same], and its sum of squares."""
    templates = np.stack([np.pad(coverage(name), MARGIN) for name in SHAPES])
    return templates, np.square(templates - templates.mean((-1, -2), keepdims=True)).sum((-1, -2))
