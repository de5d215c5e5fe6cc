"""Evaluation: questions in, exact match out.

The policy answers each question once, greedily, with its searches; the answer between its
tags is compared with the golden answers. Exact match is also the reward of GRPO.

Equations (SQuAD's; norm = lower case, no ASCII punctuation, no articles, single spaces)

    em(a, G) = max over g in G of [norm(a) = norm(g)]
    f1(a, G) = max over g in G of 2 p r / (p + r),   p, r: precision and recall of words, as bags
    supported(y): norm(a) stands, as whole words, in a passage that y itself retrieved

Deviations from the paper
    1. F1 and the supported share are reported beside EM; the paper reports EM.
    2. The reward is EM alone, of the answer parsed from the response: Search-R1's scorer reads
       the prompt too, and finds its example answer there.

    python eval.py                # a table, and the worst answers
    python eval.py --model micro/model --questions micro/test.jsonl --corpus micro/corpus.jsonl   # 20 s
"""

import json
import re
import string
import subprocess
import sys
from collections import Counter
from math import sqrt
from pathlib import Path
from statistics import mean

from datasets import load_dataset

from retriever import BadInput, Parser, RemoteRetriever, at_least, encodable, open_index, printable, read_jsonl, run_script
from rollout import Trajectory, load_model, rollout, standard_prompt


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation; accents and other Unicode stay as they are.

    >>> normalize_answer("  The U.S.A.,  a country")
    'usa country'
    """
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str | None, golden_answers: list[str]) -> float:
    """1.0 if the normalised prediction is one of the normalised golden answers, else 0.0; a
    prediction that is None, or empty once normalised, is wrong.

    >>> exact_match("the Beatles!", ["Rolling Stones", "Beatles"])
    1.0
    """
    given = normalize_answer(prediction or "")
    return float(given != "" and any(given == normalize_answer(golden) for golden in golden_answers))


def f1_score(prediction: str | None, golden_answers: list[str]) -> float:
    """Overlap of words, the best over the golden answers.

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


def load_questions(spec: str) -> list[dict]:
    """Questions as dicts with at least id, question, golden_answers.

    spec: a JSON-lines file, plain or .gz, or hub/dataset:config:split (FlashRAG's, say:
    RUC-NLPIR/FlashRAG_datasets:nq:test). Raises BadInput for a missing file, an empty set, or
    a row without a question or without answers (named by file and line).
    """
    if Path(spec).exists() or spec.count(":") != 2:
        rows = read_jsonl(spec)
    else:
        name, config, split = spec.split(":")
        try:
            rows = [(f"{spec}, row {i}", dict(row)) for i, row in enumerate(load_dataset(name, config, split=split))]
        except Exception as error:  # no network, no such set, no such split: all end here
            raise BadInput(f"cannot load {spec} from the hub: {error}") from None
    questions = []
    for where, row in rows:
        asked, answers = row.get("question"), row.get("golden_answers")
        if not isinstance(asked, str) or not asked.strip():
            raise BadInput(f'{where}: "question" is missing or empty')
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise BadInput(f'{where}: "golden_answers" must be a list of at least one non-empty string')
        questions.append({**row, "id": str(row.get("id", len(questions))), "question": encodable(asked), "golden_answers": [*map(encodable, answers)]})
    if not questions:
        raise BadInput(f"{spec}: no questions in it")
    return questions


def load_mixture(specs: str, test_set: list[dict]) -> list[dict]:
    """Training questions of one spec or of several with commas between them. Raises BadInput where
    one of them is a test question (letter case, punctuation and articles aside)."""
    asked = {normalize_answer(row["question"]) for row in test_set}
    mixture = []
    for spec in [specs] if Path(specs).exists() else specs.split(","):
        questions = load_questions(spec)
        shared = [row["question"] for row in questions if normalize_answer(row["question"]) in asked]
        if shared:
            raise BadInput(f"{spec}: {len(shared)} training questions are test questions, such as {shared[0]!r}: remove them there")
        mixture += questions
    return mixture


