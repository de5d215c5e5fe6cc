"""GRPO and OFSD in one picture each, to project in a class, from a run's folder.

    python -m experiments.pictures runs/NAME    # writes grpo.png and ofsd.png there

Both show what the run has logged in trajectories.jsonl. grpo.png: a group, its rewards,
their mean, the advantages, and what the update made likelier. ofsd.png: a pair with the
two prompts, and the divergence at each token of the student's text. They need
matplotlib (requirements-extra.txt).
"""

from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from grpo import group_advantages
from machinery.errors import BadInput
from machinery.json_lines import read_jsonl
from machinery.records import sums_of
from machinery.terminal import Parser, printable, run_script
from tools.pictures import load_matplotlib, new_figure, save_small

# Who does not tell red from green still tells these two. A sign says the same again.
UP = "#0072B2"  # blue
DOWN = "#D55E00"  # orange
PALE = "#767676"  # what the environment wrote

WIDTH = 12.8  # of a picture, in inches
MONO = "DejaVu Sans Mono"  # matplotlib brings it
CHARACTER = 0.602 / 72  # inches that a character is wide, by the size of its font
SMALL = 12  # sizes of fonts, in points
LARGE = 14.4  # at this size, too, a character is a whole number of pixels wide
LINE = 0.21  # inches from line to line, in small print
MARKED_LINE = 0.4  # the same in large print, where numbers stand between the lines
MARKED = 0.05  # nats; a smaller divergence gets no number
STRONGEST = 0.5  # nats; a larger one gets no stronger colour
MOST_LINES = 24  # of a text

# --------------------------------------------------------------------------- GRPO


def group_of(folder: Path) -> dict:
    """The first logged group that has two different rewards."""
    for row in read_jsonl(folder / "trajectories.jsonl"):
        if row["kind"] == "group" and len(set(row["rewards"])) > 1:
            return row
    raise BadInput(f"{folder} has logged no group with two different rewards")


def draw_grpo(group: dict, path: Path) -> None:
    """A row for each trajectory: what it did, reward, advantage, change of log pi."""
    attempts = group["trajectories"]
    rewards_of_group = torch.tensor([group["rewards"]])  # (1, G)
    advantages_of_group = group_advantages(rewards_of_group)[0].tolist()
    moves_of_group = []
    for attempt in attempts:
        before, after = sums_of(attempt["tokens"])
        moves_of_group.append(after - before)
    with new_figure(WIDTH, 7.2, spines=False) as figure:
        panels = figure.subplots(1, 4, sharey=True, width_ratios=[4.2, 2, 2.6, 2.6])
        texts, rewards, advantages, moves = panels
        golden = " / ".join(group["golden_answers"])
        title = f"{attempts[0]['question']}  (answer: {golden})"
        figure.suptitle(clipped(title, 100), fontsize=16, fontweight="bold")

        texts.set_title("1. a group is sampled", fontsize=15, loc="left")
        texts.set_axis_off()
        texts.set_xlim(0, 1)
        for place, attempt in enumerate(attempts):
            text = "\n".join(lines_of(attempt))
            texts.text(0, place, text, fontsize=13, va="center", linespacing=1.35)

        middle = mean(group["rewards"])
        rewards.set_title("2. reward", fontsize=15)
        draw_bars(rewards, group["rewards"], "g", PALE, PALE)
        rewards.axvline(middle, color="black", linestyle="--", linewidth=2)
        rewards.set_xlabel(f"dashed: mean {middle:.2g}", fontsize=13)

        advantages.set_title("3. advantage", fontsize=15)
        draw_bars(advantages, advantages_of_group, "+.3f", UP, DOWN)
        advantages.set_xlabel("(reward - mean) / deviation", fontsize=13)

        moves.set_title("4. after the update", fontsize=15)
        draw_bars(moves, moves_of_group, "+.2f", UP, DOWN)
        moves.set_xlabel("change of log π\n▲ likelier   ▼ less likely", fontsize=13)
        for place, move in enumerate(moves_of_group):
            sign = "▲" if move > 0 else "▼"
            colour = UP if move > 0 else DOWN
            at_the_edge = moves.get_yaxis_transform()  # x from 0 to 1, y a row
            moves.text(1.02, place, sign, color=colour, transform=at_the_edge)
        texts.set_ylim(len(attempts) - 0.5, -0.5)  # the first one on top
        save_small(figure, path)


