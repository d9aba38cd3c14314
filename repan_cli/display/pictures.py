"""Draw pictures with captions, by Pillow: the first batch of a run, and classified images."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from repan_cli.system.text import shown

if TYPE_CHECKING:
    from PIL import Image

FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "Arial.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf"),
)
"""Fonts that are looked for in the system, those with Latin letters first; Pillow's own has no others."""

SIZE = 12
INK, PAPER, SOFT = (27, 31, 36), (255, 255, 255), (87, 96, 106)
GAP, MOST_ACROSS = 8, 8


class Captioned(NamedTuple):
    """A picture with the lines of its caption."""

    image: Image.Image
    lines: tuple[str, ...]


@functools.cache
def _fonts(size: int) -> tuple[Any, ...]:
    """Return the available fonts, Pillow's own last."""
    from PIL import ImageFont

    found = []
    for name in (*_of_matplotlib(), *FONTS):
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return (*found, ImageFont.load_default(size))


def _of_matplotlib() -> Iterator[str]:
    """Yield the font that Matplotlib brings, without importing it."""
    spec = importlib.util.find_spec("matplotlib")
    if spec and spec.origin:
        yield str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")


def font_for(text: str, size: int) -> Any:
    """Return the font that has the most of a text's letters, the first one if several do."""
    return max(_fonts(size), key=lambda font: sum(_has(font, letter) for letter in set(text)))


def lacking(texts: Iterable[str]) -> list[str]:
    """Return the letters of some texts that no available font has."""
    letters = {letter for text in texts for letter in shown(text, but="")}
    return sorted(letter for letter in letters if not any(_has(font, letter) for font in _fonts(SIZE)))


@functools.cache
def _has(font: Any, letter: str) -> bool:
    """Return whether a font has a letter; all letters that it lacks look alike."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffe"))


def fitted(text: str, width: int, size: int) -> tuple[str, Any]:
    """Return a text with its font, cut if it is wider than `width` pixels."""
    text = shown(text, but="")
    font = font_for(text, size)
    if font.getlength(text) <= width:
        return text, font
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}...", font


def with_caption(picture: Captioned, *, size: int, width: int | None = None) -> Image.Image:
    """Draw the caption below a picture, on white; `width` is the least width of the whole."""
    from PIL import Image, ImageDraw

    image, step = picture.image.convert("RGB"), size + 5
    across = max(image.width, width or 0)
    whole = Image.new("RGB", (across, image.height + step * len(picture.lines) + GAP // 2), PAPER)
    whole.paste(image, ((across - image.width) // 2, 0))
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(picture.lines):
        text, font = fitted(line, across - 4, size)
        place = (across / 2, image.height + GAP // 4 + step * number)
        draw.text(place, text, fill=INK if number == 0 else SOFT, font=font, anchor="ma")
    return whole


def resized(image: Image.Image, side: int) -> Image.Image:
    """Scale a picture so that its longer side has this length; small ones by whole pixels, so that each can be seen."""
    from PIL import Image

    longest = max(image.size)
    if longest <= side:
        factor = side // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / longest
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def mosaic(pictures: Sequence[Captioned], *, title: str, side: int = 112, size: int = 11) -> Image.Image:
    """Lay pictures out in rows under a title, each with its caption."""
    from PIL import Image, ImageDraw

    across = min(len(pictures), MOST_ACROSS)
    tiles = [with_caption(Captioned(resized(p.image, side), p.lines), size=size, width=side) for p in pictures]
    wide, high = (max(getattr(tile, name) for tile in tiles) + GAP for name in ("width", "height"))
    head = size + 3 * GAP
    whole = Image.new("RGB", (max(across * wide + GAP, 480), head + -(-len(tiles) // across) * high), PAPER)
    text, font = fitted(title, whole.width - 2 * GAP, size + 2)
    ImageDraw.Draw(whole).text((GAP, GAP), text, fill=INK, font=font)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, across)
        whole.paste(tile, (GAP + column * wide + (wide - GAP - tile.width) // 2, head + row * high))
    return whole


def from_bytes(rows: Iterable[tuple[bytes, int, int, int]]) -> Iterator[Image.Image]:
    """Yield pictures from their pixels in rows, height, width and number of channels, 1 or 3."""
    from PIL import Image

    for pixels, height, width, channels in rows:
        yield Image.frombytes("L" if channels == 1 else "RGB", (width, height), pixels)
