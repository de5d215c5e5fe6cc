"""What a stage of OFSD changes, seen twice: token by token, and relation by relation.

    python results/mechanism.py    # writes mechanism.json and, with matplotlib, mechanism.png

Three seeds of one stage with train.py's defaults, from the base model (no GRPO before it), tested
on the validation questions; a minute each on one core. Left: the forward KL from teacher to
student on the students' tokens, by what the token is, over the first twenty pairs of each seed.
Right: EM of the questions whose chain has a relation, before the stage and after it.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "micro")]

from make import CLAUSES, WORDS  # noqa: E402

from retriever import read_jsonl  # noqa: E402
from train import Config, train  # noqa: E402

KINDS = (
    "tag", "thought", "name in a thought", "name in a query", "relation in a query",
    "word searched with", "answer",
)  # fmt: skip


def kinds_of(pair: dict, names: set[str]) -> list[str]:
    """What each token of a pair's student is; "" for the environment's. names: words of names."""
    corpus_words, inside, kinds = {*" ".join(WORDS.values()).split()}, "", []
    for text, value in pair["divergence"]:
        word = text.strip()
        if word.startswith("<"):
            inside, kind = "" if word.startswith("</") else word.strip("<>"), "tag"
        elif inside == "think":
            kind = "name in a thought" if word in names else "thought"
        elif inside == "search":
            kind = "relation in a query" if word in CLAUSES else "name in a query"
            kind = "word searched with" if word in corpus_words else kind
        else:
            kind = inside or "tag"
        kinds.append("" if value is None else kind)
    return kinds


def run(seed: int) -> tuple[dict[str, list[float]], dict[str, list[tuple[float, float]]]]:
    """One stage. The divergences of each kind of token; for each relation EM before and after the
    stage of each question that has it in its chain."""
    folder = Path(f"runs/mechanism/{seed}")
    shutil.rmtree(folder, ignore_errors=True)
    settings = dict(rounds=1, grpo_steps=0, eval_questions="micro/validation.jsonl")
    train(Config(seed=seed, out=str(folder), **settings))
    rows, divergences, ems = list(read_jsonl(folder / "trajectories.jsonl")), {}, {}
    names = {word for row in read_jsonl("micro/corpus.jsonl") for word in row["title"].split()}
    for pair in [row for row in rows if row["kind"] == "pair"][:20]:
        for kind, (_, value) in zip(kinds_of(pair, names), pair["divergence"], strict=True):
            if kind:
                divergences.setdefault(kind, []).append(value)
    before, after = ([r for r in rows if r["stage"] == stage and r["kind"] == "eval"]
                     for stage in ("base", "ofsd-1"))  # fmt: skip
    for question, old, new in zip(read_jsonl("micro/validation.jsonl"), before, after, strict=True):
        for relation in {*question["chain"]}:
            ems.setdefault(relation, []).append((old["em"], new["em"]))
    return divergences, ems


def main() -> None:
    os.chdir(HERE.parent)
    runs = [run(seed) for seed in range(300, 303)]
    values = {kind: [x for one, _ in runs for x in one.get(kind, [])] for kind in KINDS}
    total, count, pairs = sum(map(sum, values.values())), sum(map(len, values.values())), {}
    for _, ems in runs:
        for relation, both in ems.items():
            pairs.setdefault(relation, []).extend(both)
    told = {
        "kl": {
            kind: {"mean": mean(x), "share": sum(x) / total, "of_tokens": len(x) / count}
            for kind, x in values.items()
        },
        "em": {relation: [*map(mean, zip(*both))] for relation, both in sorted(pairs.items())},
    }  # fmt: skip
    (HERE / "mechanism.json").write_text(json.dumps(told, indent=1) + "\n")
    draw(told)


def draw(told: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    picture, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bars = left.barh(list(told["kl"]), [kl["mean"] for kl in told["kl"].values()], color="tab:blue")
    left.bar_label(bars, [f" {kl['share']:.0%} of the loss" for kl in told["kl"].values()])
    left.set(title="Where the teacher disagrees, mean KL of a token (nats)")
    left.margins(x=0.35)
    left.invert_yaxis()
    ems = dict(sorted(told["em"].items(), key=lambda item: item[1]))
    right.hlines(list(ems), *zip(*ems.values()), color="lightgray")
    for number, name in enumerate(("before", "after one stage of OFSD")):
        right.plot([em[number] for em in ems.values()], list(ems), "o", label=name)
    right.set(title="EM of the questions that need a relation", xlim=(0, 1))
    right.legend(loc="upper left")
    # A test reads what was drawn, and compares it with the file.
    picture.savefig(HERE / "mechanism.png", dpi=110, metadata={"Description": json.dumps(told)})


if __name__ == "__main__":
    main()
