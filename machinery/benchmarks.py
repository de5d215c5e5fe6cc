"""What eval.py is asked for: its flags, its sets of questions, its file of results."""

import json
import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from machinery.devices import ARITHMETICS, DEVICES
from machinery.errors import BadInput
from machinery.questions import load_questions
from machinery.terminal import Parser

# The seven benchmarks of the paper, by FlashRAG's names, and the split of each that
# Search-R1 tests on.
BENCHMARKS = {
    "nq": "test",
    "triviaqa": "test",
    "popqa": "test",
    "hotpotqa": "dev",
    "2wikimultihopqa": "dev",
    "musique": "dev",
    "bamboogle": "test",
}
SINGLE_HOP = ("nq", "triviaqa", "popqa")
MULTI_HOP = ("hotpotqa", "2wikimultihopqa", "musique", "bamboogle")


@dataclass
class QuestionSet:
    """One set of questions. corpus: a file of its own, or None if all share one."""

    name: str
    questions: list[dict]
    corpus: str | None


def parse_flags() -> Namespace:
    """The flags of `python eval.py`. What is wrong with them ends in one line."""
    parser = Parser(description="Evaluate a model with its searches, greedily.")
    parser.add_argument("--model", required=True, help="a model folder or hub name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--questions", help="JSON lines, or hub/dataset:config:split")
    source.add_argument("--benchmarks", help=f"all, or some of {','.join(BENCHMARKS)}")
    parser.add_argument(
        "--data",
        help="for --benchmarks: a folder with SET/questions.jsonl and SET/corpus.jsonl "
        "(default: the questions on the hub, which have no corpus)",
    )
    search = parser.add_mutually_exclusive_group()
    search.add_argument(
        "--corpus", help="passages; CORPUS.bm25 may be their saved index"
    )
    search.add_argument("--retriever-url", help="a server with Search-R1's protocol")
    parser.add_argument("--limit", type=int, help="only the first so many of each set")
    parser.add_argument(
        "--k", type=int, help="passages a search (default: as it was trained, or 3)"
    )
    parser.add_argument(
        "--max-searches",
        type=int,
        help="searches a question (default: as it was trained, or 4)",
    )
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument(
        "--arithmetic",
        default="auto",
        choices=ARITHMETICS,
        help="precision of matrix products",
    )
    parser.add_argument("--out", help="write results, and what made them, to this file")
    if len(sys.argv) == 1:
        raise BadInput(
            "usage: python eval.py --model M --questions Q --corpus C, or --help; "
            "the lesson is python -m lessons.evaluation"
        )
    flags = parser.parse_args()
    if flags.limit is not None and flags.limit < 1:
        parser.error("--limit must be at least 1")
    if flags.k is not None and flags.k < 1:
        parser.error("--k must be at least 1")
    if flags.max_searches is not None and flags.max_searches < 0:
        parser.error("--max-searches must be at least 0")
    if flags.data and flags.questions:
        parser.error("--data is for --benchmarks: with --questions give --corpus")
    return flags


def trained_limits(flags: Namespace, tokenizer) -> dict[str, int]:
    """The keywords of rollout() that a model of train.py was trained with.

    They stand in its tokenizer's files. A flag wins over them.
    """
    limits = {"k": 3, "max_searches": 4}
    limits.update(tokenizer.init_kwargs.get("search_limits", {}))
    if flags.k is not None:
        limits["k"] = flags.k
    if flags.max_searches is not None:
        limits["max_searches"] = flags.max_searches
    return limits


def question_sets(flags: Namespace) -> list[QuestionSet]:
    """The sets that the flags name, read. BadInput: a file or a corpus is missing."""
    if flags.benchmarks is None:
        questions = load_questions(flags.questions)
        sets = [QuestionSet(flags.questions, questions, corpus=None)]
    else:
        names = benchmark_names(flags.benchmarks)
        sets = [load_benchmark(name, flags.data) for name in names]
    for question_set in sets:
        if flags.limit is not None:
            question_set.questions = question_set.questions[: flags.limit]
        if flags.corpus or flags.retriever_url:
            continue
        if question_set.corpus is None or not Path(question_set.corpus).is_file():
            raise BadInput(
                f"no corpus for {question_set.name}: give --corpus or --retriever-url,"
                " or with --benchmarks --data, a folder that has SET/corpus.jsonl"
            )
    return sets


def benchmark_names(text: str) -> list[str]:
    """The names in --benchmarks, each once.

    >>> benchmark_names("musique,nq")
    ['musique', 'nq']
    """
    if text == "all":
        return list(BENCHMARKS)
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in BENCHMARKS:
            known = ",".join(BENCHMARKS)
            raise BadInput(f"--benchmarks takes all, or some of {known}: not {name!r}")
    return names


def load_benchmark(name: str, folder: str | None) -> QuestionSet:
    """A benchmark from folder/name, or without a folder FlashRAG's on the hub."""
    if not folder:
        spec = f"RUC-NLPIR/FlashRAG_datasets:{name}:{BENCHMARKS[name]}"
        return QuestionSet(name, load_questions(spec), corpus=None)
    questions = plain_or_packed(Path(folder, name, "questions.jsonl"))
    corpus = plain_or_packed(Path(folder, name, "corpus.jsonl"))
    return QuestionSet(name, load_questions(str(questions)), str(corpus))


def plain_or_packed(path: Path) -> Path:
    """The path, or path.gz if there is only that."""
    packed = path.with_name(f"{path.name}.gz")
    if packed.is_file() and not path.is_file():
        return packed
    return path


def check_out(path: str) -> None:
    """Raise OSError now if the results could not be written later. Changes nothing."""
    is_new = not os.path.lexists(path)
    # To open it is the test: a folder and a read-only file fail here. Appending nothing
    # leaves what earlier results the file may hold.
    with open(path, "a"):
        pass
    if is_new:
        Path(path).unlink()


def save_results(path: str, record: dict) -> None:
    """Write the record to the file as JSON. BadInput names the file if that fails."""
    text = json.dumps(record, indent=2) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:  # of a full disk Python names no file
        raise BadInput(f"cannot write the results to {path}: {error}") from error
