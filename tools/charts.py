"""Curves as inline SVG: they need no script, and take their colours from the page."""

import math
from typing import NamedTuple

from tools.marks import shown

WIDTH = 360  # of a picture, in its own units: at this width its text is 12 px high
HEIGHT = 190
LEFT = 14
RIGHT = 346
TOP = 44
BOTTOM = 158
MARGIN = 22  # between the frame and the first point
NAMES = BOTTOM + 22  # where the names of stages stand
MOST_LABELS = 6  # on the x axis; of more points some, at equal distances, and the last


class Scale(NamedTuple):
    """Where numbers stand in the picture."""

    count: int  # of points
    low: float
    high: float

    def x(self, number: float) -> float:
        """Of the point with this number, from 0 on."""
        intervals = max(self.count - 1, 1)
        width = RIGHT - LEFT - 2 * MARGIN
        share = number / intervals
        return round(LEFT + MARGIN + width * share, 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        height = BOTTOM - TOP
        return round(BOTTOM - height * share, 1)


def scale_of(values: list[float], count: int, highest: float = 1.0) -> Scale:
    """From 0 to the highest, or wider if the values are."""
    low = min([0.0, *values])
    high = max([highest, *values])
    return Scale(count, low, high)


def stage_chart(title: str, stages: list[str], values: list[float], form: str) -> str:
    """A point for each stage, with its number over it and its name below."""
    scale = scale_of(values, len(values), highest=0.1)
    every = math.ceil(len(values) / MOST_LABELS)
    parts = [line_of(scale, list(enumerate(values)))]
    said = []
    for number, (stage, value) in enumerate(zip(stages, values, strict=True)):
        x = scale.x(number)
        y = scale.y(value)
        text = f"{value:{form}}"
        said.append(f"{stage} {text}")
        parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="4"/>')
        if (len(values) - 1 - number) % every == 0:
            parts.append(words_at(x, y - 10, text, "strong"))
            parts.append(words_at(x, NAMES, stage))
    return picture(title, said, parts)


def step_chart(title: str, stages: dict[str, list[float | None]]) -> str:
    """A line for each stage, over the numbers of its steps one after another."""
    everything = []
    for values in stages.values():
        everything += values
    finite = [value for value in everything if value is not None]
    scale = scale_of(finite, len(everything))
    parts = [words_at(LEFT, TOP - 6, f"{scale.high:.4g}", "left")]
    parts.append(words_at(LEFT, BOTTOM - 4, f"{scale.low:.4g}", "left"))
    said = []
    begin = 0
    for stage, values in stages.items():
        points = []
        for number, value in enumerate(values, start=begin):
            if value is not None:
                points.append((number, value))
        last_step = len(values) - 1
        middle = scale.x(begin + last_step / 2)
        parts.append(words_at(middle, NAMES, stage))
        if points:
            parts.append(line_of(scale, points))
            first = points[0][1]
            last = points[-1][1]
            said.append(f"{stage} from {first:.2f} to {last:.2f}")
        if begin > 0:
            x = scale.x(begin - 0.5)
            parts.append(faint_line(x, TOP, x, BOTTOM))
        begin += len(values)
    return picture(title, said, parts)


def line_of(scale: Scale, points: list) -> str:
    """A line through points: (number, value)."""
    places = []
    for number, value in points:
        x = scale.x(number)
        y = scale.y(value)
        places.append(f"{x},{y}")
    joined = " ".join(places)
    return f'<polyline class="curve" points="{joined}"/>'


def faint_line(x1: float, y1: float, x2: float, y2: float) -> str:
    ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line class="faint" {ends}/>'


def words_at(x: float, y: float, text: str, kind: str = "") -> str:
    place = f'x="{x}" y="{y}"'
    content = shown(text)
    return f'<text class="{kind}" {place}>{content}</text>'


def picture(title: str, said: list[str], parts: list[str]) -> str:
    """The parts over an axis. said: what a screen reader reads."""
    numbers = ", ".join(said)
    label = shown(f"{title}: {numbers}")
    axis = faint_line(LEFT, BOTTOM, RIGHT, BOTTOM)
    heading = words_at(LEFT, 16, title, "left strong")
    content = "".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{heading}{axis}{content}</svg>"
    )
