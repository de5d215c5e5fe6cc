"""Tables of results on a terminal."""

import math
import re
from pathlib import Path
from statistics import fmean as mean

from machinery.benchmarks import BENCHMARKS, MULTI_HOP, SINGLE_HOP
from machinery.json_lines import read_jsonl
from machinery.terminal import printable


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was measured on n cases: (low, high).

    It stays within 0 and 1, and it has a width also where the share is 0 or 1. (The
    share ± 1.96 standard errors does neither.)

    >>> low, high = interval(0.464, 125)
    >>> print(f"{low:.3f} {high:.3f}")
    0.379 0.551
    """
    z = 1.96  # 95 % of a normal distribution lie within so many standard deviations
    centre = share + z**2 / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z**2 / n
    # The share lies between them. Where it is 0 or 1, rounding may say otherwise.
    low = min(share, max(0.0, (centre - half_width) / scale))
    high = max(share, min(1.0, (centre + half_width) / scale))
    return low, high


def by_number(name: str) -> tuple[float, str]:
    """A key to sort names by the number that they begin with; others come last.

    >>> sorted(["bridge", "10-hop", "2-hop"], key=by_number)
    ['2-hop', '10-hop', 'bridge']
    """
    digits = re.match(r"[0-9]{1,9}", name)
    number = int(digits[0]) if digits else math.inf
    return number, name


def print_table(rows: list[dict]) -> None:
    """Rows as columns; the first row names them. A later row may leave cells out."""
    names = list(rows[0])
    lines = [[cell(name) for name in names]]
    for row in rows:
        values = [row.get(name, "") for name in names]
        lines.append([cell(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        pairs = zip(line, widths, strict=True)
        print("  ".join(text.rjust(width) for text, width in pairs))


def cell(value: object) -> str:
    """The text of a cell: a fraction in three digits, other values as they print.

    It is one line, without control characters: a cell may hold the text of others.

    >>> cell(0.25), cell(2), cell("two\\nlines")
    ('0.250', '2', 'two lines')
    """
    if isinstance(value, float):
        return f"{value:.3f}"
    return " ".join(printable(str(value)).split())


def print_results(results: dict[str, dict]) -> None:
    """A line for each set; then the paper's averages, in which each set counts once.

    results: name of the set -> score(). An average is over the sets that are there.
    """
    rows = []
    for name, result in results.items():
        low, high = interval(result["em"], result["n"])
        row = {
            "set": name,
            "EM": result["em"],
            "95 %": f"{low:.3f}-{high:.3f}",
            "F1": result["f1"],
            "searches": result["searches"],
            "answered": result["answered"],
            "n": result["n"],
        }
        rows.append(row)
    averages = {"single-hop": SINGLE_HOP, "multi-hop": MULTI_HOP, "average": BENCHMARKS}
    for title, names in averages.items():
        ems = [results[name]["em"] for name in names if name in results]
        if ems:
            rows.append({"set": title, "EM": mean(ems)})
    print_table(rows)


def print_stages(evaluations: list[dict]) -> None:
    """A row for each test of a training run, in order.

    evaluations: the lines "kind": "eval" of its metrics.jsonl.
    """
    rows = []
    for evaluation in evaluations:
        row = {
            "stage": evaluation["stage"],
            "EM": evaluation["em"],
            "F1": evaluation["f1"],
        }
        for kind, em in evaluation["em_by"].items():
            row[f"EM {kind}"] = em
        row["searches"] = evaluation["searches"]
        row["answered"] = evaluation["answered"]
        row["edge"] = signed(evaluation.get("edge"))
        row["supported"] = signed(evaluation.get("edge_supported"))
        row["control"] = signed(evaluation.get("edge_control"))
        row["minutes"] = f"{evaluation['time_s'] / 60:.1f}"
        rows.append(row)
    print_table(rows)


def report(folder: Path, evaluations: list[dict]) -> None:
    """What a training run prints at its end: a table, and a question before and after.

    folder: the run's. evaluations: as print_stages takes them.
    """
    n = evaluations[0]["n"]
    print(f"\n{n} test questions. edge: the teacher's EM minus the student's;")
    print("supported: in supported answers; control: with another question's reference")
    print_stages(evaluations)

    before, after = most_improved(folder, n)
    print_answer("before", before)
    print_answer("after", after)
    print(f"\nmetrics, trajectories and the model are in {folder}")
    print(f"look at the run: python -m tools.trace {folder}")


def signed(edge: float | None) -> str:
    """An edge with its sign, or nothing where none was measured."""
    if edge is None:
        return ""
    return f"{edge:+.3f}"


def most_improved(folder: Path, n: int) -> tuple[dict, dict]:
    """The answers to one question in the first test and in the last.

    It is a question that became right, if there is one. Of several it is the one whose
    last answer took the most searches. Each test wrote n answers to trajectories.jsonl.
    """
    lines = read_jsonl(folder / "trajectories.jsonl")
    answers = [line for line in lines if line["kind"] == "eval"]
    first_test = answers[:n]
    last_test = answers[-n:]
    best = None
    best_gain = (-math.inf, 0)
    for before, after in zip(first_test, last_test, strict=True):
        gain = (after["em"] - before["em"], len(after["queries"]))
        if gain > best_gain:
            best = (before, after)
            best_gain = gain
    return best


def print_answer(title: str, answer: dict) -> None:
    """A question, its golden answers, and all that was written about it."""
    text = "".join(text for _, text in answer["text"]).strip()
    golden_answers = " / ".join(answer["golden_answers"])
    print(
        printable(
            f"\n{title}: {answer['question']}  (answer: {golden_answers})\n{text}"
        )
    )