def draw_bars(axes, values: list[float], form: str, up: str, down: str) -> None:
    """A bar for each value, with its number. Bars below 0 are also hatched."""
    for place, value in enumerate(values):
        colour = up if value >= 0 else down
        hatch = None if value >= 0 else "//"
        axes.barh(place, value, height=0.5, color=colour, hatch=hatch, edgecolor="w")
        side = "left" if value >= 0 else "right"
        text = f" {value:{form}} "
        axes.text(value, place, text, ha=side, va="center", fontsize=13)
    axes.axvline(0, color="black", linewidth=1)
    axes.margins(x=0.45)
    axes.set_xticks([])
    axes.tick_params(left=False, labelleft=False)
    axes.spines[["left", "bottom"]].set_visible(False)


def lines_of(attempt: dict) -> list[str]:
    """What a trajectory did: its queries, of which at most three, and its answer."""
    queries = attempt["queries"]
    lines = [f"search: {clipped(query, 38)}" for query in queries[:3]]
    if len(queries) > 3:
        lines[-1] += f"  (+ {len(queries) - 3})"
    answer = "none" if attempt["answer"] is None else clipped(attempt["answer"], 38)
    return [*lines, f"answer: {answer}"]


def clipped(text: str, columns: int) -> str:
    """The text in one line, which ends in … if it would be longer than this."""
    text = printable(" ".join(text.split()))
    if len(text) <= columns:
        return text
    return text[: columns - 1] + "…"


# --------------------------------------------------------------------------- OFSD


class Token(NamedTuple):
    """A piece of text in the picture."""

    text: str
    written: bool  # by the policy, and not by the environment
    divergence: float = 0.0  # from the teacher, in nats


class Placed(NamedTuple):
    """A token, or the part of one that stands in one line."""

    token: Token
    text: str
    line: int
    column: int


def pair_of(folder: Path) -> dict:
    """The logged pair of a right and a wrong answer with the fewest searches."""
    rows = read_jsonl(folder / "trajectories.jsonl")
    pairs = [row for row in rows if row["kind"] == "pair" and is_clear(row)]
    if not pairs:
        raise BadInput(f"{folder} has logged no pair whose student is wrong")
    return min(pairs, key=searches_of)


def is_clear(pair: dict) -> bool:
    """Whether its student is wrong, and its divergences were logged."""
    return bool(pair["divergence"]) and pair["student"]["em"] == 0


def searches_of(pair: dict) -> int:
    return len(pair["reference"]["queries"]) + len(pair["student"]["queries"])


def tokens_of_student(pair: dict) -> list[Token]:
    """The student's tokens. The environment's have no divergence."""
    tokens = []
    for text, value in pair["divergence"]:
        if value is None:
            tokens.append(Token(text, written=False))
        else:
            tokens.append(Token(text, written=True, divergence=value))
    return tokens


def tokens_of_reference(pair: dict) -> list[Token]:
    """The reference word by word, since its tokens are not in the log."""
    tokens = []
    for who, text in pair["reference"]["text"]:
        written = who == 1
        for number, line in enumerate(text.split("\n")):
            if number > 0:
                tokens.append(Token("\n", written))
            for place, word in enumerate(line.split(" ")):
                space = " " if place > 0 else ""
                tokens.append(Token(space + word, written))
    return tokens


def lay_out(tokens: list[Token], columns: int) -> list[Placed]:
    """Lines of so many columns. What is beyond MOST_LINES is left out.

    >>> tokens = [Token("a", True), Token(" bc", True), Token("d", False)]
    >>> [(part.text, part.line, part.column) for part in lay_out(tokens, 3)]
    [('a', 0, 0), ('bc', 1, 0), ('d', 1, 2)]
    """
    placed = []
    line = 0
    column = 0
    for token in tokens:
        for number, text in enumerate(token.text.split("\n")):
            shown = printable(text)
            if number > 0 or column + len(shown) > columns:
                line += 1
                column = 0
                shown = shown.lstrip(" ")
            if line == MOST_LINES:
                return [*placed, Placed(token, "…", line, 0)]
            if shown:
                placed.append(Placed(token, shown, line, column))
            column += len(shown)
    return placed


def lines_in(placed: list[Placed]) -> int:
    return 1 + max(part.line for part in placed)


