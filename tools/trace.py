"""A run as one page, which opens from disk: no script, nothing from elsewhere.

    python -m tools.trace runs/NAME    # writes runs/NAME/trace.html

The run: its curves, its tests, its settings. Test questions before and after, of those
that became right, became wrong and stayed. A group of GRPO with its rewards, and what
an update did to it. Pairs of OFSD: where the teacher objects, and what it would rather
say.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from grpo import group_advantages
from machinery.errors import BadInput
from machinery.json_lines import read_jsonl
from machinery.records import OBJECTION, sums_of
from machinery.tables import signed as signed_edge
from machinery.terminal import Parser, run_script
from tools.charts import stage_chart, step_chart
from tools.marks import (
    Piece,
    decimals,
    level_key,
    marked,
    marked_transcript,
    reward_text,
    shown,
    signed,
    verdict,
    visible,
    whole_attempt,
)
from train import Config

MOST_QUESTIONS = 4  # test questions of each kind on the page
MOST_PAIRS = 4  # of a stage
MOST_OBJECTIONS = 12  # of a pair in its table; all are marked in the text
MOVE = 0.05  # a smaller change of log pi is not marked
EDGES = ("edge", "edge_supported", "edge_control")
STYLE = Path(__file__).with_name("trace.css")


class Log(NamedTuple):
    """What a run's folder says."""

    name: str
    settings: dict
    metrics: list[dict]
    evaluations: list[dict]  # of the metrics, those of a test
    answers: dict[str, list[dict]]  # of each stage to the test questions
    groups: list[dict]
    pairs: dict[str, list[dict]]  # of each OFSD stage


def read_log(folder: Path) -> Log:
    """BadInput where there is no test yet."""
    metrics = list(read_jsonl(folder / "metrics.jsonl"))
    evaluations = [row for row in metrics if row["kind"] == "eval"]
    if not evaluations:
        raise BadInput(f"{folder} has no test yet: let it run on")
    answers = {row["stage"]: [] for row in evaluations}
    groups = []
    pairs = {}
    for row in read_jsonl(folder / "trajectories.jsonl"):
        if row["kind"] == "eval" and row["stage"] in answers:
            answers[row["stage"]].append(row)
        elif row["kind"] == "group":
            groups.append(row)
        elif row["kind"] == "pair":
            pairs.setdefault(row["stage"], []).append(row)
    settings = {}
    if (folder / "config.json").is_file():
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = folder.resolve().name
    return Log(name, settings, metrics, evaluations, answers, groups, pairs)


# ---------------------------------------------------------------- the whole page


def page(folder: Path) -> str:
    """The page of the run in this folder, as HTML."""
    log = read_log(folder)
    sections = [
        ("run", "The run", run_section(log)),
        ("tests", "Test questions", test_section(log)),
        ("grpo", "GRPO: groups, and what an update did to them", grpo_section(log)),
        ("ofsd", "OFSD: where the teacher objects", ofsd_section(log)),
        ("settings", "Settings", settings_section(log.settings)),
    ]
    links = [f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections]
    parts = [
        f"<header><h1>{shown(log.name)}</h1>",
        summary_of(log),
        f'</header><nav aria-label="Contents"><ul>{"".join(links)}</ul></nav><main>',
    ]
    for key, title, content in sections:
        parts.append(f'<section id="{key}"><h2>{title}</h2>')
        parts += content
        parts.append("</section>")
    parts.append("</main>")
    body = "\n".join(parts)
    head = '<meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    style = STYLE.read_text(encoding="utf-8")
    head += f"<title>{shown(log.name)}</title><style>{style}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
        f"<body>{body}</body></html>\n"
    )


def summary_of(log: Log) -> str:
    """What the run did, in a sentence or two."""
    first = log.evaluations[0]
    last = log.evaluations[-1]
    model = shown(log.settings.get("model", "the model"))
    text = f"{model} answered {first['n']} test questions. Exactly right (EM) were "
    text += f"{first['em']:.1%} at {shown(first['stage'])}"
    if len(log.evaluations) > 1:
        text += f", and {last['em']:.1%} at {shown(last['stage'])}"
    text += "."
    gains = []
    for before, after in pairwise(log.evaluations):
        gain = 100 * (after["em"] - before["em"])
        gains.append(f"{shown(after['stage'])} {gain:+.1f}")
    if gains:
        text += f" Change of EM in points, by stage: {', '.join(gains)}."
    stages_a_round = 2 if log.settings.get("ofsd", True) else 1
    planned = 1 + stages_a_round * log.settings.get("rounds", 0)
    if len(log.evaluations) < planned:
        text += f" The run is not over: {len(log.evaluations)} of {planned} tests are."
    return f"<p>{text}</p>"


