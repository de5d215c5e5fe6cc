"""SmolLM2-135M learns to search: real questions, real passages, and what it costs.

    python -m experiments.real data path/to/sets        # questions and passages
    python -m experiments.real start cpu smollm2/model  # demonstrations, and the start
    python -m experiments.real train cpu search-e1 0    # an arm and a seed; or go on
    python -m experiments.real train cpu grpo 0
    python -m experiments.real pilot cpu fast grpo_lr=2e-5       # to choose settings by
    python -m experiments.real test cpu test start search-e1-0   # all 400 questions
    python -m experiments.real test cpu hops start search-e1-0   # the second test
    python -m experiments.real table runs/real/cpu/*-0           # stage by stage
    python -m experiments.real figure cpu.png runs/real/cpu/*-0  # the same, drawn
    python -m experiments.real answers runs/real/cpu/grpo-0      # right or not, no text

In place of the plan "cpu", "cpu-longer" has nearly three times the steps of GRPO, and
"gpu" is the full length; PLANS below has all three.

data wants a folder with SET/questions.jsonl.gz and SET/corpus.jsonl.gz, in the form
that README.md describes. Questions that one passage answers come from nq, triviaqa,
popqa and squad. Of each set 100 are kept for the test and 25 for validation, and the
others are trained on; seed 0 splits them. In found.jsonl are those to train on whose
first passage holds an answer. The passages of the four sets are one corpus. Questions
of several hops come from hotpotqa and 2wikimultihopqa, 200 of each, and are searched in
these two sets' passages.

Everything is written to runs/real/. results/real/ has the logs of what was run, and
says what they show.
"""

import argparse
import json
import random
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from eval import evaluate, normalize_answer
from machinery.errors import BadInput
from machinery.json_lines import read_jsonl, write_jsonl
from machinery.models import load_model
from machinery.questions import load_questions
from machinery.run import Run
from machinery.settings import as_begun, read_settings
from machinery.tables import interval, print_table
from machinery.terminal import Parser, printable, run_script
from retriever import open_index
from rollout import Trajectory
from tools.pictures import new_figure
from tools.start import demonstrate, make_start
from train import Config, run_stages

DATA = Path("runs/real")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ONE_PASSAGE_SETS = ("nq", "triviaqa", "popqa", "squad")
SEVERAL_HOP_SETS = ("hotpotqa", "2wikimultihopqa")

# -------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Plan:
    """What differs between the machines."""

    search_e1: Config
    grpo: Config  # GRPO alone
    questions: str  # the file to train on
    demonstrations: int  # for the start
    privileged: int  # how many of these stand under the privileged prompt
    batch: int  # demonstrations an update


# On a CPU bfloat16 is faster only if the processor has instructions for it, as the one
# of the logs had.
CPU = replace(
    read_settings(CONFIGS / "smollm2-135m-cpu.json", Config), arithmetic="bfloat16"
)
CPU_LONGER = replace(
    CPU,
    rounds=3,
    grpo_steps=42,
    questions_per_step=8,
    group_size=6,
    grpo_lr=5e-5,
)
GPU = read_settings(CONFIGS / "smollm2-135m.json", Config)

PLANS = {
    # GRPO alone costs nearly what Search-E1 has cost before its second OFSD.
    "cpu": Plan(
        search_e1=CPU,
        grpo=replace(CPU, ofsd=False, grpo_steps=30),
        questions="found",
        demonstrations=32,
        privileged=16,
        batch=4,
    ),
    "cpu-longer": Plan(
        search_e1=CPU_LONGER,
        grpo=replace(CPU_LONGER, ofsd=False),
        questions="found",
        demonstrations=32,
        privileged=16,
        batch=4,
    ),
    # Here it costs as many tokens as Search-E1 samples in all.
    "gpu": Plan(
        search_e1=GPU,
        grpo=replace(GPU, ofsd=False, rounds=1, grpo_steps=40),
        questions="train",
        demonstrations=400,
        privileged=200,
        batch=8,
    ),
}


def settings_of(plan_name: str, arm: str, seed: int) -> Config:
    """The settings of a run: those of the plan, and the files and the seed."""
    plan = PLANS[plan_name]
    settings = plan.grpo if arm == "grpo" else plan.search_e1
    folder = DATA / plan_name
    return replace(
        settings,
        seed=seed,
        model=str(folder / "start"),
        questions=str(DATA / f"{plan.questions}.jsonl"),
        eval_questions=str(DATA / "test.jsonl"),
        corpus=str(DATA / "corpus.jsonl"),
        out=str(folder / f"{arm}-{seed}"),
    )


