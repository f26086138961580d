"""Places names at points so that nothing overlaps: in pixels, before anything is drawn."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy

LONGEST = 30
"""Characters of a name beside a point; the rest is cut, and shown on hover."""
MOST_LABELS = 30
"""More names than that are not readable."""
FONT_SIZE = 10
HEIGHT = 12.0
"""Pixels of a line of text at that size."""
_CHARACTER = 6.0
"""Pixels of a character at that size: more than most of them take."""
_GAP = 3.0
"""Pixels between a point and its name."""
_MARGIN = 1.0
"""Pixels between a name and anything else."""
_NEAR = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
"""Where a name stands at its point, the best first: right, left, above, below, and between them."""
_FAR = (22, 30, 40, 52, 66, 82, 100, 120, 150, 185)
"""Pixels to a name that a line leads to."""
_DIRECTIONS = 24
_PER_PIXEL = 0.2
"""What a pixel of distance costs, in places of `_NEAR`."""
_CROSSING = 6.0
"""What crossing a line of the chart costs, in places of `_NEAR`."""
_GUTTER = 14
"""Pixels between a point and a name right of it, for the line that leads there."""
_CROSSED = 2.0
"""What it costs, in the same places, that the line to a name crosses one of the chart."""
_AMBIGUOUS = 16.0
"""What it costs that a name without a line is as near to another point as to its own."""
_POOR = 24.0
"""Cost of a place that is little better than none."""
_ROUNDS = (2, 16)
"""How often all names are placed, in another order each time: for many names, and for few."""
_ENOUGH = 3
"""Rounds after which it is enough that all names are placed."""
_EFFORT = 8000
"""Rounds times the square of the names."""
_MANY = 100
"""Points among which names are placed once, as well as it goes."""

Align = Literal["left", "center", "right"]
Segment = tuple[float, float, float, float]
"""x and y of both ends, in pixels."""


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels from the upper left corner of the plot."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether both have a pixel in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        """Whether none of it is outside the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Label:
    """A name and its place."""

    text: str
    box: Box
    align: Align
    """The side of the box that the text keeps to, which is the one at its point: boxes are wider than their texts."""
    leader: Segment | None
    """A line from the point; null: the name is at its point."""

    @property
    def x(self) -> float:
        """Pixels to the side that the text keeps to."""
        return {"left": self.box.left, "right": self.box.right}.get(self.align, (self.box.left + self.box.right) / 2)

    @property
    def y(self) -> float:
        """Pixels down to the middle of the text."""
        return (self.box.top + self.box.bottom) / 2


@dataclass(frozen=True)
class PixelAxis:
    """An axis whose pixels are known before it is drawn: from `low` to `high`, without rounding to nice values."""

    low: float
    high: float
    pixels: float
    log: bool = False
    upright: bool = False
    """Whether it goes up, as pixels go down."""

    @classmethod
    def of(
        cls, values: Sequence[float], pixels: float, pad: float, *, log: bool = False, upright: bool = False
    ) -> PixelAxis:
        """An axis that shows all values.

        Args:
            values: finite ones; above zero for a logarithmic axis.
            pixels: its length.
            pad: pixels to be kept free at both of its ends.
            log: whether it is logarithmic.
            upright: whether it goes up.
        """
        on_line = [math.log(value) if log else value for value in values]
        least, most = min(on_line), max(on_line)
        if most - least < 1e-9 * max(1.0, abs(most)):  # one value stands in the middle
            around = 0.05 if log else max(abs(most) * 0.05, 1e-6)
            least, most = least - around, most + around
        more = (most - least) * pad / (pixels - 2 * pad)
        low, high = least - more, most + more
        return cls(math.exp(low) if log else low, math.exp(high) if log else high, pixels, log, upright)

    def at(self, value: float) -> float:
        """Pixels from the left, or from the top."""
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        part = (value - low) / (high - low)
        return self.pixels * (1 - part if self.upright else part)

    def value(self, at: float) -> float:
        """The value at some pixel; beyond the ends too."""
        part = 1 - at / self.pixels if self.upright else at / self.pixels
        low, high = (math.log(each) if self.log else each for each in (self.low, self.high))
        value = low + part * (high - low)
        return math.exp(value) if self.log else value