def draw_ofsd(pair: dict, path: Path) -> None:
    """Above the two prompts, below the student's text with the teacher's objections."""
    question = pair["reference"]["question"]
    words = question.split(" ")
    asked = [Token(f"{word} ", True) for word in words]
    asked = lay_out(asked, columns=44)
    reference = lay_out(tokens_of_reference(pair), columns=68)
    student = lay_out(tokens_of_student(pair), columns=102)

    # From top to bottom, in inches.
    box = 0.95 + LINE * max(lines_in(asked), lines_in(reference))
    height = 0.2 + box + 1.25 + MARKED_LINE * lines_in(student) + 0.35
    with new_figure(WIDTH, height) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(height, 0)  # 0 is the top

        draw_box(axes, 0.2, 4.8, box, "The student's prompt")
        write(axes, 0.35, 0.73, "the task and its tags, and the question:")
        draw_text(axes, 0.35, 1.05, asked)
        draw_box(axes, 5.2, 7.4, box, "The teacher's prompt: the same weights, frozen")
        write(axes, 5.35, 0.73, "the same, and the reference, a right answer:")
        draw_text(axes, 5.35, 1.05, reference)

        top = 0.2 + box + 0.4
        answer = clipped(str(pair["student"]["answer"]), 30)
        right = clipped(str(pair["reference"]["answer"]), 30)
        title = "Both read the student's own text"
        write(axes, 0.25, top, title, fontsize=16, fontweight="bold")
        said = (
            f"It ends with {answer}. Right is {right}. Where does the teacher object?"
        )
        write(axes, 0.25, top + 0.3, said, fontsize=13)
        draw_text(axes, 0.25, top + 0.8, student, size=LARGE, step=MARKED_LINE)
        key = "number: the divergence from the teacher in nats, the loss at this token;"
        key += f" none below {MARKED}.   grey: passages, no loss"
        write(axes, 0.25, height - 0.25, key)
        save_small(figure, path)


def draw_box(axes, left: float, width: float, height: float, title: str) -> None:
    """A frame from the top of the picture, with a title in it."""
    bottom = height + 0.2
    across = [left, left + width, left + width, left, left]
    down = [0.2, 0.2, bottom, bottom, 0.2]
    axes.plot(across, down, color="black", linewidth=1.5)
    write(axes, left + 0.15, 0.43, title, fontsize=16, fontweight="bold")


def write(axes, left: float, top: float, text: str, **font: Any) -> None:
    """A line of text. Its middle is so many inches from the top."""
    font.setdefault("fontsize", SMALL)
    axes.text(left, top, text, va="center", **font)


def draw_text(
    axes,
    left: float,
    top: float,
    placed: list[Placed],
    size: float = SMALL,
    step: float = LINE,
) -> None:
    """Tokens in their lines. The more the teacher objects, the deeper the orange."""
    width = CHARACTER * size
    for part in placed:
        x = left + width * part.column
        y = top + step * part.line
        if part.token.divergence >= MARKED:
            spaces = len(part.text) - len(part.text.lstrip())
            begin = x + width * spaces
            end = x + width * len(part.text)
            draw_mark(axes, begin, end, y, part.token.divergence)
        colour = "black" if part.token.written else PALE
        font = {"family": MONO, "fontsize": size}
        axes.text(x, y, part.text, color=colour, va="center", **font)


def draw_mark(axes, begin: float, end: float, y: float, divergence: float) -> None:
    """Orange behind a token from begin to end, and the number above it."""
    strength = min(1.0, divergence / STRONGEST)
    ground = {"color": DOWN, "alpha": 0.2 + 0.6 * strength, "linewidth": 0}
    axes.fill_between([begin - 0.02, end + 0.02], y - 0.12, y + 0.12, **ground)
    middle = (begin + end) / 2
    number = f"{divergence:.2f}"
    font = {"fontsize": 11, "fontweight": "bold"}
    axes.text(middle, y - 0.21, number, ha="center", va="center", **font)


# --------------------------------------------------------------------------- main


def main() -> None:
    parser = Parser(description="grpo.png and ofsd.png of a run, to project.")
    parser.add_argument("run", type=Path, help="the folder of a run")
    args = parser.parse_args()
    load_matplotlib()  # if it is missing, say so at once
    draw_grpo(group_of(args.run), args.run / "grpo.png")
    print(f"{args.run / 'grpo.png'}")
    draw_ofsd(pair_of(args.run), args.run / "ofsd.png")
    print(f"{args.run / 'ofsd.png'}")


if __name__ == "__main__":
    run_script(main)