# ---------------------------------------------------------------- the run


def run_section(log: Log) -> list[str]:
    """Its curves and its tests."""
    stages = [row["stage"] for row in log.evaluations]
    ems = [row["em"] for row in log.evaluations]
    searches = [row["searches"] for row in log.evaluations]
    charts = [
        stage_chart("EM on the test questions", stages, ems, ".3f"),
        stage_chart("searches a test question", stages, searches, ".2f"),
    ]
    rewards = {}
    for row in log.metrics:
        if row["kind"] == "step" and "reward" in row:
            rewards.setdefault(row["stage"], []).append(row["reward"])
    if rewards:
        charts.append(step_chart("GRPO: mean reward of each step", rewards))
    return [
        f'<div class="charts">{"".join(charts)}</div>',
        evaluation_table(log.evaluations),
        "<p><small>EM: share of exactly right answers, greedy, tested after the stage. "
        "edge, supported and control stand in the row of their OFSD stage, and were "
        "measured just before it, on training questions. edge: EM with the reference "
        "in the prompt (the teacher) minus EM without it (the student). supported: the "
        "same, but an answer counts only if a passage that the response found contains "
        "it. control: the edge with another question's reference.</small></p>",
    ]


def evaluation_table(evaluations: list[dict]) -> str:
    """A line for each test of the run."""
    kinds = list(evaluations[0].get("em_by", {}))
    names = ["stage", "EM", *[f"EM {shown(kind)}" for kind in kinds]]
    names += ["F1", "searches", "answered", "edge", "supported", "control"]
    names.append("minutes so far")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = [f"<tr>{heads}</tr>"]
    for row in evaluations:
        numbers = [row["em"], *[row["em_by"].get(kind) for kind in kinds]]
        numbers += [row[name] for name in ("f1", "searches", "answered")]
        cells = [decimals(number, 3) for number in numbers]
        cells += [signed_edge(row.get(name)) for name in EDGES]
        cells.append(f"{row['time_s'] / 60:.1f}")
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{shown(row["stage"])}</th>{body}</tr>')
    table = f"<table>{''.join(rows)}</table>"
    return f'<div class="scroll" tabindex="0" aria-label="tests">{table}</div>'


def settings_section(settings: dict) -> list[str]:
    """What differs from the defaults of train.py, and, folded, all settings."""
    defaults = asdict(Config())
    changed = []
    for name, value in settings.items():
        default = defaults.get(name)
        if name not in ("out", "date") and value != default:
            changed.append([name, value, default])
    everything = list(settings.items())
    said = "<p>All are the defaults of train.py.</p>"
    if changed:
        caption = "Those that differ from the defaults of train.py."
        said = settings_table(["setting", "this run", "default"], changed, caption)
    whole = settings_table(["setting", "this run"], everything, "All of them.")
    return [said, folded("all settings of this run", whole, is_open=False)]


def settings_table(names: list[str], rows: list, caption: str) -> str:
    heads = "".join(f"<th>{name}</th>" for name in names)
    lines = [f"<caption>{caption}</caption><tr>{heads}</tr>"]
    for row in rows:
        body = "".join(f"<td>{shown(cell)}</td>" for cell in row)
        lines.append(f"<tr>{body}</tr>")
    table = f'<table class="settings">{"".join(lines)}</table>'
    return f'<div class="scroll" tabindex="0" aria-label="settings">{table}</div>'


# ---------------------------------------------------------------- test questions


class Attempt(NamedTuple):
    """The answers to a test question in the first test and in the last."""

    before: dict
    after: dict


def attempts_by_kind(log: Log) -> dict[str, list[Attempt]]:
    """The test questions, by what became of them."""
    first = log.evaluations[0]["stage"]
    last = log.evaluations[-1]["stage"]
    kinds = {"became right": [], "became wrong": [], "stayed right": []}
    kinds["stayed wrong"] = []
    if first == last:
        kinds = {"right": [], "wrong": []}
    # All tests ask the same questions in the same order. Ids say less: two questions
    # may have the same one. While a run still logs its last test, a part is missing.
    for before, after in zip(log.answers[first], log.answers[last], strict=False):
        kind = "right" if after["em"] else "wrong"
        if first != last:
            changed = bool(before["em"]) != bool(after["em"])
            kind = f"became {kind}" if changed else f"stayed {kind}"
        kinds[kind].append(Attempt(before, after))
    return kinds


