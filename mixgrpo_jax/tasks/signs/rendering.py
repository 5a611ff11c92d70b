"""Pictures of signs: plates of one colour with a number of another. The renderer alone, without a data set."""

import functools
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 16, 48

DARK = {
    "red": (200, 20, 30),
    "green": (0, 130, 60),
    "blue": (20, 50, 210),
    "purple": (125, 10, 150),
    "black": (15, 15, 15),
}
LIGHT = {"white": (250, 250, 250), "yellow": (250, 220, 20), "cyan": (40, 220, 240), "pink": (255, 130, 190)}
PALETTE: dict[str, tuple[int, int, int]] = DARK | LIGHT

_FONT_SIZE, _PITCH, _OVERSAMPLING = 16, 12, 4  # pixels, pixels, and the factor that antialiases the glyphs


@dataclass(frozen=True)
class Sign:
    """What a picture shows: a number of one to four digits, and the names of its plate's and digits' colours."""

    number: str
    plate: str
    digits: str

    @property
    def prompt(self) -> str:
        """The sentence that asks for this sign."""
        return f"a {self.plate} sign that says {self.number} in {self.digits}"


def render(sign: Sign) -> np.ndarray:
    """Picture of a sign, uint8 [16, 48, 3]: digits in cells of equal pitch, centred, antialiased."""
    covered = coverage(sign.number)[..., None]
    plate, digits = (np.asarray(PALETTE[name], np.float32) for name in (sign.plate, sign.digits))
    return np.rint(plate + covered * (digits - plate)).astype(np.uint8)


def coverage(number: str) -> np.ndarray:
    """Share of each pixel that the digits cover, float32 [16, 48] in [0, 1]."""
    mask = Image.new("L", (WIDTH * _OVERSAMPLING, HEIGHT * _OVERSAMPLING))
    draw, font = ImageDraw.Draw(mask), _font()
    top = font.getbbox("0", anchor="ls")[1]
    baseline = (mask.height - top) / 2
    for i, digit in enumerate(number):
        centre = mask.width / 2 + (i - (len(number) - 1) / 2) * _PITCH * _OVERSAMPLING
        draw.text((centre, baseline), digit, fill=255, font=font, anchor="ms")
    return np.asarray(mask.resize((WIDTH, HEIGHT), Image.Resampling.BOX), np.float32) / 255


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
    return ImageFont.truetype(path, _FONT_SIZE * _OVERSAMPLING)
