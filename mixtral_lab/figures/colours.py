"""One colour for every expert, the same in all figures, and what colours look like to different eyes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from mixtral_lab.config import LabError

# The hues of Okabe and Ito's set for colour-blind readers (jfly.uni-koeln.de/color, 2008), wine for its black,
# which a dark page would swallow. Moved apart until every pair also differs clearly for readers without one of
# the three kinds of cones (Machado, Oliveira and Fernandes 2009): tests/test_figures.py holds the distance.
EXPERT_COLOURS = ("#F99403", "#59DAFA", "#008E73", "#D3EC6D", "#1545B3", "#ED3112", "#A06AD4", "#7B2E56")

MOST_EXPERTS = 1024  # as many have a colour of their own
FAINTEST = 0.25  # how much of its colour an expert keeps at weight 0


class FigureError(LabError, ValueError):
    """A figure was asked for something that its data does not have."""


def expert_colour(expert: int) -> str:
    """The colour of an expert, as "#RRGGBB": of `EXPERT_COLOURS`, and for each further expert the colour farthest
    from all before it, so that an expert's colour never depends on how many there are.

    Raises `FigureError` outside 0 to `MOST_EXPERTS` - 1.
    """
    if not 0 <= expert < MOST_EXPERTS:
        raise FigureError(f"Expert {expert} has no colour: experts 0 to {MOST_EXPERTS - 1} have one.")
    if expert < len(EXPERT_COLOURS):
        return EXPERT_COLOURS[expert]
    size = 64
    while size <= expert:
        size *= 4
    return palette(size)[expert]


def text_colour(background: str) -> str:
    """Black or white, whichever reads better on a colour; their contrast is at least 4.58, above the 4.5 of WCAG 2.2."""
    luminance = float(linear([rgb(background)])[0] @ [0.2126, 0.7152, 0.0722])
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def blend(colour: str, share: float) -> str:
    """That share of a colour on white."""
    return "#" + "".join(f"{round(255 - share * (255 - part)):02X}" for part in rgb(colour))


def linear(rgb: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """Bytes of sRGB to amounts of light between 0 and 1 (IEC 61966-2-1)."""
    share = np.asarray(rgb) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def oklab(light: np.ndarray) -> np.ndarray:
    """Amounts of light to a space where distance is difference as seen. Source: Ottosson 2020, bottosson.github.io."""
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(light @ cones.T) @ opponents.T


@cache
def palette(size: int) -> tuple[str, ...]:
    """`EXPERT_COLOURS`, then always the one of many colours, not too light or dark, that is farthest from those so far."""
    steps = np.arange(0, 256, 17)
    drawn = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    seen = oklab(linear(drawn))
    middling = (seen[:, 0] > 0.35) & (seen[:, 0] < 0.92)
    drawn, seen = drawn[middling], seen[middling]
    colours = list(EXPERT_COLOURS)
    taken = oklab(linear([rgb(colour) for colour in colours]))
    distance = np.linalg.norm(seen[:, None] - taken, axis=-1).min(1)
    while len(colours) < size:
        best = int(distance.argmax())
        colours.append("#{:02X}{:02X}{:02X}".format(*drawn[best].tolist()))
        distance = np.minimum(distance, np.linalg.norm(seen - seen[best], axis=-1))
    return tuple(colours)
