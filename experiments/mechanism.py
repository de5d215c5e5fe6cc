"""What a stage of OFSD changes, seen twice: token by token, and relation by relation.

    python -m experiments.mechanism    # writes results/mechanism.json and mechanism.png

The picture needs matplotlib (requirements-extra.txt). Three seeds of one stage are run
by the default settings, from the base model (no GRPO before it), and tested on the
validation questions; a minute each on one core. Left: the forward KL from teacher to
student on the students' tokens, by what the token is, over the first twenty pairs of
each seed. Right: EM of the questions whose chain has a relation, before the stage and
after it.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from machinery.json_lines import read_jsonl
from machinery.terminal import run_script
from micro.make import CLAUSES, WORDS
from tools.pictures import load_matplotlib, new_figure
from train import Config, train

RESULTS = Path(__file__).resolve().parent.parent / "results"
SEEDS = (300, 301, 302)
VALIDATION = "micro/validation.jsonl"
KINDS = (
    "tag",
    "thought",
    "name in a thought",
    "name in a query",
    "relation in a query",
    "word searched with",
    "answer",
)


class Measured(NamedTuple):
    """What one or several runs say: a KL for each token, and two EMs for each question,
    before the stage and after it."""

    kls: dict[str, list[float]]  # by the kind of token
    ems: dict[str, list[tuple[float, float]]]  # by a relation of the question


def measure(seeds: tuple[int, ...]) -> Measured:
    """One stage with each seed."""
    kls = defaultdict(list)
    ems = defaultdict(list)
    for seed in seeds:
        folder = run_stage(seed)
        add_kls(folder, kls)
        add_ems(folder, ems)
    return Measured(kls, ems)


def run_stage(seed: int) -> Path:
    """Returns the folder of the run."""
    folder = Path("runs/mechanism") / str(seed)
    shutil.rmtree(folder, ignore_errors=True)
    config = Config(
        seed=seed,
        out=str(folder),
        rounds=1,
        grpo_steps=0,
        eval_questions=VALIDATION,
    )
    return train(config)


def add_kls(folder: Path, kls: dict[str, list[float]]) -> None:
    """Add the KL of each token of the first twenty pairs of a run to its kind."""
    names = set()  # the parts of all names, such as Bevor and Bridge
    for passage in read_jsonl("micro/corpus.jsonl"):
        names.update(passage["title"].split())
    rows = read_jsonl(folder / "trajectories.jsonl")
    pairs = [row for row in rows if row["kind"] == "pair"]
    for pair in pairs[:20]:
        kinds = kinds_of(pair, names)
        for kind, (_, kl) in zip(kinds, pair["divergence"], strict=True):
            if kind:
                kls[kind].append(kl)


def add_ems(folder: Path, ems: dict[str, list[tuple[float, float]]]) -> None:
    """Add the two EMs of each question of a run to each relation of its chain."""
    before = []
    after = []
    for row in read_jsonl(folder / "trajectories.jsonl"):
        if row["kind"] == "eval" and row["stage"] == "base":
            before.append(row["em"])
        if row["kind"] == "eval" and row["stage"] == "ofsd-1":
            after.append(row["em"])
    questions = read_jsonl(VALIDATION)
    for question, old, new in zip(questions, before, after, strict=True):
        for relation in set(question["chain"]):
            ems[relation].append((old, new))


def kinds_of(pair: dict, names: set[str]) -> list[str]:
    """What each token of a pair's student is; "" for those of the environment."""
    kinds = []
    inside = ""  # the tag whose content is being written
    for token, kl in pair["divergence"]:
        text = token.strip()
        if text.startswith("</"):
            inside = ""
            kind = "tag"
        elif text.startswith("<"):
            inside = text.strip("<>")
            kind = "tag"
        elif inside == "think":
            kind = "name in a thought" if text in names else "thought"
        elif inside == "search":
            kind = kind_in_query(text)
        else:
            kind = inside or "tag"
        kinds.append("" if kl is None else kind)
    return kinds


def kind_in_query(text: str) -> str:
    corpus_words = " ".join(WORDS.values()).split()
    if text in corpus_words:
        return "word searched with"
    if text in CLAUSES:
        return "relation in a query"
    return "name in a query"


def summary(measured: Measured) -> dict:
    """The numbers of results/mechanism.json. share: of the sum of all KLs."""
    total = sum(sum(kls) for kls in measured.kls.values())
    count = sum(len(kls) for kls in measured.kls.values())
    kl = {}
    for kind in KINDS:
        kls = measured.kls[kind]
        kl[kind] = {
            "mean": mean(kls),
            "share": sum(kls) / total,
            "of_tokens": len(kls) / count,
        }
    em = {}
    for relation in sorted(measured.ems):
        before, after = zip(*measured.ems[relation], strict=True)
        em[relation] = [mean(before), mean(after)]
    return {"kl": kl, "em": em}


def draw(numbers: dict) -> None:
    """The picture of a summary."""
    with new_figure(10, 4, spines=False) as figure:
        left, right = figure.subplots(1, 2)

        kls = numbers["kl"].values()
        means = [kl["mean"] for kl in kls]
        bars = left.barh(list(numbers["kl"]), means, color="tab:blue")
        left.bar_label(bars, [f" {kl['share']:.0%} of the loss" for kl in kls])
        left.set_title("Where the teacher disagrees, mean KL of a token (nats)")
        left.margins(x=0.35)
        left.invert_yaxis()

        ems = sorted(numbers["em"].items(), key=lambda item: item[1])
        relations = [relation for relation, _ in ems]
        before = [em[0] for _, em in ems]
        after = [em[1] for _, em in ems]
        right.hlines(relations, before, after, color="lightgray")
        right.plot(before, relations, "o", label="before")
        right.plot(after, relations, "o", label="after one stage of OFSD")
        right.set_title("EM of the questions that need a relation")
        right.set_xlim(0, 1)
        right.legend(loc="upper left")

        # A test reads what was drawn, and compares it with the file.
        drawn = {"Description": json.dumps(numbers)}
        figure.savefig(RESULTS / "mechanism.png", dpi=110, metadata=drawn)


def main() -> None:
    load_matplotlib()  # if it is missing, say so before the minutes of work
    numbers = summary(measure(SEEDS))
    text = json.dumps(numbers, indent=1) + "\n"
    (RESULTS / "mechanism.json").write_text(text, encoding="utf-8")
    draw(numbers)


if __name__ == "__main__":
    run_script(main)