# --------------------------------------------------------------- the data and the start


def split_questions(folder: str) -> None:
    """Split the questions, and put the passages together."""
    DATA.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    asked: set[str] = set()
    test = []
    validation = []
    train = []
    for name in ONE_PASSAGE_SETS:
        questions = read_set(folder, name)
        questions = without_repeats(questions, asked)
        rng.shuffle(questions)
        test += questions[:100]
        validation += questions[100:125]
        train += questions[125:]
    # So that the first 200, which the training tests, are of all four sets.
    random.Random(1).shuffle(test)
    write("test", test)
    write("validation", validation)
    write("train", train)
    write("corpus", passages_of(folder, ONE_PASSAGE_SETS))

    hops = []
    for name in SEVERAL_HOP_SETS:
        hops += rng.sample(read_set(folder, name), 200)
    write("hops", hops)
    write("hops-corpus", passages_of(folder, SEVERAL_HOP_SETS))

    index = open_index(str(DATA / "corpus.jsonl"))
    found = [q for q in train if demonstrate(index, q, k=1, max_searches=1)]
    write("found", found)


def read_set(folder: str, name: str) -> list[dict]:
    """The questions of a set, each with the set's name as its type."""
    questions = load_questions(f"{folder}/{name}/questions.jsonl.gz")
    for question in questions:
        question["type"] = name
    return questions


def without_repeats(questions: list[dict], asked: set[str]) -> list[dict]:
    """Those that were not asked before, in this set or in another. asked grows."""
    kept = []
    for question in questions:
        text = normalize_answer(question["question"])
        if text not in asked:
            asked.add(text)
            kept.append(question)
    return kept


def passages_of(folder: str, names: tuple[str, ...]) -> list[dict]:
    passages = []
    for name in names:
        passages.extend(read_jsonl(f"{folder}/{name}/corpus.jsonl.gz"))
    return passages


def write(name: str, rows: list[dict]) -> None:
    """Write runs/real/NAME.jsonl."""
    write_jsonl(DATA / f"{name}.jsonl", rows)
    print(f"{name}.jsonl: {len(rows)} lines")


def start(plan_name: str, model: str) -> None:
    """Demonstrations, the same for all arms and seeds."""
    plan = PLANS[plan_name]
    settings = plan.search_e1
    make_start(
        model,
        str(DATA / "train.jsonl"),
        str(DATA / "corpus.jsonl"),
        str(DATA / plan_name / "start"),
        count=plan.demonstrations,
        privileged=plan.privileged,
        prompt=settings.prompt,
        k=settings.k,
        max_searches=settings.max_searches,
        max_observation_tokens=settings.max_observation_tokens,
        batch=plan.batch,
        lr=1e-4,
        seed=0,
        arithmetic=settings.arithmetic,
    )


# ----------------------------------------------------------------------------- training


