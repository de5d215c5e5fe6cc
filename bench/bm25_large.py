"""How does BM25 grow with its corpus? Time and memory of building, time of a query.

    python -m bench.bm25_large                                    # made of micro's
    python -m bench.bm25_large --corpus corpus.jsonl.gz --questions questions.jsonl.gz

Passages are made out of real ones: the title and the first half of one, and the second
half of another, both drawn at random. So words are as frequent as in the real passages,
but no new word ever comes. Each size is a process of its own. The time to make passages
is not counted. Peak memory is the largest resident size above that before the build.
(Linux only.)

Times are of the processor, so that other programs change them little. Questions are
asked one by one, in one thread, and then by two threads that share the index: numpy
lets another thread run while it adds. The last column says how much faster two were by
the clock, which needs two idle cores.
"""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from bench.memory import resident
from machinery.passages import Passage, load_corpus
from machinery.questions import load_questions
from machinery.terminal import Parser, run_script
from retriever import BM25

K = 3
SIZES = [100_000, 500_000, 2_000_000]


class Growth(NamedTuple):
    """What one size took: seconds to build and for a query, and bytes at the peak."""

    build: float
    peak: int
    query: float
    gain: float  # how much faster two threads were


def split(text: str) -> tuple[str, str]:
    """The two halves of a text, by words.

    >>> split("a b c d e")
    ('a b', 'c d e')
    """
    words = text.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def make_passages(corpus: list[Passage], count: int) -> Iterator[Passage]:
    """Halves of real passages, joined at random: always the same ones."""
    rng = random.Random(0)
    halves = [split(passage.text) for passage in corpus]
    for number in range(count):
        first = rng.randrange(len(corpus))
        second = rng.randrange(len(corpus))
        text = f"{halves[first][0]} {halves[second][1]}"
        yield Passage(str(number), corpus[first].title, text)


def measure(path: str, count: int, questions: list[str]) -> Growth:
    """Build and ask once. It is called in a fresh process."""
    corpus = load_corpus(path)
    began = time.process_time()
    for _ in make_passages(corpus, count):
        pass
    making = time.process_time() - began

    before = resident("VmRSS")
    began = time.process_time()
    index = BM25(make_passages(corpus, count))
    build = time.process_time() - began - making
    peak = resident("VmHWM") - before

    def ask(question: str) -> None:
        index.search([question], K)

    began = time.process_time()
    by_the_clock = time.perf_counter()
    for question in questions:
        ask(question)
    alone = time.perf_counter() - by_the_clock
    query = (time.process_time() - began) / len(questions)

    with ThreadPoolExecutor(2) as pool:
        by_the_clock = time.perf_counter()
        list(pool.map(ask, questions))
        together = time.perf_counter() - by_the_clock
    return Growth(build, peak, query, alone / together)


def main() -> None:
    parser = Parser(description="BM25, as the corpus grows.")
    parser.add_argument("--corpus", default="micro/corpus.jsonl")
    parser.add_argument("--questions", default="micro/validation.jsonl")
    parser.add_argument("--count", type=int, default=200, help="questions to ask")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    args = parser.parse_args()
    loaded = load_questions(args.questions)[: args.count]
    questions = [question["question"] for question in loaded]
    print(f"{args.corpus}, {len(questions)} questions of {args.questions}, k = {K}")
    print(f"{'':10}{'build, µs':>12}{'peak, KB':>12}{'ms':>9}", end="")
    print(f"{'ms a million':>14}{'two threads':>13}")
    print(f"{'passages':10}{'a passage':>12}{'a passage':>12}{'a query':>9}", end="")
    print(f"{'passages':>14}{'faster by':>13}")
    for size in args.sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            grown = pool.submit(measure, args.corpus, size, questions).result()
        print(f"{size:<10}{grown.build / size * 1e6:12.1f}", end="")
        print(f"{grown.peak / size / 1e3:12.2f}{grown.query * 1e3:9.2f}", end="")
        print(f"{grown.query / size * 1e9:14.2f}{grown.gain:13.2f}", flush=True)


if __name__ == "__main__":
    run_script(main)