def rewards_of(questions: list[dict], trajectories: list[Trajectory]) -> list[float]:
    """Exact match of each trajectory; they are question-major, as rollout() returns them."""
    size = len(trajectories) // len(questions)
    return [exact_match(t.answer, questions[i // size]["golden_answers"]) for i, t in enumerate(trajectories)]


def score(questions: list[dict], trajectories: list[Trajectory]) -> dict:
    """Metrics of one trajectory a question: em, f1, em_supported (right and supported), searches
    a question, answered (share), n; and em_by, EM for each number of "hops" or else "type"."""
    ems = [exact_match(t.answer, q["golden_answers"]) for q, t in zip(questions, trajectories, strict=True)]
    groups: dict[str, list[float]] = {}
    for question, em in zip(questions, ems):
        kind = f"{question['hops']}-hop" if "hops" in question else question.get("type")
        if kind is not None:
            groups.setdefault(str(kind), []).append(em)
    return {
        "em": mean(ems),
        "f1": mean(f1_score(t.answer, q["golden_answers"]) for q, t in zip(questions, trajectories)),
        "em_supported": mean(em * supported(t) for em, t in zip(ems, trajectories)),
        "searches": mean(len(t.queries) for t in trajectories),
        "answered": mean(float(t.answer is not None) for t in trajectories),
        "n": len(ems),
        "em_by": {kind: mean(group) for kind, group in sorted(groups.items())},
    }


def evaluate(model, tokenizer, retriever, questions: list[dict], *, temperature: float = 0.0, **sampling) -> dict:
    """score() of one rollout a question; greedy unless a temperature is given. sampling: any
    keyword of rollout() (k, max_searches, seed, prompts, ...)."""
    asked = [question["question"] for question in questions]
    return score(questions, rollout(model, tokenizer, retriever, asked, temperature=temperature, **sampling))


# ---------------------------------------------------------------- the seven benchmarks

# The sets of the paper, the split that Search-R1 tests on (test, else dev), under FlashRAG's names.
BENCHMARKS = {
    "nq": "test", "triviaqa": "test", "popqa": "test",
    "hotpotqa": "dev", "2wikimultihopqa": "dev", "musique": "dev", "bamboogle": "test",
}  # fmt: skip
SINGLE_HOP = ("nq", "triviaqa", "popqa")
# EM as published, Qwen2.5-3B, in the order of BENCHMARKS. Search-E1's row is put together from the gains it reports.
PUBLISHED = {
    "Search-R1 GRPO (instruct)": (0.397, 0.565, 0.391, 0.331, 0.310, 0.124, 0.232),
    "AutoRefine (base)": (0.467, 0.620, 0.450, 0.405, 0.393, 0.157, 0.344),
    "GiGPO (instruct)": (0.420, 0.595, 0.424, 0.369, 0.370, 0.126, 0.641),
    "Search-E1": (0.474, 0.626, 0.461, 0.427, 0.436, 0.193, 0.464),
}


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n; it stays within 0 and 1.

    >>> [round(x, 3) for x in interval(0.464, 125)]
    [0.379, 0.551]
    """
    z2 = 1.96**2
    centre, half = share + z2 / (2 * n), 1.96 * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def averages(results: dict[str, dict]) -> dict[str, float]:
    """Mean EM over sets, each set counting once, as the paper takes it; of the sets that are there."""
    parts = {"single-hop": SINGLE_HOP, "multi-hop": [name for name in BENCHMARKS if name not in SINGLE_HOP], "average": BENCHMARKS}
    return {part: mean(results[name]["em"] for name in names if name in results) for part, names in parts.items() if {*names} & {*results}}


def in_folder(folder: str, name: str) -> str:
    """folder/name.jsonl, or .gz if that is there."""
    plain, packed = Path(folder) / f"{name}.jsonl", Path(folder) / f"{name}.jsonl.gz"
    return str(packed if packed.is_file() and not plain.is_file() else plain)


def find_questions(name: str, data: str | None) -> str:
    """A benchmark as load_questions takes it: from a folder, else FlashRAG's from the hub."""
    return in_folder(f"{data}/{name}", "questions") if data else f"RUC-NLPIR/FlashRAG_datasets:{name}:{BENCHMARKS[name]}"


def print_table(results: dict[str, dict], published: bool) -> None:
    """A line a set, then the averages; published: the rows of others below, EM only."""
    print(f"{'set':18}{'EM':>7}{'95 %':>15}{'F1':>7}{'searches':>10}{'answered':>10}{'n':>7}")
    for name, row in results.items():
        low, high = row["em_interval"]
        print(f"{name:18}{row['em']:7.3f}{f'{low:.3f}-{high:.3f}':>15}{row['f1']:7.3f}"
              f"{row['searches']:10.2f}{row['answered']:10.3f}{row['n']:7d}")  # fmt: skip
    for part, value in averages(results).items():
        print(f"{part:18}{value:7.3f}")
    if published:
        print(f"\n{'EM as published, Qwen2.5-3B':28}" + "".join(f"{name[:10]:>11}" for name in BENCHMARKS) + f"{'average':>9}")
        for name, row in PUBLISHED.items():
            print(f"{name:28}" + "".join(f"{em:11.3f}" for em in row) + f"{mean(row):9.3f}")


def report(folder: Path, evaluations: list[dict]) -> None:
    """The table of a training run, and one of its questions before and after."""
    kinds = sorted({kind for row in evaluations for kind in row["em_by"]})
    print(f"\n{evaluations[0]['n']} test questions, greedy; edge: the teacher's, sampled, before the stage")
    print(f"{'stage':8}{'EM':>8}{'F1':>8}" + "".join(f"{'EM ' + kind:>{len(kind) + 5}}" for kind in kinds)
          + f"{'searches':>10}{'answered':>10}{'edge':>8}{'supported':>11}{'minutes':>9}")  # fmt: skip
    for row in evaluations:
        edges = [f"{row[name]:+.3f}" if row.get(name) is not None else "" for name in ("edge", "edge_supported")]
        print(f"{row['stage']:8}{row['em']:8.3f}{row['f1']:8.3f}"
              + "".join(f"{row['em_by'].get(kind, float('nan')):{len(kind) + 5}.3f}" for kind in kinds)
              + f"{row['searches']:10.2f}{row['answered']:10.3f}{edges[0]:>8}{edges[1]:>11}{row['time_s'] / 60:9.1f}")  # fmt: skip
    rows = [row for _, row in read_jsonl(folder / "trajectories.jsonl") if row["kind"] == "eval"]
    before, after = ([row for row in rows if row["stage"] == evaluations[i]["stage"]] for i in (0, -1))
    # The longest road to a right answer among those that went wrong before, if there is one.
    chosen = max(range(len(after)), key=lambda i: (after[i]["em"] - before[i]["em"], len(after[i]["queries"])))
    for title, row in (("before", before[chosen]), ("after", after[chosen])):
        print(printable(f"\n{title}: {row['question']}  (answer: {' / '.join(row['golden_answers'])})"))
        print(printable("".join(text for _, text in row["text"]).strip()))
    print(f"\nmetrics, trajectories and the model are in {folder}")


def commit() -> str:
    """The commit of this code, with a + where files differ from it; empty outside a repository."""
    how = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], **how).stdout.strip()
        return found + "+" * bool(found and subprocess.run(["git", "diff", "--quiet", "HEAD"], **how).returncode)
    except OSError:
        return ""  # no git


def main() -> None:
    parser = Parser(description="Evaluate a model with its searches, greedily.")
    parser.add_argument("--model", required=True, help="a model folder or hub name")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--questions", help="JSON lines, plain or .gz, or hub/dataset:config:split")
    asked.add_argument("--benchmarks", help=f"all, or some of {','.join(BENCHMARKS)}")
    parser.add_argument("--data", help="folder with SET/questions.jsonl[.gz] and SET/corpus.jsonl[.gz] for --benchmarks (default: the hub)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--corpus", help="JSON lines of passages, plain or .gz; CORPUS.bm25 is their saved index, if it is newer")
    where.add_argument("--retriever-url", help="a server that speaks Search-R1's protocol, in place of a corpus")
    parser.add_argument("--on-search-failure", choices=("nothing", "stop"), default="nothing", help="of a server, when it was asked again")
    parser.add_argument("--limit", type=at_least(1), help="only the first so many questions of a set")
    parser.add_argument("--k", type=at_least(1), default=3, help="passages a search")
    parser.add_argument("--max-searches", type=at_least(0), default=4, help="searches a question")
    parser.add_argument("--published", action="store_true", help="print the published results beside them")
    parser.add_argument("--out", help="write the results, and what they were made with, to this JSON file")
    args = parser.parse_args()
    names = list(BENCHMARKS) if args.benchmarks == "all" else (args.benchmarks or "").split(",")
    if args.benchmarks and not {*names} <= {*BENCHMARKS}:
        parser.error(f"--benchmarks: {', '.join(sorted({*names} - {*BENCHMARKS}))}? There are {', '.join(BENCHMARKS)}, and all")
    if not args.retriever_url and not args.corpus and not (args.benchmarks and args.data):
        parser.error("where to search? Give --corpus, --retriever-url, or --benchmarks with --data")
    # Every set is read before the first is answered: hours later is late for a missing file.
    specs = {name: find_questions(name, args.data) for name in names} if args.benchmarks else {args.questions: args.questions}
    loaded = {name: load_questions(spec)[: args.limit] for name, spec in specs.items()}
    corpora = {name: None if args.retriever_url else args.corpus or in_folder(f"{args.data}/{name}", "corpus") for name in specs}
    if missing := [corpus for corpus in corpora.values() if corpus and not Path(corpus).is_file()]:
        raise BadInput(f"no such file: {missing[0]}")
    model, tokenizer = load_model(args.model)
    shared = RemoteRetriever(args.retriever_url, on_failure=args.on_search_failure) if args.retriever_url else open_index(args.corpus) if args.corpus else None
    made_with = {
        "model": args.model, "retriever": args.retriever_url or "BM25", "k": args.k, "max_searches": args.max_searches,
        "prompt": standard_prompt(tokenizer, "{question}"), "temperature": 0, "limit": args.limit,
        "commit": commit() if args.out else "",
    }  # fmt: skip
    results = {}
    for name, questions in loaded.items():
        how = dict(k=args.k, max_searches=args.max_searches, progress=name)
        row = evaluate(model, tokenizer, shared or open_index(corpora[name]), questions, **how)
        row["em_interval"] = interval(row["em"], row["n"])
        row["failed_searches"] = getattr(shared, "failed", 0) - sum(done["failed_searches"] for done in results.values())
        results[name] = row | {"questions": specs[name], "corpus": corpora[name]}
        if args.out:  # after each set, so that a run that dies has lost one set
            text = json.dumps(made_with | {"results": results, "averages": averages(results)}, indent=2)
            Path(args.out).write_text(text + "\n", encoding="utf-8")
    if args.benchmarks:
        print_table(results, args.published)
    else:
        print(json.dumps(next(iter(results.values())), indent=2))


def lesson() -> None:
    """micro/model on the first 60 test questions: the table, and where it went wrong."""
    folder = Path(__file__).parent / "micro"
    model, tokenizer = load_model(str(folder / "model"))
    questions = load_questions(str(folder / "test.jsonl"))[:60]
    asked = [question["question"] for question in questions]
    trajectories = rollout(model, tokenizer, open_index(folder / "corpus.jsonl"), asked, temperature=0.0)
    row = score(questions, trajectories)
    print_table({"micro": row | {"em_interval": interval(row["em"], row["n"])}}, published=False)
    print("EM " + ", ".join(f"{kind} {em:.3f}" for kind, em in row["em_by"].items()) + f"; right and supported by a passage: {row['em_supported']:.3f}")
    wrong = [i for i, em in enumerate(rewards_of(questions, trajectories)) if not em]
    print(f"\nThe worst of {len(wrong)} wrong ones, by searches spent:\n")
    for i in sorted(wrong, key=lambda i: -len(trajectories[i].queries))[:5]:
        print(printable(f"{asked[i]}\n    searched: {'; '.join(trajectories[i].queries)}\n"
                        f"    said: {trajectories[i].answer}   right: {questions[i]['golden_answers'][0]}"))  # fmt: skip
    print("\nYour own: python eval.py --help")


if __name__ == "__main__":
    run_script(main if sys.argv[1:] else lesson)
