"""SmolLM2-135M learns to search: real questions, real passages, and what each arm costs.

    python results/real/run.py data path/to/sets            # questions and passages; seconds
    python results/real/run.py start cpu smollm2/model      # demonstrations, and the arms' start
    python results/real/run.py train cpu search-e1 0        # an arm and a seed; again: resumes
    python results/real/run.py train cpu grpo 0
    python results/real/run.py pilot cpu fast grpo_lr=2e-5  # to choose settings by
    python results/real/run.py test cpu test start search-e1-0      # all 400 questions
    python results/real/run.py test cpu hops start search-e1-0      # the second test
    python results/real/run.py table runs/real/cpu/*-0      # what their logs say, stage by stage
    python results/real/run.py figure cpu.png runs/real/cpu/*-0     # the same as a picture
    python results/real/run.py answers runs/real/cpu/search-e1-0    # right or not, without text

In place of "cpu", "cpu-longer" has nearly three times the steps of GRPO, and "gpu" is the full
length; PLANS below has all three.

data wants a folder with SET/questions.jsonl.gz and SET/corpus.jsonl.gz, in the form that README.md
describes. Questions that one passage answers come from nq, triviaqa, popqa and squad. Of each set
100 are kept for the test and 25 for validation, the others are trained on; seed 0 splits them. In
found.jsonl are those to train on whose first passage holds an answer. The passages of the four sets
are one corpus. Questions of several hops come from hotpotqa and 2wikimultihopqa, 200 of each, and
are searched in these two sets' passages.

Everything is written to runs/real/. The folders beside this file hold the logs of what was run;
docs/real-models.md tells what they say.
"""

import json
import random
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train as train_module  # noqa: E402
from eval import (  # noqa: E402
    evaluate, interval, load_questions, normalize_answer, print_table,
)  # fmt: skip
from retriever import BadInput, open_index, read_jsonl, run_script  # noqa: E402
from rollout import load_model  # noqa: E402
from tools import start  # noqa: E402
from train import Config, read_settings  # noqa: E402

DATA = ROOT / "runs/real"
SINGLE = "nq", "triviaqa", "popqa", "squad"
SEVERAL = "hotpotqa", "2wikimultihopqa"
LIMITS = "max_searches", "k", "max_tokens", "max_turn_tokens", "max_observation_tokens"


@dataclass
class Plan:
    """What differs between the machines."""

    settings: Config
    questions: str  # the file to train on
    demonstrations: int  # for the start
    privileged: int  # how many of these stand under the privileged prompt
    batch: int  # of these, for an update
    bfloat16: bool  # on a CPU, where it pays only if the processor has instructions for it
    alone: dict  # what GRPO alone has in place of some settings


CONFIGS = ROOT / "configs"
PLANS = {
    # GRPO alone costs nearly what Search-E1 has cost before its second OFSD.
    "cpu": Plan(
        read_settings(CONFIGS / "smollm2-135m-cpu.json"), "found",
        demonstrations=32, privileged=16, batch=4, bfloat16=True,
        alone={"ofsd": False, "grpo_steps": 30},
    ),
    # Here it costs as many tokens as Search-E1 samples in all.
    "gpu": Plan(
        read_settings(CONFIGS / "smollm2-135m.json"), "train",
        demonstrations=400, privileged=200, batch=8, bfloat16=False,
        alone={"ofsd": False, "rounds": 1, "grpo_steps": 40},
    ),
}  # fmt: skip
LONGER = dict(rounds=3, grpo_steps=42, questions_per_step=8, group_size=6, grpo_lr=5e-5)
PLANS["cpu-longer"] = replace(
    PLANS["cpu"], settings=replace(PLANS["cpu"].settings, **LONGER), alone={"ofsd": False}
)


