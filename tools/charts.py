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
MOST_LABELS = 6  # on the x axis; of more points every second or third has one


class Scale(NamedTuple):
    """Where numbers stand in the picture."""

    count: int  # of points
    low: float
    high: float

    def x(self, number: float) -> float:
        """Of the point with this number, from 0 on."""
        return LEFT + 22 + (RIGHT - LEFT - 44) * number / max(self.count - 1, 1)

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)


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
        said.append(f"{stage} {value:{form}}")
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        if number % every == 0 or number == len(values) - 1:
            parts.append(words_at(x, y - 10, f"{value:{form}}", "strong"))
            parts.append(words_at(x, BOTTOM + 22, stage))
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
        middle = scale.x(begin + (len(values) - 1) / 2)
        parts.append(words_at(middle, BOTTOM + 22, stage))
        if points:
            parts.append(line_of(scale, points))
            said.append(f"{stage} from {points[0][1]:.2f} to {points[-1][1]:.2f}")
        if begin > 0:
            x = scale.x(begin - 0.5)
            parts.append(
                f'<line class="faint" x1="{x:.1f}" x2="{x:.1f}"'
                f' y1="{TOP}" y2="{BOTTOM}"/>'
            )
        begin += len(values)
    return picture(title, said, parts)


def line_of(scale: Scale, points: list[tuple[int, float]]) -> str:
    """A line through points: (number, value)."""
    places = []
    for number, value in points:
        places.append(f"{scale.x(number):.1f},{scale.y(value):.1f}")
    return f'<polyline class="curve" points="{" ".join(places)}"/>'


def words_at(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{shown(text)}</text>'


def picture(title: str, said: list[str], parts: list[str]) -> str:
    """The parts over an axis. said: what a screen reader reads."""
    label = shown(f"{title}: {', '.join(said)}")
    axis = f'<line class="faint" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>'
    heading = words_at(LEFT, 16, title, "left strong")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{heading}{axis}{''.join(parts)}</svg>"
    )
