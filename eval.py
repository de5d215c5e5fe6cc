"""Evaluation: questions in, exact match out.

The policy answers each question once, greedily, searching as it likes. What stands between its
answer tags is compared with the golden answers. The same is GRPO's reward (rewards_of).

Equations (SQuAD's; norm: lower case, no ASCII punctuation, no articles, single spaces)

    em(a, G) = max over g in G of [norm(a) = norm(g)],   0 if norm(a) is empty
    f1(a, G) = max over g in G of 2 p r / (p + r),   p, r: precision and recall of words, as bags
    supported(y): norm(a) stands, as whole words, in a passage that y itself retrieved

Deviations from the paper
    1. F1, and EM of answers that a retrieved passage supports (in logs), stand beside EM.
    2. The answer is sought in the response. Search-R1's scorer also sees the prompt's example.

    python eval.py                # a lesson: a table, and the worst answers
    python eval.py --model micro/model --questions micro/test.jsonl --corpus micro/corpus.jsonl
"""

import json
import os
import re
import string
import sys
from collections import Counter, defaultdict
from math import sqrt
from pathlib import Path
from statistics import fmean as mean

from retriever import BadInput, Parser, RemoteRetriever, open_index, printable, read_jsonl
from retriever import run_script
from rollout import Trajectory, load_model, rollout, standard_prompt

def normalize_answer(text: str) -> str:
    """SQuAD's normalisation. Accents and other Unicode stay as they are.

    >>> normalize_answer("  The U.S.A.,  a country")
    'usa country'
    """
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

def exact_match(prediction: str | None, golden_answers: list[str]) -> float:
    """1.0 if the prediction equals one of the golden answers, all normalised. None is wrong, and so
    is a prediction that normalises to nothing: "The" scores 0 (by SQuAD's script it can score 1).

    >>> exact_match("the Beatles!", ["Rolling Stones", "Beatles"])
    1.0
    """
    given = normalize_answer(prediction or "")
    return float(given != "" and given in map(normalize_answer, golden_answers))

def f1_score(prediction: str | None, golden_answers: list[str]) -> float:
    """Overlap of words, the best over the golden answers; yes and no are words like others.

    >>> f1_score("John F. Kennedy", ["Kennedy"])
    0.5
    """
    given, best = Counter(normalize_answer(prediction or "").split()), 0.0
    for golden in golden_answers:
        wanted = Counter(normalize_answer(golden).split())
        shared = (given & wanted).total()
        if shared:
            precision, recall = shared / given.total(), shared / wanted.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best

def supported(trajectory: Trajectory) -> bool:
    """Does the answer stand in a passage that this very trajectory retrieved?"""
    answer = normalize_answer(trajectory.answer or "")
    shown = (f"{p.title} {p.text}" for found in trajectory.passages for p in found)
    return answer != "" and any(f" {answer} " in f" {normalize_answer(text)} " for text in shown)

def rewards_of(questions: list[dict], trajectories: list[Trajectory]) -> list[float]:
    """GRPO's reward: change it here. The trajectories are question-major, as from rollout()."""
    size = len(trajectories) // len(questions)
    goldens = [question["golden_answers"] for question in questions for _ in range(size)]
    return [exact_match(t.answer, golden) for t, golden in zip(trajectories, goldens, strict=True)]

def score(questions: list[dict], trajectories: list[Trajectory]) -> dict:
    """Metrics of one trajectory for each question: em, f1, em_supported (right, and supported),
    searches, answered (a share), n, and em_by: EM for each number of "hops", or else "type"."""
    goldens, by_kind = [question["golden_answers"] for question in questions], defaultdict(list)
    ems = [exact_match(t.answer, golden) for t, golden in zip(trajectories, goldens, strict=True)]
    for question, em in zip(questions, ems):
        if "hops" in question or "type" in question:
            kind = f"{question['hops']}-hop" if "hops" in question else str(question["type"])
            by_kind[kind].append(em)
    return {
        "em": mean(ems),
        "f1": mean(f1_score(t.answer, golden) for t, golden in zip(trajectories, goldens)),
        "em_supported": mean(em * supported(t) for em, t in zip(ems, trajectories)),
        "searches": mean(len(t.queries) for t in trajectories),
        "answered": mean(t.answer is not None for t in trajectories),
        "n": len(ems),
        "em_by": {kind: mean(by_kind[kind]) for kind in sorted(by_kind)},
    }