def shortened(text: str) -> str:
    """A name of at most `LONGEST` characters."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1].rstrip()}…"


def width_of(text: str) -> float:
    """Pixels that a text takes at most, for most texts."""
    return _CHARACTER * sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def place(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str | None],
    within: Box,
    *,
    radius: float,
    lines: Sequence[Segment] = (),
    to_the_right: bool = False,
) -> list[Label | None]:
    """A place for the name of each point: no two overlap, and none covers a point or a line that leads to a name.

    Args:
        points: x and y in pixels.
        texts: a name for each; null: it has none, and is only not to be covered.
        within: where names may be.
        radius: pixels of a point.
        lines: of the chart, which names cross only where they must.
        to_the_right: names stand right of their points, moved up or down; else anywhere around.

    Returns:
        For each point its label; null: it has no name, or nowhere is free.
    """
    wanted = [i for i, text in enumerate(texts) if text][:MOST_LABELS]
    # Those in a crowd first, as they have the fewest places; then those that were left out or got a poor place.
    near = {i: sum(math.dist(points[i], points[j]) < 80 for j in wanted) for i in wanted}
    urgent = dict.fromkeys(wanted, 0.0)
    best: dict[int, Label] = {}
    least = (len(wanted) + 1, 0.0)
    fewest, most = _ROUNDS
    rounds = 1 if len(points) > _MANY else max(fewest, min(most, _EFFORT // max(1, len(wanted)) ** 2))
    for number in range(rounds):
        order = sorted(wanted, key=lambda i: (-urgent[i], -near[i]))
        placed = _placed(order, points, texts, within, radius, lines, to_the_right)
        cost = (len(wanted) - len(placed), sum(own for own, _ in placed.values()))
        if cost < least:
            least, best = cost, {i: label for i, (_, label) in placed.items()}
        good = number >= _ENOUGH or all(own < _AMBIGUOUS for own, _ in placed.values())
        if least[0] == 0 and good:
            break
        for i in wanted:
            urgent[i] = 0.5 * urgent[i] + (min(1.0, placed[i][0] / _POOR) / 4 if i in placed else 1.0)
    return [best.get(i) for i in range(len(points))]


def _placed(
    order: Sequence[int],
    points: Sequence[tuple[float, float]],
    texts: Sequence[str | None],
    within: Box,
    radius: float,
    lines: Sequence[Segment],
    to_the_right: bool,
) -> dict[int, tuple[float, Label]]:
    """Labels and their costs by number of their point, placed one after another."""
    taken = _Taken(points, radius, lines)
    placed: dict[int, tuple[float, Label]] = {}
    levels = _levels(order, points) if to_the_right else {}
    for i in order:
        text, (x, y) = shortened(texts[i] or ""), points[i]
        candidates = _right_of(x, y, text, radius, levels[i]) if to_the_right else _around(x, y, text, radius)
        cost, chosen = math.inf, None
        for own, label in sorted(candidates, key=lambda each: each[0]):
            if own >= cost:
                break
            if label.box.within(within) and taken.is_free(label, i):
                whole = own + taken.drawbacks(label, i)
                if whole < cost:
                    cost, chosen = whole, label
        if chosen is not None:
            taken.add(chosen)
            placed[i] = cost, chosen
    return placed


def _levels(wanted: Sequence[int], points: Sequence[tuple[float, float]]) -> dict[int, float]:
    """The level of each name right of its point: those at the ends of curves of one length are spread."""
    columns: dict[int, list[int]] = {}
    for i in wanted:
        columns.setdefault(round(points[i][0]), []).append(i)
    return {
        i: level
        for column in columns.values()
        for i, level in zip(column, spread([points[i][1] for i in column], HEIGHT + 2 * _MARGIN), strict=True)
    }


def _around(x: float, y: float, text: str, radius: float) -> Iterator[tuple[float, Label]]:
    """Places around a point, and what each costs."""
    for rank, (right, down) in enumerate(_NEAR):
        # At a corner the name is as near as at a side.
        away = (radius + _GAP) * (1.0 if 0 in (right, down) else 0.85)
        yield float(rank), Label(text, *_anchored(x + right * away, y + down * away, right, down, text), None)
    for distance in _FAR:
        for number in range(_DIRECTIONS):
            angle = 2 * math.pi * number / _DIRECTIONS
            cos, sin = math.cos(angle), math.sin(angle)
            end = (x + distance * cos, y + distance * sin)
            right, down = (0 if abs(part) < 0.35 else round(math.copysign(1, part)) for part in (cos, sin))
            leader = (x + radius * cos, y + radius * sin, *end)
            box = _anchored(end[0] + 2 * right, end[1], right, 0 if right else down, text)
            yield len(_NEAR) + _PER_PIXEL * distance, Label(text, *box, leader)


def _right_of(x: float, y: float, text: str, radius: float, level: float) -> Iterator[tuple[float, Label]]:
    """Places right of a point, at some level or higher or lower, and what each costs."""
    start, left = x + radius + 1, x + radius + _GUTTER
    for number in range(41):
        for sign in (1, -1) if number else (1,):
            middle = level + sign * number * HEIGHT / 2
            leader = (start, y, left - 2, middle)
            yield number * 2.0, Label(text, *_anchored(left, middle, 1, 0, text), leader)


def spread(levels: Sequence[float], apart: float) -> list[float]:
    """Levels in the same order that are at least so far apart, and as near to those given as that allows."""
    order = sorted(range(len(levels)), key=lambda i: levels[i])
    blocks: list[list[int]] = []
    for i in order:
        blocks.append([i])
        while len(blocks) > 1 and _top(levels, blocks[-1], apart) < (
            _top(levels, blocks[-2], apart) + len(blocks[-2]) * apart
        ):
            last = blocks.pop()
            blocks[-1] += last
    return [
        _top(levels, block, apart) + block.index(i) * apart
        for i in range(len(levels))
        for block in blocks
        if i in block
    ]


def _top(levels: Sequence[float], block: Sequence[int], apart: float) -> float:
    """The level of the first of a block whose members stand close together."""
    return sum(levels[i] - number * apart for number, i in enumerate(block)) / len(block)


def _anchored(x: float, y: float, right: int, down: int, text: str) -> tuple[Box, Align]:
    """The box of a text that touches (x, y), and extends from there to the right and down, or centred on it (0)."""
    width = width_of(text)
    left = x - width * (1 - right) / 2
    top = y - HEIGHT * (1 - down) / 2
    align: Align = "left" if right > 0 else "right" if right < 0 else "center"
    return Box(left, top, left + width, top + HEIGHT), align


class _Taken:
    """What names may not cover, and what they should not."""

    def __init__(self, points: Sequence[tuple[float, float]], radius: float, lines: Sequence[Segment]) -> None:
        at = numpy.array(points, float).reshape(-1, 2)
        self._points = numpy.hstack([at - radius, at + radius])
        self._names = numpy.empty((0, 4))
        self._leaders = numpy.empty((0, 4))
        self._lines = numpy.array(lines, float).reshape(-1, 4)

    def is_free(self, label: Label, point: int) -> bool:
        """Whether neither the name nor the line to it meets anything but its own point."""
        box = _as_row(label.box, _MARGIN)
        if _overlapping(self._points, box).any() or _overlapping(self._names, box).any():
            return False
        if _crossing(self._leaders, box).any():
            return False
        if label.leader is None:
            return True
        leader = numpy.array([label.leader])
        # Points that overlap its own cannot be gone around.
        others = self._points[~_overlapping(self._points, self._points[point])]
        around = others[_overlapping(others, _around_segment(leader))]
        if _crossing(leader, around.T).any() or _crossing(leader, self._names.T).any():
            return False
        return not _meeting(self._leaders, label.leader).any()

    def drawbacks(self, label: Label, point: int) -> float:
        """What a free place costs: lines of the chart that the name covers a piece of, or that the line to it crosses,
        and other points that the name seems to be of, or that the line to it cannot but cross.
        """
        cost = _CROSSING * int(_crossing(self._lines, _as_row(label.box, 0.0)).sum())
        others = numpy.delete(self._points, point, axis=0)
        if label.leader is None:
            own = _distances(self._points[[point]], label.box)
            return cost + _AMBIGUOUS * bool((_distances(others, label.box) <= own + _MARGIN).any())
        near = others[_overlapping(others, self._points[point])]
        crossed = int(_crossing(numpy.array([label.leader]), near.T).sum())
        return cost + _CROSSING * crossed + _CROSSED * int(_meeting(self._lines, label.leader).sum())

    def add(self, label: Label) -> None:
        """Take the place of a name."""
        self._names = numpy.vstack([self._names, _as_row(label.box, _MARGIN)])
        if label.leader is not None:
            self._leaders = numpy.vstack([self._leaders, label.leader])


def _as_row(box: Box, margin: float) -> Any:
    return numpy.array([box.left - margin, box.top - margin, box.right + margin, box.bottom + margin])


def _around_segment(segment: Any) -> Any:
    (x, y, x2, y2) = segment[0]
    return numpy.array([min(x, x2) - 1e-6, min(y, y2) - 1e-6, max(x, x2) + 1e-6, max(y, y2) + 1e-6])


def _overlapping(boxes: Any, box: Any) -> Any:
    """Which boxes overlap one."""
    return (boxes[:, 0] < box[2]) & (box[0] < boxes[:, 2]) & (boxes[:, 1] < box[3]) & (box[1] < boxes[:, 3])


def _crossing(segments: Any, box: Any) -> Any:
    """Which segments have a point in a box, or in which boxes (as columns) one segment has one: the corners of a box
    are on both sides of the line, and their extents overlap.
    """
    x, y, x2, y2 = segments.T
    extents = numpy.stack(
        [numpy.minimum(x, x2), numpy.minimum(y, y2), numpy.maximum(x, x2), numpy.maximum(y, y2)], axis=1
    )
    sides = [
        numpy.sign((x2 - x) * (corner_y - y) - (y2 - y) * (corner_x - x))
        for corner_x, corner_y in ((box[0], box[1]), (box[2], box[1]), (box[0], box[3]), (box[2], box[3]))
    ]
    on_both_sides = numpy.abs(numpy.sum(sides, axis=0)) < 4
    meets = (extents[:, 0] <= box[2]) & (box[0] <= extents[:, 2])
    return meets & (extents[:, 1] <= box[3]) & (box[1] <= extents[:, 3]) & on_both_sides


def _meeting(segments: Any, segment: Segment) -> Any:
    """Which segments cross one."""
    x, y, x2, y2 = segments.T
    a, b, a2, b2 = segment
    own = ((a2 - a) * (y - b) - (b2 - b) * (x - a)) * ((a2 - a) * (y2 - b) - (b2 - b) * (x2 - a)) < 0
    return own & (((x2 - x) * (b - y) - (y2 - y) * (a - x)) * ((x2 - x) * (b2 - y) - (y2 - y) * (a2 - x)) < 0)


def _distances(boxes: Any, box: Box) -> Any:
    """Pixels between each box and one."""
    across = numpy.maximum(0.0, numpy.maximum(boxes[:, 0] - box.right, box.left - boxes[:, 2]))
    down = numpy.maximum(0.0, numpy.maximum(boxes[:, 1] - box.bottom, box.top - boxes[:, 3]))
    return numpy.hypot(across, down)
