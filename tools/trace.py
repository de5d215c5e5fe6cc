"""A run as one page, which opens from disk: no script, nothing from elsewhere.

    python -m tools.trace runs/NAME    # writes runs/NAME/trace.html

Questions side by side, before and after; who wrote what; and for the mined pairs the
divergence at each of the student's tokens: where the teacher would have said something
else.
"""

from html import escape
from pathlib import Path

from grpo import group_advantages
from machinery.errors import BadInput
from machinery.json_lines import read_jsonl
from machinery.terminal import Parser, printable, run_script

MOST_QUESTIONS = 30  # test questions on the page

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 80em; margin: 2em auto;
  padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse }
td, th { padding: .15em .8em; text-align: right }
td:first-child { text-align: left }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
.two > div { min-width: 0; border: 1px solid #ccc; padding: .5em .8em;
  overflow-wrap: anywhere }
pre { white-space: pre-wrap; margin: .2em 0; font: 13px/1.5 ui-monospace, monospace }
.policy { background: #e8f3e8 }
.environment { background: #eef0f4; color: #445 }
.right { color: #17702a }
.wrong { color: #b3261e }
h3 { margin: 1.6em 0 .3em }
summary { cursor: pointer; color: #445; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis }
.key span { padding: 0 .4em; margin-right: .6em }
"""
KEY = (
    '<p class="key"><span class="policy">the policy wrote it</span>'
    '<span class="environment">the environment wrote it</span></p>'
)


# ---------------------------------------------------------------- the whole page


def page(folder: Path) -> str:
    """The page of the run in this folder, as HTML."""
    metrics = list(read_jsonl(folder / "metrics.jsonl"))
    logged = list(read_jsonl(folder / "trajectories.jsonl"))
    evaluations = [row for row in metrics if row["kind"] == "eval"]
    if len(evaluations) < 2:
        raise BadInput(f"{folder} has no two evaluations to compare: let it run on")
    first = evaluations[0]["stage"]
    last = evaluations[-1]["stage"]
    parts = [
        f"<h1>{shown(str(folder))}</h1>",
        evaluation_table(evaluations),
        KEY,
        *test_section(logged, first, last),
        *pair_sections(logged),
    ]
    head = '<meta charset="utf-8">'
    head += f"<title>{shown(folder.name)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">{head}\n{body}\n</html>\n'


def evaluation_table(evaluations: list[dict]) -> str:
    """A line for each test of the run."""
    names = ["stage", "EM", "F1", "searches", "answered", "teacher's edge"]
    rows = [table_row("th", names)]
    for row in evaluations:
        cells = [shown(row["stage"])]
        numbers = [row[name] for name in ("em", "f1", "searches", "answered")]
        cells += [f"{number:.3f}" for number in numbers]
        edge = row.get("edge")
        cells.append("" if edge is None else f"{edge:+.3f}")
        rows.append(table_row("td", cells))
    return f"<table>{''.join(rows)}</table>"


def table_row(tag: str, cells: list[str]) -> str:
    body = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
    return f"<tr>{body}</tr>"


def test_section(logged: list[dict], first: str, last: str) -> list[str]:
    """Test questions at the stages first and last. Those that changed come first, then
    those with the most searches."""
    before = [row for row in logged if row["kind"] == "eval" and row["stage"] == first]
    after = [row for row in logged if row["kind"] == "eval" and row["stage"] == last]
    # All tests ask the same questions in the same order. Ids say less: two questions
    # may have the same one. While a run still logs its last test, a part is missing.
    attempts = list(zip(before, after, strict=False))

    def interest(both: tuple[dict, dict]) -> tuple[float, int]:
        earlier, later = both
        return abs(later["em"] - earlier["em"]), len(later["queries"])

    chosen = sorted(attempts, key=interest, reverse=True)[:MOST_QUESTIONS]
    parts = [
        f"<h2>{len(chosen)} of {len(attempts)} test questions, "
        f"at {shown(first)} and at {shown(last)}</h2>"
    ]
    for earlier, later in chosen:
        answers = " / ".join(later["golden_answers"])
        parts.append(f"<h3>{shown(later['question'])}</h3>")
        parts.append(f"<p>answer: {shown(answers)}</p>")
        parts.append(side_by_side(attempt(earlier), attempt(later)))
    return parts


def pair_sections(logged: list[dict]) -> list[str]:
    """For each OFSD stage the pairs of which the divergences were logged."""
    by_stage = {}
    for row in logged:
        if row["kind"] == "pair":
            by_stage.setdefault(row["stage"], []).append(row)

    parts = []
    for stage, pairs in by_stage.items():
        parts.append(
            f"<h2>{shown(stage)}: pairs. The teacher has read the left one: "
            "where would it say something else on the right?</h2>"
        )
        for pair in pairs:
            if pair["divergence"]:
                parts += pair_parts(pair)
    return parts


def pair_parts(pair: dict) -> list[str]:
    """A mined pair: the rewards of its group, the reference, the student's tokens."""
    reference = pair["reference"]
    student = pair["student"]
    rewards = " ".join(reward_text(reward) for reward in pair["rewards"])
    left = [
        "<b>reference</b>",
        advantage_line(reference["reward"], pair["rewards"]),
        attempt(reference),
    ]
    right = [
        "<b>student</b>",
        advantage_line(student["reward"], pair["rewards"]),
        verdict(student),
        divergence_map(pair["divergence"]),
    ]
    return [
        f"<h3>{shown(reference['question'])}</h3>",
        f"<p>rewards of the group: {rewards}</p>",
        side_by_side("".join(left), "".join(right)),
    ]


def side_by_side(left: str, right: str) -> str:
    return f'<div class="two"><div>{left}</div>\n<div>{right}</div></div>'


# ---------------------------------------------------------------- one trajectory


def shown(text: str) -> str:
    """Text of others for the page: markup as text, and what would turn or hide text as
    an escape."""
    return escape(printable(text))


def attempt(trajectory: dict) -> str:
    """A logged trajectory: what became of it, and its text."""
    return verdict(trajectory) + transcript(trajectory["text"])


def verdict(trajectory: dict) -> str:
    """Whether its answer is right, the answer, and how it came to it."""
    state = "right" if trajectory["em"] else "wrong"
    answer = shown(str(trajectory["answer"]))
    searches = len(trajectory["queries"])
    end = shown(trajectory["finish_reason"])
    details = f"<small>(searches: {searches}, ended by {end})</small>"
    return f'<p class="{state}">{state}: {answer} {details}</p>'


def transcript(runs_of_text: list) -> str:
    """The policy's text open, the environment's folded under its first title."""
    parts = []
    for sampled, text in runs_of_text:
        if sampled:
            parts.append(f'<pre class="policy">{shown(text.strip())}</pre>')
            continue
        lines = [line for line in text.splitlines() if line.startswith("- ")]
        summary = "nothing was found"
        if lines:
            summary = f"{len(lines)} passages: {lines[0].removeprefix('- ')}"
        parts.append(f"<details><summary>{shown(summary)}</summary>")
        parts.append(f'<pre class="environment">{shown(text.strip())}</pre></details>')
    return "".join(parts)


def divergence_map(tokens: list) -> str:
    """The student's tokens, the redder the more the teacher disagrees; the number is in
    the tooltip."""
    parts = []
    for text, divergence in tokens:
        if divergence is None:  # the environment wrote it
            parts.append(f'<span class="environment">{shown(text)}</span>')
            continue
        # Rounding may leave a divergence of 0 a little below it.
        divergence = max(divergence, 0.0)
        opacity = min(divergence, 1.0) ** 0.5
        colour = f"rgba(214, 40, 30, {opacity:.2f})"
        parts.append(
            f'<span style="background: {colour}" title="{divergence:.3f} nats">'
            f"{shown(text)}</span>"
        )
    return f"<pre>{''.join(parts)}</pre>"


# ---------------------------------------------------------------- rewards


def advantage_line(reward: float, group_rewards: list[float]) -> str:
    """The reward of a trajectory, and the advantage that GRPO would give it.

    A reward that depends on the rest of its group cannot be found among those of the
    group, since a pair is rewarded by itself for the log: then without the advantage.
    """
    line = f"reward {reward_text(reward)}"
    if reward in group_rewards:
        # Equal rewards of a group have equal advantages, so the first of them will do.
        number = group_rewards.index(reward)
        advantage = group_advantages([group_rewards])[0, number].item()
        line += f", advantage {signed(advantage)}"
    return f"<p>{line}</p>"


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


def main() -> None:
    parser = Parser(description="Write a run as one page, trace.html in its folder.")
    parser.add_argument("folder", type=Path, help="the folder of a run, runs/NAME")
    folder = parser.parse_args().folder
    target = folder / "trace.html"
    target.write_text(page(folder), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    run_script(main)
