"""A run as one page: python results/trace.py runs/NAME writes runs/NAME/trace.html, which opens from disk.

Questions side by side before and after, who wrote what, and of the mined pairs the divergence at each of
the student's tokens: where the teacher would have said something else. No script, nothing from elsewhere.
"""

import sys
from html import escape
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo import group_advantages  # noqa: E402
from retriever import BadInput, printable, read_jsonl, run_script  # noqa: E402

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: right } td:first-child { text-align: left }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1em } .two > div { min-width: 0; border: 1px solid #ccc; padding: .5em .8em; overflow-wrap: anywhere }
pre { white-space: pre-wrap; margin: .2em 0; font: 13px/1.5 ui-monospace, monospace }
.policy { background: #e8f3e8 } .environment { background: #eef0f4; color: #445 } .right { color: #17702a } .wrong { color: #b3261e }
h3 { margin: 1.6em 0 .3em } summary { cursor: pointer; color: #445; white-space: nowrap; overflow: hidden; text-overflow: ellipsis } .key span { padding: 0 .4em; margin-right: .6em }
"""


def shown(text: str) -> str:
    """Escaped for the page: markup as text, and what would turn or hide text as an escape."""
    return escape(printable(text))


def spans(text: list) -> str:
    """A trajectory: the policy's words open, what the environment answered folded under its first title."""
    parts = []
    for sampled, words in text:
        if sampled:
            parts.append(f'<pre class="policy">{shown(words.strip())}</pre>')
        else:
            lines = [line for line in words.splitlines() if line.startswith("- ")]
            head = f"{len(lines)} passages: {lines[0][2:]}" if lines else "nothing was found"
            parts.append(f'<details><summary>{shown(head)}</summary><pre class="environment">{shown(words.strip())}</pre></details>')
    return "".join(parts)


def verdict(row: dict, em: float) -> str:
    state = "right" if em else "wrong"
    return f'<p class="{state}">{state}: {shown(str(row["answer"]))} <small>({len(row["queries"])} searches, ended by {shown(row["finish_reason"])})</small></p>'


def heat(tokens: list) -> str:
    """The student's tokens, the redder the more the teacher disagrees; the number is in the tooltip."""
    parts = []
    for text, kl in tokens:
        if kl is None:
            parts.append(f'<span class="environment">{shown(text)}</span>')
        else:
            parts.append(f'<span style="background: rgba(214, 40, 30, {min(kl, 1.0) ** 0.5:.2f})" title="{kl:.3f} nats">{shown(text)}</span>')
    return f"<pre>{''.join(parts)}</pre>"


def table(evaluations: list[dict]) -> str:
    rows = ["<tr><th>stage</th><th>EM</th><th>F1</th><th>searches</th><th>answered</th><th>teacher's edge</th></tr>"]
    for row in evaluations:
        edge = f"{row['edge']:+.3f}" if row.get("edge") is not None else ""
        cells = [shown(row["stage"]), *(f"{row[name]:.3f}" for name in ("em", "f1", "searches", "answered")), edge]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def page(folder: Path, most: int = 30) -> str:
    metrics = [row for _, row in read_jsonl(folder / "metrics.jsonl")]
    rows = [row for _, row in read_jsonl(folder / "trajectories.jsonl")]
    evaluations = [row for row in metrics if row["kind"] == "eval"]
    if len(evaluations) < 2:
        raise BadInput(f"{folder} has no two evaluations to compare: let it run on")
    first, last = evaluations[0]["stage"], evaluations[-1]["stage"]
    before, after = ({row["id"]: row for row in rows if row["kind"] == "eval" and row["stage"] == stage} for stage in (first, last))
    # Those that changed come first, then the longest.
    chosen = sorted(after, key=lambda i: (-abs(after[i]["em"] - before[i]["em"]), -len(after[i]["queries"])))[:most]
    parts = [f"<h1>{shown(str(folder))}</h1>", table(evaluations)]
    parts.append('<p class="key"><span class="policy">the policy wrote it</span><span class="environment">the environment wrote it</span></p>')
    parts.append(f"<h2>{len(chosen)} of {len(after)} test questions, at {shown(first)} and at {shown(last)}</h2>")
    for i in chosen:
        parts.append(f"<h3>{shown(after[i]['question'])}</h3><p>answer: {shown(' / '.join(after[i]['golden_answers']))}</p>")
        columns = "".join(f"<div>{verdict(row[i], row[i]['em'])}{spans(row[i]['text'])}</div>" for row in (before, after))
        parts.append(f'<div class="two">{columns}</div>')
    for stage in dict.fromkeys(row["stage"] for row in rows if row["kind"] == "pair"):
        pairs = [row for row in rows if row["kind"] == "pair" and row["stage"] == stage and row["divergence"]]
        parts.append(f"<h2>{shown(stage)}: pairs, and what the teacher, who reads the left one, would say otherwise on the right</h2>")
        for row in pairs:
            good, bad = (group_advantages(torch.tensor([row["rewards"]]))[0][row["rewards"].index(reward)].item() if reward in row["rewards"] else 0.0 for reward in (1.0, 0.0))
            wrong = 0.0 in row["rewards"]
            parts.append(f"<h3>{shown(row['reference']['question'])}</h3>")
            parts.append(f"<p>rewards of the group {' '.join(f'{r:.0f}' for r in row['rewards'])}; advantage of a right one {good:+.2f}, of a wrong one {bad:+.2f}</p>")
            left = f"<div><b>reference</b>{verdict(row['reference'], 1.0)}{spans(row['reference']['text'])}</div>"
            parts.append(f'<div class="two">{left}<div><b>student</b>{verdict(row["student"], 0.0 if wrong else 1.0)}{heat(row["divergence"])}</div></div>')
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{shown(folder.name)}</title><style>{STYLE}</style>\n{body}\n</html>\n'


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise BadInput("give one run's folder: python results/trace.py runs/NAME")
    target = Path(sys.argv[1]) / "trace.html"
    target.write_text(page(target.parent), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    run_script(main)