def spread(items: list, count: int) -> list:
    """So many of the items, the first and others at equal distances.

    >>> spread([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 2, 4]
    """
    if len(items) <= count:
        return items
    return [items[number * len(items) // count] for number in range(count)]


def test_section(log: Log) -> list[str]:
    """Counts of all test questions, and some of each kind."""
    first = log.evaluations[0]["stage"]
    last = log.evaluations[-1]["stage"]
    kinds = attempts_by_kind(log)
    question_count = sum(len(attempts) for attempts in kinds.values())
    boxes = []
    for kind, attempts in kinds.items():
        boxes.append(f"<li><b>{len(attempts)}</b> {kind}</li>")
    compared = f"from {shown(first)} to {shown(last)}"
    if first == last:
        compared = f"at {shown(first)}, the only test so far"
    parts = [
        f"<p>What became of the {question_count} test questions {compared}:</p>",
        f'<ul class="counts">{"".join(boxes)}</ul>',
        f"<p>Below are up to {MOST_QUESTIONS} questions of each kind. They are chosen "
        "by a rule and not for their looks: the first of the kind, and others at equal "
        "distances in the order of the test.</p>",
        '<p class="key"><span class="policy">the policy wrote this</span> '
        '<span class="environment">the environment wrote this: passages</span></p>',
    ]
    for kind, attempts in kinds.items():
        chosen = spread(attempts, MOST_QUESTIONS)
        parts.append(f"<h3>{kind}: {len(chosen)} of {len(attempts)}</h3>")
        for number, attempt in enumerate(chosen):
            content = test_attempt(attempt, first, last)
            question = attempt.after["question"]
            answers = " / ".join(attempt.after["golden_answers"])
            title = f"{shown(question)} <small>(answer: {shown(answers)})</small>"
            parts.append(folded(title, content, is_open=number == 0))
    return parts


def test_attempt(attempt: Attempt, first: str, last: str) -> str:
    """The answers of the two tests side by side, or that of the only test."""
    after = f"<h5>{shown(last)}</h5>{whole_attempt(attempt.after)}"
    if first == last:
        return side_by_side(after)
    before = f"<h5>{shown(first)}</h5>{whole_attempt(attempt.before)}"
    return side_by_side(before, after)


def folded(title: str, content: str, is_open: bool) -> str:
    state = " open" if is_open else ""
    return f"<details{state}><summary><h4>{title}</h4></summary>{content}</details>"


def side_by_side(*columns: str, kind: str = "two") -> str:
    boxes = "\n".join(f"<div>{column}</div>" for column in columns)
    return f'<div class="{kind}">{boxes}</div>'


# ---------------------------------------------------------------- GRPO


def grpo_section(log: Log) -> list[str]:
    """For each stage the group that was kept."""
    if not log.groups:
        return ["<p>This run has kept no group of a GRPO stage.</p>"]
    parts = [
        "<p>For each question GRPO samples a group of trajectories. The advantage is "
        "the reward minus the mean of its group, in standard deviations of the group. "
        "The update makes trajectories above the mean likelier, and those below it "
        "less likely. log π is the log-probability of all that the policy wrote in a "
        "trajectory, when it was sampled and after the update. Shown is the first "
        "group of a stage's first step whose rewards differ; the update was made on "
        "all groups of that step. A token that likelier and less likely trajectories "
        "share may move either way.</p>",
        level_key(
            "Marked are tokens whose log π changed:",
            [
                ("likelier", "▲", "likelier, by"),
                ("less", "▼", "less likely, by"),
            ],
            MOVE,
            "A number is the change.",
        ),
    ]
    for group in log.groups:
        parts += group_parts(group)
    return parts


def group_parts(group: dict) -> list[str]:
    """The trajectories of a group, each with its numbers."""
    trajectories = group["trajectories"]
    advantages = group_advantages([group["rewards"]])[0].tolist()
    question = shown(trajectories[0]["question"])
    answers = shown(" / ".join(group["golden_answers"]))
    cards = []
    moves = []
    rows = zip(trajectories, group["rewards"], advantages, strict=True)
    for number, (trajectory, reward, advantage) in enumerate(rows, start=1):
        before, after = sums_of(trajectory["tokens"])
        moves.append(after - before)
        cards.append(
            f"<h5>{number}: reward {reward_text(reward)}, "
            f"advantage {signed(advantage)}</h5>"
            f"<p>log π {before:.2f} → {after:.2f}: {arrow(after - before)}</p>"
            f"{verdict(trajectory)}{move_map(trajectory['tokens'])}"
        )
    said = what_moved(advantages, moves)
    return [
        f"<h3>{shown(group['stage'])}: {question} <small>(answer: {answers})</small>"
        f"</h3><p>{said}</p>",
        side_by_side(*cards, kind="cards"),
    ]


def what_moved(advantages: list[float], moves: list[float]) -> str:
    """Whether the update did what the advantages ask for."""
    better = []
    worse = []
    for advantage, move in zip(advantages, moves, strict=True):
        if advantage > 0:
            better.append(move > 0)
        if advantage < 0:
            worse.append(move < 0)
    if not better:
        return "All rewards are equal, so all advantages are 0: nothing to learn here."
    return (
        f"Of {len(better)} above the mean, {sum(better)} became likelier. "
        f"Of {len(worse)} below it, {sum(worse)} became less likely."
    )


def arrow(move: float) -> str:
    """A change of log pi: its number, and in words which way it went."""
    if move > 0:
        return f'<span class="right">▲ {signed(move)}, likelier</span>'
    if move < 0:
        return f'<span class="wrong">▼ {signed(move)}, less likely</span>'
    return "unchanged"


def move_map(tokens: list[list]) -> str:
    """The text, with a mark at each token whose log pi changed much."""
    pieces = []
    for text, *numbers in tokens:
        if not numbers:
            pieces.append(Piece(text, by_policy=False))
            continue
        old, new = numbers
        move = new - old
        html = shown(text)
        if abs(move) >= MOVE:
            sign = "▲" if move > 0 else "▼"
            kind = "likelier" if move > 0 else "less"
            html = marked(text, kind, abs(move), f"{sign}{abs(move):.2f}")
        pieces.append(Piece(text, by_policy=True, html=html))
    return marked_transcript(pieces)


# ---------------------------------------------------------------- OFSD


def ofsd_section(log: Log) -> list[str]:
    """For each stage what was mined, and pairs of which the divergences were logged."""
    minings = [row for row in log.metrics if row["kind"] == "mining"]
    if not minings:
        return ["<p>This run has no OFSD stage.</p>"]
    parts = [
        "<p>A pair is two attempts at one question: a right one, the reference, and "
        "one to be corrected, the student's: a wrong one if there is any. OFSD does "
        "not use their advantages. The teacher is the same model, but its "
        "prompt shows the reference. Both read the student's text, and say at each "
        "token how likely they find each next token. Where the two differ, the teacher "
        "objects, and the update pulls the student towards the teacher. Where the "
        "teacher's first choice is another token, it would have written that. "
        "Elsewhere it is only more or less sure of the same one. All numbers are from "
        "before the update.</p>",
        level_key(
            "Marked are tokens where the divergence from the teacher is",
            [("", "", "")],
            OBJECTION,
            "A number is the divergence (KL) in nats: the loss at this token. 0: both "
            "agree.",
        ),
    ]
    for mining in minings:
        stage = mining["stage"]
        pairs = log.pairs.get(stage, [])
        logged = [pair for pair in pairs if pair["divergence"]]
        chosen = spread(logged, MOST_PAIRS)
        parts.append(f"<h3>{shown(stage)}: {len(chosen)} of {len(pairs)} pairs")
        parts.append("<small>(at equal distances in their order)</small></h3>")
        parts.append(mining_line(mining))
        for number, pair in enumerate(chosen):
            title = shown(pair["reference"]["question"])
            content = "\n".join(pair_parts(pair))
            parts.append(folded(title, content, is_open=number == 0))
    return parts


def mining_line(mining: dict) -> str:
    """What a stage mined, its edges, and whether it was skipped."""
    text = f"Mined: {mining['pairs']} pairs. No pair came from {mining['no_correct']} "
    text += f"questions without a right answer and {mining['no_contrast']} answered "
    text += f"right in one and the same way; {mining['too_long']} were too long. "
    if mining.get("edge") is not None:
        edge, supported, control = [signed_edge(mining[name]) for name in EDGES]
        text += f"The teacher's edge was {edge} ({supported} supported); with another "
        text += f"question's reference it was {control}. "
    if mining["skipped"]:
        text += "<b>The stage was skipped.</b>"
    return f"<p>{text}</p>"


def pair_parts(pair: dict) -> list[str]:
    """A mined pair: the rewards of its group, both texts, the teacher's objections."""
    reference = pair["reference"]
    student = pair["student"]
    rewards = " ".join(reward_text(reward) for reward in pair["rewards"])
    left = [
        "<h5>reference: the teacher has read it</h5>",
        advantage_line(reference["reward"], pair["rewards"]),
        whole_attempt(reference),
    ]
    right = [
        "<h5>student: this is corrected</h5>",
        advantage_line(student["reward"], pair["rewards"]),
        verdict(student),
        divergence_map(pair["divergence"]),
    ]
    return [
        f"<p>rewards of the group: {rewards}</p>",
        side_by_side("".join(left), "".join(right)),
        objection_table(pair),
        control_part(pair),
    ]


def advantage_line(reward: float, group_rewards: list[float]) -> str:
    """The reward of a trajectory, and the advantage that GRPO would give it."""
    # Equal rewards of a group have equal advantages, so the first of them will do.
    number = group_rewards.index(reward)
    advantage = group_advantages([group_rewards])[0, number].item()
    return f"<p>reward {reward_text(reward)}, advantage {signed(advantage)}</p>"


def divergence_map(tokens: list) -> str:
    """The student's tokens, marked and numbered where the teacher objects."""
    pieces = []
    for text, divergence in tokens:
        if divergence is None:
            pieces.append(Piece(text, by_policy=False))
            continue
        html = shown(text)
        if divergence > OBJECTION:
            html = marked(text, "", divergence, f"{divergence:.2f}")
        pieces.append(Piece(text, by_policy=True, html=html))
    return marked_transcript(pieces)


def objection_table(pair: dict) -> str:
    """What the student wrote, and what the teacher would rather say."""
    objections = pair.get("objections") or []

    def divergence_of(objection: list) -> float:
        return pair["divergence"][objection[0]][1]

    largest = sorted(objections, key=divergence_of, reverse=True)[:MOST_OBJECTIONS]
    if not largest:
        return ""
    names = ["nats", "the student wrote", "the teacher's first choice", "second"]
    names.append("third")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = []
    for objection in sorted(largest):
        cells = [f"{divergence_of(objection):.2f}"]
        written = objection[1]
        cells.append(choice(written))
        for token in objection[2:]:
            is_same = token[0] == written[0]
            cells.append("<i>the same token</i>" if is_same else choice(token))
        labelled = zip(names, cells, strict=True)
        body = "".join(
            f'<td data-label="{name}">{cell}</td>' for name, cell in labelled
        )
        rows.append(f"<tr>{body}</tr>")
    caption = f"The {len(largest)} largest of {len(objections)} objections, in the "
    caption += "order of the text. Behind each token: its probability by the teacher, "
    caption += "and by the student."
    return (
        f'<table class="wants"><caption>{caption}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def choice(token: list) -> str:
    """A token with the two probabilities.

    >>> choice([" fueled", 0.931, 0.0004])
    '<b>fueled</b> <small>teacher .93, student .0004</small>'
    """
    text, p_teacher, p_student = token
    numbers = f"teacher {probability(p_teacher)}, student {probability(p_student)}"
    return f"<b>{visible(text)}</b> <small>{numbers}</small>"


def probability(value: float) -> str:
    """
    >>> probability(0.5), probability(1.0), probability(0.0004), probability(1e-9)
    ('.50', '1.00', '.0004', '&lt;.0001')
    """
    if value < 0.0001:
        return "&lt;.0001"
    text = f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"
    return text.removeprefix("0")


def control_part(pair: dict) -> str:
    """The same text, read by a teacher with another question's reference."""
    control = pair.get("control")
    if not control:
        return ""
    tokens = []
    for (text, _), value in zip(pair["divergence"], control["divergence"], strict=True):
        tokens.append([text, value])
    own = total(value for _, value in pair["divergence"])
    other = total(control["divergence"])
    text = (
        "<h5>The same text, but the teacher has read the reference of another "
        f"question</h5><p>It read about: {shown(control['question'])} All "
        f"divergences together are {other:.2f} nats here, and {own:.2f} with the right "
        "reference. More would not be better: this reference speaks of something else, "
        "and the teacher may object because it expects its names.</p>"
    )
    return side_by_side(text + divergence_map(tokens))


def total(divergences: Iterable[float | None]) -> float:
    return sum(value for value in divergences if value is not None)


def main() -> None:
    parser = Parser(description="Write a run as one page, trace.html in its folder.")
    parser.add_argument("folder", type=Path, help="the folder of a run, runs/NAME")
    folder = parser.parse_args().folder
    target = folder / "trace.html"
    target.write_text(page(folder), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    run_script(main)
