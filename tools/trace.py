"""A run as one page, which opens from disk: no script, nothing from elsewhere.

    python tools/trace.py runs/NAME    # writes runs/NAME/trace.html

Questions side by side, before and after; who wrote what; and for the mined pairs the divergence
at each of the student's tokens: where the teacher would have said something else.
"""

import sys
from html import escape
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo import group_advantages  # noqa: E402
from retriever import BadInput, printable, read_jsonl, run_script  # noqa: E402

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse }
td, th { padding: .15em .8em; text-align: right }
td:first-child { text-align: left }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
.two > div { min-width: 0; border: 1px solid #ccc; padding: .5em .8em; overflow-wrap: anywhere }
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


def shown(text: str) -> str:
    """Escaped for the page: markup as text, and what would turn or hide text as an escape."""
    return escape(printable(text))


def spans(text: list) -> str:
    """A trajectory: the policy's words open, what the environment wrote folded under its first
    title."""
    parts = []
    for sampled, words in text:
        if sampled:
            parts.append(f'<pre class="policy">{shown(words.strip())}</pre>')
        else:
            lines = [line for line in words.splitlines() if line.startswith("- ")]
            head = f"{len(lines)} passages: {lines[0][2:]}" if lines else "nothing was found"
            body = f'<pre class="environment">{shown(words.strip())}</pre>'
            parts.append(f"<details><summary>{shown(head)}</summary>{body}</details>")
    return "".join(parts)


def verdict(row: dict, em: float) -> str:
    state = "right" if em else "wrong"
    how = f"({len(row['queries'])} searches, ended by {shown(row['finish_reason'])})"
    said = shown(str(row["answer"]))
    return f'<p class="{state}">{state}: {said} <small>{how}</small></p>'


def heat(tokens: list) -> str:
    """The student's tokens, the redder the more the teacher disagrees; the number is in the
    tooltip."""
    parts = []
    for text, kl in tokens:
        if kl is None:
            parts.append(f'<span class="environment">{shown(text)}</span>')
        else:
            colour = f"rgba(214, 40, 30, {min(kl, 1.0) ** 0.5:.2f})"
            style = f'style="background: {colour}" title="{kl:.3f} nats"'
            parts.append(f"<span {style}>{shown(text)}</span>")
    return f"<pre>{''.join(parts)}</pre>"


def table(evaluations: list[dict]) -> str:
    names = "stage", "EM", "F1", "searches", "answered", "teacher's edge"
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for row in evaluations:
        edge = f"{row['edge']:+.3f}" if row.get("edge") is not None else ""
        numbers = [f"{row[name]:.3f}" for name in ("em", "f1", "searches", "answered")]
        cells = [shown(row["stage"]), *numbers, edge]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def pair_of(row: dict) -> list[str]:
    """A mined pair: the group's advantages, the reference, and the student with its divergences."""
    rewards = row["rewards"]
    advantages = group_advantages(torch.tensor([rewards]))[0].tolist()
    good, bad = (dict(zip(rewards, advantages)).get(reward, 0.0) for reward in (1.0, 0.0))
    group = " ".join(f"{reward:.0f}" for reward in rewards)
    reference = verdict(row["reference"], 1.0) + spans(row["reference"]["text"])
    student = verdict(row["student"], 0.0 if 0.0 in rewards else 1.0) + heat(row["divergence"])
    return [
        f"<h3>{shown(row['reference']['question'])}</h3>",
        f"<p>rewards of the group {group}; advantage of a right one {good:+.2f}, "
        f"of a wrong one {bad:+.2f}</p>",
        f'<div class="two"><div><b>reference</b>{reference}</div>',
        f"<div><b>student</b>{student}</div></div>",
    ]


def page(folder: Path, most: int = 30) -> str:
    metrics = list(read_jsonl(folder / "metrics.jsonl"))
    rows = list(read_jsonl(folder / "trajectories.jsonl"))
    evaluations = [row for row in metrics if row["kind"] == "eval"]
    if len(evaluations) < 2:
        raise BadInput(f"{folder} has no two evaluations to compare: let it run on")
    first, last = evaluations[0]["stage"], evaluations[-1]["stage"]
    told = [row for row in rows if row["kind"] == "eval"]
    before = {row["id"]: row for row in told if row["stage"] == first}
    after = {row["id"]: row for row in told if row["stage"] == last}
    # Those that changed come first, then the longest.
    changed = lambda i: (-abs(after[i]["em"] - before[i]["em"]), -len(after[i]["queries"]))
    chosen = sorted(after, key=changed)[:most]
    of = f"{len(chosen)} of {len(after)} test questions"
    parts = [f"<h1>{shown(str(folder))}</h1>", table(evaluations), KEY]
    parts.append(f"<h2>{of}, at {shown(first)} and at {shown(last)}</h2>")
    for i in chosen:
        answers = shown(" / ".join(after[i]["golden_answers"]))
        parts.append(f"<h3>{shown(after[i]['question'])}</h3><p>answer: {answers}</p>")
        columns = (verdict(row[i], row[i]["em"]) + spans(row[i]["text"]) for row in (before, after))
        columns = "".join(f"<div>{column}</div>" for column in columns)
        parts.append(f'<div class="two">{columns}</div>')
    pairs = [row for row in rows if row["kind"] == "pair"]
    for stage in dict.fromkeys(row["stage"] for row in pairs):
        parts.append(f"<h2>{shown(stage)}: pairs, and what the teacher, who reads the left one, "
                     "would say otherwise on the right</h2>")  # fmt: skip
        for row in pairs:
            if row["stage"] == stage and row["divergence"]:
                parts += pair_of(row)
    head = f'<meta charset="utf-8"><title>{shown(folder.name)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">{head}\n{body}\n</html>\n'


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise BadInput("give one run's folder: python tools/trace.py runs/NAME")
    target = Path(sys.argv[1]) / "trace.html"
    target.write_text(page(target.parent), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    run_script(main)