def batch_stats(trajectories: list[Trajectory], rewards) -> dict[str, float]:
    """Means over a batch of GRPO. rewards: (Q, G). zero_var: share of groups of equal rewards."""
    return {
        "reward": rewards.mean().item(),
        "zero_var": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
        "length": mean(len(t.response_ids) for t in trajectories),
        "searches": mean(len(t.queries) for t in trajectories),
        "no_answer": mean(t.answer is None for t in trajectories),
        "repeats": mean(len({*map(str.lower, t.queries)}) < len(t.queries) for t in trajectories),
    }

def evaluate(model, tokenizer, retriever, questions: list[dict], **how) -> dict:
    """score() of one rollout a question, greedy unless a temperature is given. how: any keyword
    of rollout() (k, max_searches, seed, prompts, ...)."""
    asked = [question["question"] for question in questions]
    how = {"temperature": 0.0, **how}
    return score(questions, rollout(model, tokenizer, retriever, asked, **how))

# The seven benchmarks of the paper, by FlashRAG's names, and the split that Search-R1 tests on.
SINGLE_HOP = {"nq": "test", "triviaqa": "test", "popqa": "test"}
MULTI_HOP = {"hotpotqa": "dev", "2wikimultihopqa": "dev", "musique": "dev", "bamboogle": "test"}
BENCHMARKS = SINGLE_HOP | MULTI_HOP