class CountedRun(Run):
    """A run that counts what it samples, in cost.jsonl.

    Each call of sample() adds a line: what it was for, how many trajectories, the
    tokens of their responses, and how many of these the policy sampled. A run that is
    resumed cuts this file where it cuts its other logs.
    """

    logs = (*Run.logs, "cost.jsonl")

    def sample(
        self,
        questions: list[dict],
        *,
        group_size: int = 1,
        temperature: float = 1.0,
        prompts: list[list[int]] | None = None,
        progress: str = "",
    ) -> list[Trajectory]:
        trajectories = super().sample(
            questions,
            group_size=group_size,
            temperature=temperature,
            prompts=prompts,
            progress=progress,
        )
        line = {
            "for": progress,
            "trajectories": len(trajectories),
            "tokens": sum(len(t.response_ids) for t in trajectories),
            "sampled": sum(sum(t.loss_mask) for t in trajectories),
        }
        with open(self.folder / "cost.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return trajectories


def train_counted(settings: Config) -> None:
    """Train, or go on with the run that is there."""
    settings, resume = as_begun(settings)
    run_stages(CountedRun(settings, resume=resume))


def pilot(plan_name: str, name: str, changes: list[str]) -> None:
    """A short run, tested on the validation questions, with settings of its own."""
    short = replace(
        settings_of(plan_name, "search-e1", seed=100),
        rounds=1,
        grpo_steps=10,
        ofsd=False,
        eval_limit=0,
        eval_questions=str(DATA / "validation.jsonl"),
        out=str(DATA / plan_name / f"pilot-{name}"),
    )
    train_counted(replace(short, **parse_changes(changes)))


def parse_changes(changes: list[str]) -> dict:
    """Settings by name, from such as "grpo_lr=2e-5"; the value is JSON."""
    known = {field.name for field in fields(Config)}
    settings = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in known:
            raise BadInput(f"{change}: there is no setting {name}")
        try:
            settings[name] = json.loads(value)
        except ValueError as error:
            raise BadInput(f"{change}: write it as grpo_lr=2e-5") from error
    return settings


# -------------------------------------------------------------------------------- tests


def test_models(plan_name: str, part: str, names: list[str]) -> None:
    """Test models of runs/real/PLAN/ on all questions of a part: test, validation or
    hops. The results are added to tested-PART.jsonl there."""
    settings = PLANS[plan_name].search_e1
    folder = DATA / plan_name
    questions = load_questions(str(DATA / f"{part}.jsonl"))
    corpus = "hops-corpus" if part == "hops" else "corpus"
    index = open_index(str(DATA / f"{corpus}.jsonl"))
    for name in names:
        model_folder = folder / name / "model"
        if not model_folder.exists():  # the start is a model itself
            model_folder = folder / name
        model, tokenizer = load_model(str(model_folder), arithmetic=settings.arithmetic)
        metrics = evaluate(
            model,
            tokenizer,
            index,
            questions,
            k=settings.k,
            max_searches=settings.max_searches,
            max_tokens=settings.max_tokens,
            max_turn_tokens=settings.max_turn_tokens,
            max_observation_tokens=settings.max_observation_tokens,
            batch_size=200,
            progress=name,
        )
        line = json.dumps({"model": name, **metrics})
        print(line)
        with open(folder / f"tested-{part}.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


# -------------------------------------------------------------------- what the logs say


def tests_of(folder: Path) -> list[dict]:
    """The tests of a run as it logged them, each with its "interval", and "tokens":
    thousands that the training before it had sampled and read."""
    costs = list(read_jsonl(folder / "cost.jsonl"))
    tests = []
    for row in read_jsonl(folder / "metrics.jsonl"):
        if row["kind"] == "eval":
            row["tokens"] = tokens_before(costs, f"test {row['stage']}") / 1000
            row["interval"] = interval(row["em"], row["n"])
            tests.append(row)
    return tests


def tokens_before(costs: list[dict], test: str) -> int:
    """Tokens that were sampled or read for training before this test."""
    tokens = 0
    for cost in costs:
        if cost["for"] == test:
            break
        if not cost["for"].startswith("test"):
            tokens += cost["tokens"]
    return tokens


def table(folders: list[str]) -> None:
    """A line for each test of these runs. The edges are the teacher's, before that
    stage."""
    rows = []
    for folder in map(Path, folders):
        for test in tests_of(folder):
            low, high = test["interval"]
            row = {
                "run": folder.name,
                "stage": test["stage"],
                "EM": test["em"],
                "95 %": f"{low:.3f}-{high:.3f}",
                "F1": test["f1"],
                "searches": test["searches"],
                "answered": test["answered"],
                "edge": test.get("edge", ""),
                "edge_supported": test.get("edge_supported", ""),
                "edge_control": test.get("edge_control", ""),
                "tokens": f"{test['tokens']:.0f}",
            }
            rows.append(row)
    print_table(rows)


def figure(out: str, folders: list[str]) -> None:
    """EM of the tests with its interval, and the searches, against the tokens."""
    with new_figure(9, 3.6) as picture:
        left, right = picture.subplots(1, 2)
        names = []
        points = []
        lines = []
        for folder in map(Path, folders):
            tests = tests_of(folder)
            tokens = [test["tokens"] for test in tests]
            ems = [test["em"] for test in tests]
            searches = [test["searches"] for test in tests]
            below = [test["em"] - test["interval"][0] for test in tests]
            above = [test["interval"][1] - test["em"] for test in tests]
            names.append(printable(folder.absolute().name))
            bars = [below, above]
            drawn = left.errorbar(tokens, ems, yerr=bars, capsize=3, marker="o")
            points.append(drawn)
            lines += right.plot(tokens, searches, marker="o")
            for test in tests[1:]:  # the first one is the same for all runs
                left.annotate(
                    test["stage"],
                    (test["tokens"], test["em"]),
                    xytext=(5, 5),
                    textcoords="offset points",
                )
        left.set_ylabel("exact match, test questions")
        left.set_ylim(0, None)
        right.set_ylabel("searches a question")
        right.set_ylim(0, 1.3 * right.get_ylim()[1])
        for axes in (left, right):
            axes.set_xlabel("tokens sampled and read in training, thousands")
            axes.grid(alpha=0.3)
        # By itself a legend leaves out names that begin with "_".
        left.legend(points, names)
        right.legend(lines, names)
        try:
            picture.savefig(out, dpi=110)
        except ValueError as error:  # no format is called like that
            raise BadInput(f"{out}: {error}") from error


def answers(folder: str) -> None:
    """Write answers.jsonl, a line for each answer to a test question: whether it is
    right, whether there is one, whether a right one stood in what was read, how many
    queries and different queries were asked, and the tags that each turn opens. No
    question and no passage is in it."""
    rows = []
    for row in read_jsonl(Path(folder) / "trajectories.jsonl"):
        if row["kind"] == "eval":
            line = {
                "stage": row["stage"],
                "id": row["id"],
                "em": row["em"],
                "answered": row["answer"] is not None,
                "found": answer_was_read(row),
                "queries": len(row["queries"]),
                "different": len(set(row["queries"])),
                "turns": tags_by_turn(row),
            }
            rows.append(line)
    write_jsonl(Path(folder) / "answers.jsonl", rows)


def answer_was_read(row: dict) -> bool:
    """Does a golden answer stand in an observation?"""
    for sampled, text in row["text"]:
        if not sampled:
            text_read = f" {normalize_answer(text)} "
            for answer in row["golden_answers"]:
                if f" {normalize_answer(answer)} " in text_read:
                    return True
    return False


def tags_by_turn(row: dict) -> list[list[str]]:
    turns = [text for sampled, text in row["text"] if sampled]
    return [re.findall("<(think|search|answer)>", text) for text in turns]


# ----------------------------------------------------------------------------- commands


def parse_flags() -> argparse.Namespace:
    parser = Parser(description="SmolLM2-135M learns to search.")
    parts = parser.add_subparsers(
        dest="part", required=True, prog="real.py", parser_class=Parser
    )

    part = parts.add_parser("data", help="split the questions of some sets")
    part.add_argument("sets", help="the folder of the sets")

    part = parts.add_parser("start", help="teach a model to search and to answer")
    part.add_argument("plan", choices=list(PLANS))
    part.add_argument("model", help="a model folder or hub name")

    part = parts.add_parser("train", help="run an arm, or go on with it")
    part.add_argument("plan", choices=list(PLANS))
    part.add_argument("arm", choices=["search-e1", "grpo"])
    part.add_argument("seed", type=int)

    part = parts.add_parser("pilot", help="a short run on the validation questions")
    part.add_argument("plan", choices=list(PLANS))
    part.add_argument("name", help="of the run")
    part.add_argument("changes", nargs="*", help="settings, such as grpo_lr=2e-5")

    part = parts.add_parser("test", help="test models on all questions of a part")
    part.add_argument("plan", choices=list(PLANS))
    part.add_argument("questions", choices=["test", "validation", "hops"])
    part.add_argument("names", nargs="+", help="of runs, or start")

    part = parts.add_parser("table", help="print what the logs of runs say")
    part.add_argument("folders", nargs="+")

    part = parts.add_parser("figure", help="draw what the logs of runs say")
    part.add_argument("out", help="the picture, a .png")
    part.add_argument("folders", nargs="+")

    part = parts.add_parser("answers", help="which answers of a run are right")
    part.add_argument("folder")
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    if args.part == "data":
        split_questions(args.sets)
    elif args.part == "start":
        start(args.plan, args.model)
    elif args.part == "train":
        train_counted(settings_of(args.plan, args.arm, args.seed))
    elif args.part == "pilot":
        pilot(args.plan, args.name, args.changes)
    elif args.part == "test":
        test_models(args.plan, args.questions, args.names)
    elif args.part == "table":
        table(args.folders)
    elif args.part == "figure":
        figure(args.out, args.folders)
    elif args.part == "answers":
        answers(args.folder)


if __name__ == "__main__":
    run_script(main)