def write(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    print(f"{path.name}: {len(rows)} lines")


def data(folder: str) -> None:
    """Split the questions, and put the passages together."""
    DATA.mkdir(parents=True, exist_ok=True)
    rng, parts, asked = random.Random(0), {"test": [], "validation": [], "train": []}, set()
    for name in SINGLE:
        rows = []
        for row in load_questions(f"{folder}/{name}/questions.jsonl.gz"):
            text = normalize_answer(row["question"])
            if text not in asked:  # some questions stand in two sets
                asked.add(text)
                rows.append({**row, "type": name})
        rng.shuffle(rows)
        parts["test"] += rows[:100]
        parts["validation"] += rows[100:125]
        parts["train"] += rows[125:]
    random.Random(1).shuffle(parts["test"])  # so that the first 200 are of all four sets
    for name, rows in parts.items():
        write(DATA / f"{name}.jsonl", rows)
    several = []
    for name in SEVERAL:
        rows = load_questions(f"{folder}/{name}/questions.jsonl.gz")
        several += [{**row, "type": name} for row in rng.sample(rows, 200)]
    write(DATA / "hops.jsonl", several)
    for name, sets in ("corpus", SINGLE), ("hops-corpus", SEVERAL):
        passages = [row for part in sets for row in read_jsonl(f"{folder}/{part}/corpus.jsonl.gz")]
        write(DATA / f"{name}.jsonl", passages)
    index = open_index(str(DATA / "corpus.jsonl"))
    found = [row for row in parts["train"] if start.demonstrate(index, row, k=1, max_searches=1)]
    write(DATA / "found.jsonl", found)


def start_model(machine: str, model: str) -> None:
    """Demonstrations, the same for all arms and seeds."""
    plan, names = PLANS[machine], ("prompt", "k", "max_searches", "max_observation_tokens")
    flags = [f"--{name.replace('_', '-')}={getattr(plan.settings, name)}" for name in names]
    sys.argv = [
        "start.py", "--model", model, "--questions", str(DATA / "train.jsonl"),
        "--corpus", str(DATA / "corpus.jsonl"), "--out", str(DATA / machine / "start"),
        "--count", str(plan.demonstrations), "--privileged", str(plan.privileged),
        "--batch", str(plan.batch), *flags,
    ]  # fmt: skip
    with arithmetic(machine):
        start.main()


def arithmetic(machine: str):
    """A context in which matrix products on a CPU are in bfloat16, if the plan says so. On a GPU
    they are in any case. No rounded weight is kept: after an update it would be an old one."""
    wanted = PLANS[machine].bfloat16
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted, cache_enabled=False)


def settings(machine: str, arm: str, seed: int) -> Config:
    plan, folder = PLANS[machine], DATA / machine
    arms = {"search-e1": {}, "grpo": plan.alone}
    files = {"questions": plan.questions, "eval_questions": "test", "corpus": "corpus"}
    paths = {key: str(DATA / f"{name}.jsonl") for key, name in files.items()}
    paths |= {"model": str(folder / "start"), "out": str(folder / f"{arm}-{seed}")}
    return replace(plan.settings, seed=seed, **paths, **arms[arm])


def train_arm(machine: str, arm: str, seed: str) -> None:
    run_counted(machine, settings(machine, arm, int(seed)))


def pilot(machine: str, name: str, *changes: str) -> None:
    """A short run, tested on the validation questions, with settings such as grpo_lr=2e-5."""
    values = {key: json.loads(value) for key, value in (change.split("=") for change in changes)}
    out = str(DATA / machine / f"pilot-{name}")
    short = {"rounds": 1, "grpo_steps": 10, "ofsd": False, "eval_limit": 0}
    test = {"eval_questions": str(DATA / "validation.jsonl"), "out": out}
    run_counted(machine, replace(settings(machine, "search-e1", 100), **test, **short | values))


def run_counted(machine: str, config: Config) -> None:
    """Train, or go on, and count what is sampled."""
    folder = Path(config.out)
    train_module.rollout = partial(counted, train_module.rollout, folder / "cost.jsonl")
    if begun := (folder / "config.json").exists():
        config = replace(config, date=read_settings(folder / "config.json").date)
    with arithmetic(machine):
        train_module.train(config, resume=begun)


def counted(rollout, log: Path, *args, progress: str = "", **how):
    """rollout(), and a line in the log: what it was for, how many trajectories, the tokens of their
    responses, and how many of these the policy sampled. Resuming cuts it as the run's own logs."""
    found = rollout(*args, progress=progress, **how)
    row = {"for": progress, "trajectories": len(found)}
    row["tokens"] = sum(len(t.response_ids) for t in found)
    row["sampled"] = sum(sum(t.loss_mask) for t in found)
    with open(log, "a") as file:
        file.write(json.dumps(row) + "\n")
    return found


