"""How fast is BM25 in numpy? Side by side with bm25s (numpy and numba back ends) and rank_bm25.

    pip install bm25s numba rank_bm25
    python bench/bm25.py                                   # the micro corpus; half a minute
    python bench/bm25.py --corpus corpus.jsonl.gz --questions questions.jsonl.gz more.jsonl.gz

Building: each way in a process of its own, from the file to an index that answers, at a quarter,
a half and the whole of the corpus. Peak memory is the largest resident size above that before
the build; bytes a posting are those of the saved index without the passages' text.

Queries: all ways in this process, taking turns, --repeats times, medians; splitting a query
into words is in everyone's time. All ways get the same words (words() of retriever.py), k1, b
and k. bm25s runs its method lucene on one thread; rank_bm25 has no Lucene formula (its BM25Okapi
is timed) and is slow, so it gets the first --few questions only.

Equality: for every question, every score of ours against bm25s's, and the best k: equal up to ties.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from bench.memory import resident  # noqa: E402
from eval import load_questions  # noqa: E402
from retriever import BM25, read_jsonl, to_passage, words  # noqa: E402

K1, B, K = 0.9, 0.4, 3


def read_corpus(path):
    """Its passages, one after another."""
    return read_jsonl(path, to_passage)


def build_ours(passages):
    return BM25(passages, K1, B)


def build_bm25s(passages, backend: str = "numpy"):
    import bm25s

    index = bm25s.BM25(method="lucene", k1=K1, b=B, backend=backend)
    index.index([words(f"{p.title} {p.text}") for p in passages], show_progress=False)
    return index


def build_numba(passages):
    return build_bm25s(passages, "numba")


def build_rank(passages):
    from rank_bm25 import BM25Okapi

    return BM25Okapi([words(f"{p.title} {p.text}") for p in passages], k1=K1, b=B)


def folder_bytes(folder, without: str = "") -> int:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.name != without)


def measure(build, corpus: str, count: int) -> dict:
    """In a fresh process: seconds, peak bytes, and what the saved index takes."""
    if build is not build_ours:
        build(islice(read_corpus(corpus), 2))  # its imports are not the build's
    before, began = resident("VmRSS"), time.perf_counter()
    index = build(islice(read_corpus(corpus), count))
    result = {"seconds": time.perf_counter() - began, "folder": 0, "index": 0}
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(index, "save"):
            index.save(folder)
            result["folder"] = folder_bytes(folder)
            result["index"] = folder_bytes(folder, without="texts.npy")
    return result | {"peak": resident("VmHWM") - before}


def building(args, ways: dict) -> None:
    count = sum(1 for _ in read_corpus(args.corpus))
    postings = sum(len({*words(f"{p.title} {p.text}")}) for p in read_corpus(args.corpus))
    print(f"{count} passages, {postings} postings (pairs of passage and word)")
    head = f"\n{'build':16}{'passages':>10}{'seconds':>9}{'peak MB':>9}{'saved MB':>10}"
    print(head + f"{'peak/saved':>12}{'bytes a posting':>17}")
    for part in (4, 2, 1):
        for name, build in ways.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                got = pool.submit(measure, build, args.corpus, count // part).result()
            line = f"{name:16}{count // part:10}{got['seconds']:9.2f}{got['peak'] / 1e6:9.0f}"
            if got["folder"]:
                line += f"{got['folder'] / 1e6:10.0f}{got['peak'] / got['folder']:12.2f}"
            if got["index"] and part == 1:
                line += f"{got['index'] / postings:17.1f}"
            print(line, flush=True)


def equality(ours: BM25, peer, questions: list[str]) -> None:
    """Every score and every ranking; raises nothing, prints what differs."""
    worst, different = 0.0, 0
    for question in questions:
        expected = peer.get_scores(words(question)) if words(question) else np.zeros(ours.size)
        worst = max(worst, float(np.abs(ours.scores(question) - expected).max()))
        best = np.sort(expected[expected > 0])[::-1][:K]
        found = ours.search([question], K)[0]
        # Up to ties: at each rank a passage whose score there is that rank's.
        got = [passage.score for passage in found]
        different += len(got) != len(best) or not np.allclose(got, best, atol=1e-4, rtol=0)
    print(f"\n{len(questions)} questions: largest difference of a score to bm25s {worst:.1e}, "
          f"rankings that differ beyond ties {different}")  # fmt: skip


def querying(args, ways: dict) -> None:
    questions = [row["question"] for path in args.questions for row in load_questions(path)]
    index = {name: build(read_corpus(args.corpus)) for name, build in ways.items()}
    if "bm25s numpy" in index:
        equality(index["ours"], index["bm25s numpy"], questions)

    def ask(name: str, batch: list[str]) -> None:
        if name == "ours":
            index[name].search(batch, K)
        elif name == "rank_bm25":
            for question in batch:
                index[name].get_top_n(words(question), range(index["ours"].size), n=K)
        else:
            split = [words(question) for question in batch]
            index[name].retrieve(split, k=K, show_progress=False, n_threads=0)

    def rate(name: str, size: int) -> float:
        asked = questions[: args.few] if name == "rank_bm25" else questions
        began = time.perf_counter()
        for i in range(0, len(asked), size):
            ask(name, asked[i : i + size])
        return len(asked) / (time.perf_counter() - began)

    for name in ways:
        ask(name, questions[:2])  # numba compiles here
    rates = {(name, size): [] for size in (1, 64) for name in ways}
    for _ in range(args.repeats):
        for name, size in rates:
            rates[name, size].append(rate(name, size))
    head = f"\n{'queries a second':16}{'one by one':>12}{'range':>15}"
    print(head + f"{'batches of 64':>15}{'range':>15}{'ours is faster by':>20}")
    for name in ways:
        line = f"{name:16}"
        for size, width in ((1, 12), (64, 15)):
            got = rates[name, size]
            line += f"{median(got):{width}.0f}{f'{min(got):.0f}-{max(got):.0f}':>15}"
        ours = {size: median(rates["ours", size]) for size in (1, 64)}
        ratios = [ours[size] / median(rates[name, size]) for size in (1, 64)]
        print(f"{line}{ratios[0]:13.2f}, {ratios[1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="BM25 in numpy, side by side.")
    parser.add_argument("--corpus", default="micro/corpus.jsonl")
    parser.add_argument("--questions", nargs="+", default=["micro/validation.jsonl"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--few", type=int, default=20, help="questions for rank_bm25")
    args = parser.parse_args()
    ways = {"ours": build_ours}
    for name, module, build in (
        ("bm25s numpy", "bm25s", build_bm25s),
        ("bm25s numba", "numba", build_numba),
        ("rank_bm25", "rank_bm25", build_rank),
    ):
        try:
            __import__(module)
            ways[name] = build
        except ImportError:
            print(f"{name} is skipped: {module} is not installed")
    print(f"{os.cpu_count()} cores, numpy {np.__version__}")
    building(args, ways)
    querying(args, ways)


if __name__ == "__main__":
    main()
