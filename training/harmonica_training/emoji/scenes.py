"""What a picture shows: one to three emoji in an arrangement, on a background, and the prompt that says so."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from harmonica_training.emoji.names import COLOURS, EMOJI, with_article

SIDE = 64  # of a picture, pixels

Point = tuple[float, float]  # x to the right and y downwards, pixels


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Where the emoji of a scene are.

    Attributes:
        text: the prompt without its background; `{0}`, `{1}` and `{2}` are the emoji with their articles.
        anchors: the centre of each emoji, before it is shifted at random.
        smallest, largest: sizes to draw from, pixels.
        shift: how far each emoji may be from its anchor along x and y, pixels.
    """

    text: str
    anchors: tuple[Point, ...]
    smallest: int
    largest: int
    shift: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture to draw.

    Attributes:
        arrangement: its number in `ARRANGEMENTS`.
        emoji: the number of each emoji in `names.EMOJI`, all different, in the order of the anchors.
        background: the number of the background in `names.COLOURS`.
    """

    arrangement: int
    emoji: tuple[int, ...]
    background: int

    @property
    def prompt(self) -> str:
        """The prompt, in lower case: `a red heart left of an octopus on blue`."""
        things = ARRANGEMENTS[self.arrangement].text.format(*(with_article(EMOJI[index]) for index in self.emoji))
        return f"{things} on {COLOURS[self.background]}"

    def is_valid(self) -> bool:
        """Whether all numbers are those of something, and there are as many emoji as the arrangement has."""
        if self.arrangement not in range(len(ARRANGEMENTS)) or self.background not in range(len(COLOURS)):
            return False
        known = set(self.emoji) <= set(range(len(EMOJI)))
        return known and len(self.emoji) == len(set(self.emoji)) == len(ARRANGEMENTS[self.arrangement].anchors)


def _all_arrangements() -> tuple[Arrangement, ...]:
    near, middle, far = 14.0, 32.0, 50.0
    rows, columns = {"top": near, "": middle, "bottom": far}, {"left": near, "": middle, "right": far}
    placed = [
        Arrangement(f"{{0}} at the {f'{row} {column}'.strip() or 'centre'}", ((x, y),), 20, 26, 3.0)
        for row, y in rows.items()
        for column, x in columns.items()
    ]
    left, right, above, below = (17.0, middle), (47.0, middle), (middle, 17.0), (middle, 47.0)
    pairs = [
        Arrangement("{0} left of {1}", (left, right), 24, 28, 3.0),
        Arrangement("{0} right of {1}", (right, left), 24, 28, 3.0),
        Arrangement("{0} above {1}", (above, below), 24, 28, 3.0),
        Arrangement("{0} below {1}", (below, above), 24, 28, 3.0),
    ]
    low, high = 16.0, 48.0
    threes = [
        Arrangement("{0} left of {1} and {2} above", ((low, high), (high, high), (middle, low)), 22, 26, 2.0),
        Arrangement("{0} left of {1} and {2} below", ((low, low), (high, low), (middle, high)), 22, 26, 2.0),
        Arrangement("{0} above {1} and {2} to the left", ((high, low), (high, high), (low, middle)), 22, 26, 2.0),
        Arrangement("{0} above {1} and {2} to the right", ((low, low), (low, high), (high, middle)), 22, 26, 2.0),
    ]
    return (Arrangement("{0}", ((middle, middle),), 34, 44, 5.0), *placed, *pairs, *threes)


ARRANGEMENTS = _all_arrangements()
SIZES = range(min(a.smallest for a in ARRANGEMENTS), max(a.largest for a in ARRANGEMENTS) + 1)
LARGEST_NUMBER = max(len(a.anchors) for a in ARRANGEMENTS)
# how often a scene has one emoji in the middle, one elsewhere, two, three
SHARES = (0.1, 0.2, 0.4, 0.3)
_GROUPS = ((0,), tuple(range(1, 10)), tuple(range(10, 14)), tuple(range(14, 18)))


def draw_scene(visible: NDArray[np.bool_], rng: np.random.Generator) -> Scene:
    """A scene of the emoji and backgrounds of `visible` [emoji, background], each emoji standing out."""
    group = _GROUPS[rng.choice(len(_GROUPS), p=SHARES)]
    arrangement = int(rng.choice(group))
    count = len(ARRANGEMENTS[arrangement].anchors)
    background = int(rng.choice(np.flatnonzero(visible.sum(axis=0) >= count)))
    emoji = rng.choice(np.flatnonzero(visible[:, background]), size=count, replace=False)
    return Scene(arrangement, tuple(int(index) for index in emoji), background)


def every_word() -> list[str]:
    """All words that a prompt may have, each once, in alphabetical order."""
    words = {word for name in EMOJI for word in with_article(name).split()} | {*COLOURS, "on"}
    for arrangement in ARRANGEMENTS:
        words |= set(arrangement.text.format("", "", "").split())
    return sorted(words)