def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n. It stays within 0 and 1.

    >>> [round(x, 3) for x in interval(0.464, 125)]
    [0.379, 0.551]
    """
    z = 1.96
    centre, half = share + z**2 / (2 * n), z * sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n))

def print_results(results: dict[str, dict]) -> None:
    """A line for each set. Then averages over these sets, in which each counts once."""
    rows = []
    for name, row in results.items():
        between = "{:.3f}-{:.3f}".format(*interval(row["em"], row["n"]))
        columns = {"set": name, "EM": row["em"], "95 %": between, "F1": row["f1"]}
        rows.append(columns | {key: row[key] for key in ("searches", "answered", "n")})
    for part, sets in ("single-hop", SINGLE_HOP), ("multi-hop", MULTI_HOP), ("average", BENCHMARKS):
        if ems := [results[name]["em"] for name in sets if name in results]:
            rows.append(dict.fromkeys(rows[0], "") | {"set": part, "EM": mean(ems)})
    print_table(rows)

def print_table(rows: list[dict]) -> None:
    """Rows with the same keys, as columns. Numbers with a fraction get three digits."""
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    cells.insert(0, list(rows[0]))
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))

# ---------------------------------------------------------------- machinery

def load_questions(spec: str) -> list[dict]:
    """Questions as dicts with at least id, question, golden_answers. spec: a JSON-lines file, or
    hub/dataset:config:split, such as RUC-NLPIR/FlashRAG_datasets:nq:test. Raises BadInput for
    what cannot be read, and for a row without a question or an answer (by file and line)."""
    if os.path.exists(spec) or spec.count(":") != 2:
        rows = list(read_jsonl(spec, to_question))
    else:
        from datasets import load_dataset  # it takes seconds to import

        name, config, split = spec.split(":")
        try:
            rows = [to_question(dict(row)) for row in load_dataset(name, config, split=split)]
        except Exception as error:  # no network, no such set, no such split: all end here
            raise BadInput(f"cannot load {spec} from the hub: {error}") from None
    return [{**row, "id": str(row.get("id", number))} for number, row in enumerate(rows)]

def to_question(row: dict) -> dict:
    asked, answers = row.get("question"), row.get("golden_answers")
    if not isinstance(asked, str) or not asked.strip():
        raise ValueError('"question" is missing or empty')
    good = isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers)
    if not good or not answers:
        raise ValueError('"golden_answers" must be a list of at least one non-empty string')
    return {key: value for key, value in row.items() if value is not None}

def load_mixture(specs: str, test_set: list[dict]) -> list[dict]:
    """Training questions of one spec, or of several with commas between them. Raises BadInput if
    one of them is a test question (letter case, punctuation and articles aside)."""
    tested, mixture = {normalize_answer(row["question"]) for row in test_set}, []
    for spec in [specs] if os.path.exists(specs) else specs.split(","):
        questions = load_questions(spec)
        shared = [q["question"] for q in questions if normalize_answer(q["question"]) in tested]
        if shared:
            raise BadInput(f"{spec}: {len(shared)} training questions are test questions, such as "
                           f"{shared[0]!r}: remove them there")  # fmt: skip
        mixture += questions
    return mixture

def report(folder: Path, evaluations: list[dict]) -> None:
    """The table of a training run, and one of its questions before and after."""
    rows = []
    for row in evaluations:
        edges = {"edge": row.get("edge")}
        edges |= {name: row.get(f"edge_{name}") for name in ("supported", "control")}
        edges = {name: "" if edge is None else f"{edge:+.3f}" for name, edge in edges.items()}
        kinds = {f"EM {kind}": em for kind, em in row["em_by"].items()}
        columns = {"stage": row["stage"], "EM": row["em"], "F1": row["f1"], **kinds}
        columns |= {name: row[name] for name in ("searches", "answered")} | edges
        rows.append(columns | {"minutes": f"{row['time_s'] / 60:.1f}"})
    n = evaluations[0]["n"]
    print(f"\n{n} test questions; edge: the teacher's; control: with another question's reference")
    print_table(rows)

    told = [row for row in read_jsonl(folder / "trajectories.jsonl") if row["kind"] == "eval"]
    # told[:n] is the first test, and told[-n:] the last. One that became right, by most searches.
    gain = lambda both: (both[1]["em"] - both[0]["em"], len(both[1]["queries"]))
    for title, row in zip(("before", "after"), max(zip(told[:n], told[-n:]), key=gain)):
        text = "".join(text for _, text in row["text"]).strip()
        answers = " / ".join(row["golden_answers"])
        print(printable(f"\n{title}: {row['question']}  (answer: {answers})\n{text}"))
    print(f"\nmetrics, trajectories and the model are in {folder}")

def main() -> None:
    parser = Parser(description="Evaluate a model with its searches, greedily.")
    parser.add_argument("--model", required=True, help="a model folder or hub name")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--questions", help="JSON lines, or hub/dataset:config:split")
    asked.add_argument("--benchmarks", help=f"all, or some of {','.join(BENCHMARKS)}")
    data = "of --benchmarks: a folder with SET/questions.jsonl, SET/corpus.jsonl (default: the hub)"
    parser.add_argument("--data", help=data)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--corpus", help="passages; CORPUS.bm25 may be their saved index")
    where.add_argument("--retriever-url", help="a server with Search-R1's protocol")
    parser.add_argument("--limit", type=int, help="only the first so many questions of a set")
    parser.add_argument("--k", type=int, default=3, help="passages a search")
    parser.add_argument("--max-searches", type=int, default=4, help="searches a question")
    parser.add_argument("--out", help="write the results, and what made them, to this JSON file")
    args = parser.parse_args()
    if min(args.k, args.max_searches + 1, 1 if args.limit is None else args.limit) < 1:
        parser.error("--limit and --k are at least 1, --max-searches at least 0")

    # places: set -> (questions, corpus). All are read or found before the slow model loads.
    places = {args.questions: (args.questions, None)}
    if args.benchmarks is not None:
        names = BENCHMARKS if args.benchmarks == "all" else args.benchmarks.split(",")
        if not {*names} <= {*BENCHMARKS}:
            parser.error(f"--benchmarks takes all, or some of {','.join(BENCHMARKS)}")
        places = {name: files_of(args.data, name) for name in names}
    sets = {name: load_questions(spec)[: args.limit] for name, (spec, _) in places.items()}
    url = args.retriever_url
    shared = RemoteRetriever(url) if url else open_index(args.corpus) if args.corpus else None
    for name, (_, corpus) in places.items():
        if not shared and not (corpus and Path(corpus).is_file()):
            parser.error(f"no corpus for {name}: give --corpus, --retriever-url or --data")
    if args.out:
        Path(args.out).touch()  # hours later is late to learn that it cannot be written

    model, tokenizer = load_model(args.model)
    done = vars(args) | {"prompt": standard_prompt(tokenizer, "{question}"), "results": {}}
    for name, questions in sets.items():
        index = shared or open_index(places[name][1])
        how = dict(k=args.k, max_searches=args.max_searches, progress=name)
        row = evaluate(model, tokenizer, index, questions, **how)
        done["results"][name] = row | {"em_interval": interval(row["em"], row["n"])}
        if args.out:  # after each set, so that a run that dies has lost one set
            Path(args.out).write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    if args.benchmarks:
        print_results(done["results"])
    else:
        print(json.dumps(done["results"][args.questions], indent=2))

def files_of(data: str | None, name: str) -> tuple[str, str | None]:
    """Questions and corpus of a benchmark: in a folder, or FlashRAG's on the hub and no corpus."""
    if not data:
        return f"RUC-NLPIR/FlashRAG_datasets:{name}:{BENCHMARKS[name]}", None
    plain = [Path(data, name, f"{kind}.jsonl") for kind in ("questions", "corpus")]
    return tuple(str(path if path.is_file() else f"{path}.gz") for path in plain)

if __name__ == "__main__":
    from micro.lessons import eval_lesson
    run_script(main if sys.argv[1:] else eval_lesson)
