"""Pieces of a page about trajectories: text, tokens with marks, numbers.

Everything that others wrote is escaped here.
"""

from html import escape
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from machinery.terminal import printable

LEVELS = (0.2, 0.5, 1.0)  # where the next deeper colour begins


def shown(text: object) -> str:
    """Text of others for a page: markup as text, and what would turn or hide text as an
    escape."""
    return escape(printable(str(text)))


# ---------------------------------------------------------------- marks and legends


def level_of(size: float) -> int:
    """How deep a colour is: 1 to 4."""
    return 1 + sum(size >= bound for bound in LEVELS)


def marked(text: str, kind: str, size: float, number: str) -> str:
    """A token with a colour and a number. The space around it stays outside."""
    name = f"{kind} m{level_of(size)}".strip()
    body = text.strip()
    if not body:
        mark = f'<mark class="{name}">{visible(text)}<sup>{number}</sup></mark>'
        return f"{mark}{shown(text)}"
    before, after = text.split(body, 1)
    mark = f'<mark class="{name}">{shown(body)}<sup>{number}</sup></mark>'
    return f"{shown(before)}{mark}{shown(after)}"


def visible(text: str) -> str:
    """A token by itself. White space gets a sign."""
    if text.strip():
        return shown(text.strip())
    return "↵" if "\n" in text else "␣"


def level_key(
    title: str, kinds: list[tuple[str, str, str]], smallest: float, note: str
) -> str:
    """A legend. kinds: the class of a mark, its sign, what it means."""
    bounds = [smallest, *LEVELS]
    parts = []
    for kind, sign, meaning in kinds:
        if meaning:
            parts.append(f"{meaning} ")
        for number, bound in enumerate(bounds):
            upper = f"{bounds[number + 1]:g}" if number < len(LEVELS) else "more"
            name = f"{kind} m{number + 1}".strip()
            parts.append(f'<mark class="{name}">{sign}{bound:g} to {upper}</mark>')
    return (
        f'<p class="key">{title} {" ".join(parts)} Not marked: below {smallest:g}. '
        f"{note}</p>"
    )


# ---------------------------------------------------------------- one trajectory


def whole_attempt(trajectory: dict) -> str:
    """A logged trajectory: what became of it, and its text."""
    return verdict(trajectory) + transcript(trajectory["text"])


def verdict(trajectory: dict) -> str:
    """Whether its answer is right, the answer, and how it came to it."""
    state = "wrong"
    sign = "✗"
    if trajectory["em"]:
        state = "right"
        sign = "✓"
    answer = "no answer"
    if trajectory["answer"] is not None:
        answer = shown(trajectory["answer"])
    searches = len(trajectory["queries"])
    end = shown(trajectory["finish_reason"])
    details = f"<small>(searches: {searches}, ended by {end})</small>"
    return f'<p><span class="{state}">{sign} {state}: {answer}</span> {details}</p>'


def transcript(runs_of_text: list) -> str:
    """The policy's text open, the environment's folded under its first title."""
    parts = []
    for sampled, text in runs_of_text:
        if sampled:
            parts.append(f'<pre class="policy">{shown(text.strip())}</pre>')
        else:
            parts.append(passages(text))
    return "".join(parts)


def passages(text: str) -> str:
    """What the environment wrote, folded under its first title."""
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    title = "nothing was found"
    if lines:
        count = "1 passage" if len(lines) == 1 else f"{len(lines)} passages"
        title = f"{count}: {lines[0].removeprefix('- ')}"
    return (
        f'<details class="passages"><summary>{shown(title)}</summary>'
        f'<pre class="environment">{shown(text.strip())}</pre></details>'
    )


class Piece(NamedTuple):
    """A token for the page."""

    text: str
    by_policy: bool
    html: str = ""  # of the policy's, with a mark where it has one


def marked_transcript(pieces: list[Piece]) -> str:
    """A transcript in which single tokens are marked."""
    parts = []
    for by_policy, neighbours in groupby(pieces, key=attrgetter("by_policy")):
        if by_policy:
            text = "".join(piece.html for piece in neighbours)
            parts.append(f'<pre class="policy">{text.strip()}</pre>')
        else:
            parts.append(passages("".join(piece.text for piece in neighbours)))
    return "".join(parts)


# ---------------------------------------------------------------- numbers


def decimals(number: float | None, count: int) -> str:
    """A number, or nothing where it was not finite, which JSON does not know."""
    return "" if number is None else f"{number:.{count}f}"


def reward_text(reward: float) -> str:
    """
    >>> reward_text(1.0), reward_text(-0.1), reward_text(-0.0)
    ('1', '-0.1', '0')
    """
    return f"{reward + 0.0:.4g}"  # -0.0 + 0.0 is 0.0


def signed(value: float) -> str:
    """With its sign. A small number shows a digit of its own, and is never "+0.00".

    >>> signed(1.7889), signed(-0.4472), signed(-0.0004), signed(0.0)
    ('+1.79', '-0.45', '-0.0004', '0')
    """
    if value == 0:
        return "0"
    if abs(value) < 0.005:
        return f"{value:+.1g}"
    return f"{value:+.2f}"
