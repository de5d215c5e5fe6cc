"""How fast is BM25 in numpy? Side by side with bm25s (numpy, numba) and rank_bm25.

    pip install bm25s numba rank_bm25
    python -m bench.bm25                              # the micro corpus; half a minute
    python -m bench.bm25 --corpus corpus.jsonl.gz --questions a.jsonl.gz b.jsonl.gz

Building: each engine in a process of its own, from the file to an index that answers,
at a quarter, a half and the whole of the corpus. Peak memory is the largest resident
size above that before the build. Bytes a posting are those of the saved index without
the text of the passages.

Queries: all engines in this process, taking turns, --repeats times; medians. All get
the same words (words() of retriever.py), k1, b and k, and splitting a query into words
is in everyone's time. bm25s runs its method lucene on one thread. rank_bm25 has no
Lucene formula (its BM25Okapi is timed). It is slow, so it gets --few questions only.

Equality: for every question, every score of ours against that of bm25s, and the best k:
equal up to ties.
"""

import argparse
import importlib
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from bench.memory import resident
from machinery.json_lines import read_jsonl
from machinery.passages import to_passage
from machinery.questions import load_questions
from retriever import BM25, words

K1 = 0.9
B = 0.4
K = 3


# ----------------------------------------------------------------- the engines


class Ours:
    """BM25 of retriever.py."""

    module = "numpy"

    def __init__(self, passages):
        self.index = BM25(passages, K1, B)

    def ask(self, questions: list[str]) -> None:
        self.index.search(questions, K)

    def scores(self, question: str) -> np.ndarray:
        return self.index.scores(question)


class Bm25s:
    """bm25s with its back end of numpy."""

    module = "bm25s"
    backend = "numpy"

    def __init__(self, passages):
        bm25s = importlib.import_module("bm25s")
        self.index = bm25s.BM25(method="lucene", k1=K1, b=B, backend=self.backend)
        self.index.index([words_of(p) for p in passages], show_progress=False)

    def ask(self, questions: list[str]) -> None:
        split = [words(question) for question in questions]
        self.index.retrieve(split, k=K, show_progress=False, n_threads=0)

    def scores(self, question: str) -> np.ndarray:
        if not words(question):
            return np.zeros(self.index.scores["num_docs"])
        return self.index.get_scores(words(question))


class Bm25sNumba(Bm25s):
    """bm25s with its back end of numba, which compiles at the first question."""

    module = "numba"
    backend = "numba"


class RankBm25:
    """rank_bm25, in another formula."""

    module = "rank_bm25"

    def __init__(self, passages):
        rank_bm25 = importlib.import_module("rank_bm25")
        self.index = rank_bm25.BM25Okapi([words_of(p) for p in passages], k1=K1, b=B)
        self.numbers = range(self.index.corpus_size)

    def ask(self, questions: list[str]) -> None:
        for question in questions:
            self.index.get_top_n(words(question), self.numbers, n=K)


ENGINES = {
    "ours": Ours,
    "bm25s numpy": Bm25s,
    "bm25s numba": Bm25sNumba,
    "rank_bm25": RankBm25,
}


def installed() -> dict[str, type]:
    """The engines that can be imported here."""
    engines = {}
    for name, engine in ENGINES.items():
        try:
            importlib.import_module(engine.module)
        except ImportError:
            print(f"{name} is skipped: {engine.module} is not installed")
        else:
            engines[name] = engine
    return engines


def read_corpus(path):
    """The passages of a file, one after another."""
    return read_jsonl(path, to_passage)


def words_of(passage) -> list[str]:
    """The words of a passage and its title."""
    return words(f"{passage.title} {passage.text}")


# ----------------------------------------------------------------- building


class Build(NamedTuple):
    """What one build took: seconds, and bytes."""

    seconds: float
    peak: int
    saved: int  # 0 for an engine that cannot be saved
    without_text: int


def measure(engine: type, corpus: str, count: int) -> Build:
    """Build from the first passages of a corpus. It is called in a fresh process."""
    if engine is not Ours:
        engine(islice(read_corpus(corpus), 2))  # its imports are not the build's
    before = resident("VmRSS")
    began = time.perf_counter()
    index = engine(islice(read_corpus(corpus), count)).index
    seconds = time.perf_counter() - began
    saved = 0
    without_text = 0
    if hasattr(index, "save"):
        with tempfile.TemporaryDirectory() as folder:
            index.save(folder)
            saved = bytes_in(folder)
            without_text = saved
        if isinstance(index, BM25):
            without_text -= index.texts.nbytes
    return Build(seconds, resident("VmHWM") - before, saved, without_text)


