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

    python eval.py --model micro/model --questions micro/test.jsonl --corpus micro/corpus.jsonl   # 20 s
"""

import json
import re
import string
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

from datasets import load_dataset

from retriever import BadInput, Parser, RemoteRetriever, at_least, open_index, read_jsonl, run_script
from rollout import Trajectory, load_model, rollout


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
        questions.append({**row, "id": str(row.get("id", len(questions)))})
    if not questions:
        raise BadInput(f"{spec}: no questions in it")
    return questions


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


def main() -> None:
    parser = Parser(description="Evaluate a model with its searches, greedily.")
    parser.add_argument("--model", required=True, help="a model folder or hub name")
    parser.add_argument("--questions", required=True, help="JSON lines, plain or .gz, or hub/dataset:config:split")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--corpus", help="JSON lines of passages, plain or .gz; CORPUS.bm25 is their saved index, if it is newer")
    where.add_argument("--retriever-url", help="a server that speaks Search-R1's protocol, in place of a corpus")
    parser.add_argument("--limit", type=at_least(1), help="only the first so many questions")
    parser.add_argument("--k", type=at_least(1), default=3, help="passages a search")
    parser.add_argument("--max-searches", type=at_least(0), default=4, help="searches a question")
    args = parser.parse_args(sys.argv[1:] or ["--help"])
    questions = load_questions(args.questions)[: args.limit]
    retriever = RemoteRetriever(args.retriever_url) if args.retriever_url else open_index(args.corpus)
    model, tokenizer = load_model(args.model)
    result = evaluate(
        model, tokenizer, retriever, questions, k=args.k, max_searches=args.max_searches, progress="evaluation"
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_script(main)