def test(machine: str, part: str, *names: str) -> None:
    """Test models of runs/real/ on all questions of a part: test, validation or hops."""
    plan = PLANS[machine]
    how = {name: getattr(plan.settings, name) for name in LIMITS} | {"batch_size": 200}
    questions = load_questions(str(DATA / f"{part}.jsonl"))
    index = open_index(str(DATA / ("hops-corpus.jsonl" if part == "hops" else "corpus.jsonl")))
    for name in names:
        folder = DATA / machine / name / "model"
        model, tokenizer = load_model(str(folder if folder.exists() else folder.parent))
        with arithmetic(machine):
            row = evaluate(model, tokenizer, index, questions, progress=name, **how)
        print(json.dumps({"model": name, **row}))
        with open(DATA / machine / f"tested-{part}.jsonl", "a") as file:
            file.write(json.dumps({"model": name, **row}) + "\n")


def tests_of(folder: Path) -> list[dict]:
    """The tests of a run, each with its interval, and with "tokens": what the training before it
    had sampled and read, in thousands."""
    costs = list(read_jsonl(folder / "cost.jsonl"))
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["kind"] == "eval"]
    for row in rows:
        where = [cost["for"] for cost in costs].index(f"test {row['stage']}")
        spent = sum(c["tokens"] for c in costs[:where] if not c["for"].startswith("test"))
        row |= {"tokens": spent / 1000, "interval": interval(row["em"], row["n"])}
    return rows


def table(*folders: str) -> None:
    """A line for each test of these runs; the edges are the teacher's, before that stage."""
    rows = []
    for folder in map(Path, folders):
        for row in tests_of(folder):
            between = "{:.3f}-{:.3f}".format(*row["interval"])
            columns = {"run": folder.name, "stage": row["stage"], "EM": row["em"], "95 %": between}
            columns |= {"F1": row["f1"], "searches": row["searches"], "answered": row["answered"]}
            names = "edge", "edge_supported", "edge_control"
            columns |= {name: row.get(name, "") for name in names}
            rows.append(columns | {"tokens": f"{row['tokens']:.0f}"})
    print_table(rows)


def figure(out: str, *folders: str) -> None:
    """EM of the tests with its interval, and the searches, against the tokens: a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for number, folder in enumerate(map(Path, folders)):
        rows = tests_of(folder)
        tokens, em = [row["tokens"] for row in rows], [row["em"] for row in rows]
        reach = [[abs(row["em"] - row["interval"][end]) for row in rows] for end in (0, 1)]
        look = {"marker": "o", "color": f"C{number}", "label": folder.name}
        panels[0].errorbar(tokens, em, yerr=reach, capsize=3, **look)
        panels[1].plot(tokens, [row["searches"] for row in rows], **look)
        for row in rows[1:]:
            where = row["tokens"], row["em"]
            panels[0].annotate(row["stage"], where, xytext=(5, 5), textcoords="offset points")
    panels[0].set(ylabel="exact match, test questions", ylim=(0, None))
    panels[1].set(ylabel="searches a question", ylim=(0, 1.3 * panels[1].get_ylim()[1]))
    for axes in panels:
        axes.set(xlabel="tokens sampled and read in training, thousands")
        axes.grid(alpha=0.3)
        axes.legend()
    picture.savefig(out, dpi=110)


def answers(folder: str) -> None:
    """Write answers.jsonl: for each test question whether its answer is right, whether it has one,
    whether a right one stood in what was read, how many queries and different queries were asked,
    and the tags that each turn opens. No question and no passage is in it."""
    rows = []
    for row in read_jsonl(Path(folder) / "trajectories.jsonl"):
        if row["kind"] == "eval":
            read = [normalize_answer(text) for sampled, text in row["text"] if not sampled]
            golden = map(normalize_answer, row["golden_answers"])
            found = any(f" {answer} " in f" {text} " for answer in golden for text in read)
            counts = {"found": found, "queries": len(row["queries"])}
            counts["different"] = len({*row["queries"]})
            turns = [text for sampled, text in row["text"] if sampled]
            counts["turns"] = [re.findall("<(think|search|answer)>", text) for text in turns]
            told = {name: row[name] for name in ("stage", "id", "em")}
            rows.append(told | {"answered": row["answer"] is not None} | counts)
    write(Path(folder) / "answers.jsonl", rows)


PARTS = {
    "data": data, "start": start_model, "pilot": pilot, "train": train_arm, "test": test,
    "table": table, "figure": figure, "answers": answers,
}  # fmt: skip


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    if name not in PARTS:
        raise BadInput(f"say what to do: {', '.join(PARTS)} (the docstring has examples)")
    PARTS[name](*arguments)


if __name__ == "__main__":
    run_script(main)