def bytes_in(folder) -> int:
    """The bytes of all files in a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in paths)


def compare_building(engines: dict[str, type], corpus: str) -> None:
    """Build at three sizes, and print what each took."""
    count = 0
    postings = 0
    for passage in read_corpus(corpus):
        count += 1
        postings += len(set(words_of(passage)))
    print(f"{count} passages, {postings} postings (pairs of passage and word)")
    print(f"\n{'build':16}{'passages':>10}{'seconds':>9}{'peak MB':>9}", end="")
    print(f"{'saved MB':>10}{'peak/saved':>12}{'bytes a posting':>17}")
    for part in (4, 2, 1):
        for name, engine in engines.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                build = pool.submit(measure, engine, corpus, count // part).result()
            line = f"{name:16}{count // part:10}"
            line += f"{build.seconds:9.2f}{build.peak / 1e6:9.0f}"
            if build.saved:
                line += f"{build.saved / 1e6:10.0f}{build.peak / build.saved:12.2f}"
            if build.saved and part == 1:
                line += f"{build.without_text / postings:17.1f}"
            print(line, flush=True)


# ----------------------------------------------------------------- queries


def compare_scores(ours: Ours, peer: Bm25s, questions: list[str]) -> None:
    """Every score and every ranking of two engines; prints what differs."""
    largest = 0.0
    different = 0
    for question in questions:
        expected = peer.scores(question)
        largest = max(largest, float(np.abs(ours.scores(question) - expected).max()))
        # Up to ties: at each rank a passage whose score there is that rank's.
        best = np.sort(expected[expected > 0])[::-1][:K]
        scores = [passage.score for passage in ours.index.search([question], K)[0]]
        if len(scores) != len(best) or not np.allclose(scores, best, atol=1e-4, rtol=0):
            different += 1
    print(
        f"\n{len(questions)} questions: largest difference of a score to bm25s", end=""
    )
    print(f" {largest:.1e}, rankings that differ beyond ties {different}")


def rate(engine, questions: list[str], size: int) -> float:
    """Questions a second, asked in batches of a size."""
    began = time.perf_counter()
    for start in range(0, len(questions), size):
        engine.ask(questions[start : start + size])
    return len(questions) / (time.perf_counter() - began)


def compare_queries(engines: dict[str, type], args) -> None:
    """Ask all engines in turns, and print how fast each answers."""
    questions = []
    for path in args.questions:
        questions += [question["question"] for question in load_questions(path)]
    built = {}
    for name, engine in engines.items():
        built[name] = engine(read_corpus(args.corpus))
        built[name].ask(questions[:2])  # numba compiles here
    if "bm25s numpy" in built:
        compare_scores(built["ours"], built["bm25s numpy"], questions)

    rates = {(name, size): [] for size in (1, 64) for name in built}
    for _ in range(args.repeats):
        for name, size in rates:
            asked = questions[: args.few] if name == "rank_bm25" else questions
            rates[name, size].append(rate(built[name], asked, size))

    print(f"\n{'queries a second':16}{'one by one':>12}{'range':>15}", end="")
    print(f"{'batches of 64':>15}{'range':>15}{'ours is faster by':>20}")
    for name in built:
        single = rates[name, 1]
        batches = rates[name, 64]
        faster = median(rates["ours", 1]) / median(single)
        faster_in_batches = median(rates["ours", 64]) / median(batches)
        print(f"{name:16}{median(single):12.0f}{extent(single):>15}", end="")
        print(f"{median(batches):15.0f}{extent(batches):>15}", end="")
        print(f"{faster:13.2f}, {faster_in_batches:.2f}")


def extent(values: list[float]) -> str:
    """The lowest and the highest of some values."""
    return f"{min(values):.0f}-{max(values):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="BM25 in numpy, side by side.")
    parser.add_argument("--corpus", default="micro/corpus.jsonl")
    parser.add_argument("--questions", nargs="+", default=["micro/validation.jsonl"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--few", type=int, default=20, help="questions for rank_bm25")
    args = parser.parse_args()
    engines = installed()
    print(f"{os.cpu_count()} cores, numpy {np.__version__}")
    compare_building(engines, args.corpus)
    compare_queries(engines, args)


if __name__ == "__main__":
    main()
