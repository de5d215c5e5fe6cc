"""BM25 in numpy: the search engine the policy queries, from the formula to the ranking.

A passage is a bag of lower-cased words; a query is scored against every passage by summing
one term per query word, and the best k passages come back. It plays the part that the dense
E5 retriever over Wikipedia plays in the paper: the environment, never trained.

Equations (Lucene's BM25; N passages, df = passages that hold the word, tf = its count in one)

    score(q, d) = sum over the words of q, with multiplicity:  idf(w) * tf / (tf + norm(d))
    idf(w)      = ln(1 + (N - df + 0.5) / (df + 0.5))                       always above 0
    norm(d)     = k1 * (1 - b + b * len(d) / avglen)        long passages need more matches

Deviations from the paper
    1. BM25 instead of E5-base-v2 over 21 million Wikipedia passages: nothing to download,
       exact, and a score can be followed by hand.
    2. k1 = 0.9, b = 0.4, Anserini's values for passages (the paper does not use BM25).

    python retriever.py --corpus micro/corpus.jsonl some words        # a second or two

This file also holds what every script needs to refuse bad input in one clear line.
"""

import argparse
import gzip
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


class BadInput(ValueError):
    """The user's input is wrong; the message says what, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong flag is one line on standard error and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def at_least(least: int):
    """An argparse type: a whole number not below least."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, not {text!r}")
        return int(text)

    return whole_number


def run_script(main) -> None:
    """Run a script's main(): bad input ends it with one line and exit status 2, no traceback."""
    try:
        main()
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def read_jsonl(path):
    """Yield (where, dict) for each line of a JSON-lines file, plain or .gz; where is "file:line".

    Blank lines are skipped. Raises BadInput for a missing file or a line that is not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no such file: {path}")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        row = json.loads(line.decode("utf-8"))
                    except (ValueError, RecursionError) as error:
                        raise BadInput(f"{path}:{number}: not a line of JSON ({error})") from None
                    if not isinstance(row, dict):
                        raise BadInput(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                    yield f"{path}:{number}", row
        except (OSError, EOFError) as error:  # a truncated or false .gz fails while it is read
            raise BadInput(f"{path}: cannot be read ({error})") from None


@dataclass(frozen=True)
class Passage:
    """One passage of the corpus; score is its BM25 score for the query that found it."""

    id: str
    title: str
    text: str
    score: float = 0.0


def load_corpus(path) -> list[Passage]:
    """Read passages: lines of {"id", "title", "text"}, or of {"id", "contents"} as Search-R1 and
    FlashRAG have them (the first line of contents is the title, in quotes or not).

    Raises BadInput for a malformed line (file and line number) and for an empty corpus.
    """
    corpus = []
    for where, row in read_jsonl(path):
        if "contents" in row:
            title, _, text = str(row["contents"]).partition("\n")
            title = title.strip().strip('"')
        else:
            title, text = row.get("title", ""), row.get("text")
        if not isinstance(text, str) or not isinstance(title, str) or "id" not in row:
            raise BadInput(f'{where}: a passage needs "id" and either "title" and "text" or "contents"')
        corpus.append(Passage(str(row["id"]), title, text))
    if not corpus:
        raise BadInput(f"{path}: the corpus is empty")
    return corpus


def words(text: str) -> list[str]:
    r"""Lower-cased runs of \w. No stemming and no stop list: "Vitamin C" keeps its c.

    >>> words("Apollo 8's crew")
    ['apollo', '8', 's', 'crew']
    """
    return re.findall(r"\w+", text.lower())


class BM25:
    """An inverted index: for each word its postings, the passages that hold it and the tf part
    of the score, tf / (tf + norm). A query adds idf * part over the postings of its words.

    >>> corpus = [Passage("0", "Cats", "a cat sat"), Passage("1", "Dogs", "a dog"), Passage("2", "Empty", "")]
    >>> index = BM25(corpus)
    >>> [passage.title for passage in index.search(["a dog"], k=2)[0]]
    ['Dogs', 'Cats']
    >>> index.search(["unheard"], k=2)
    [[]]
    """

    def __init__(self, corpus, k1: float = 0.9, b: float = 0.4):
        if not corpus:
            raise BadInput("the corpus is empty: BM25 needs at least one passage")
        self.corpus, self.k1, self.b = list(corpus), k1, b
        self.vocabulary: dict[str, int] = {}  # word -> row of the index
        rows, docs, counts, lengths = [], [], [], np.zeros(len(self.corpus))
        for number, passage in enumerate(self.corpus):
            bag = Counter(words(f"{passage.title} {passage.text}"))
            lengths[number] = bag.total()
            for word, count in bag.items():
                rows.append(self.vocabulary.setdefault(word, len(self.vocabulary)))
                docs.append(number)
                counts.append(count)
        rows, docs, counts = np.array(rows, np.int64), np.array(docs, np.int64), np.array(counts)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))  # (N,)
        order = np.argsort(rows, kind="stable")  # group the postings by word, passages ascending
        self.docs = docs[order]  # (P,) passage of each posting
        self.parts = (counts / (counts + norm[docs]))[order]  # (P,) tf part of its score
        df = np.bincount(rows, minlength=len(self.vocabulary))  # (W,)
        self.starts = np.concatenate([[0], np.cumsum(df)])  # word w owns starts[w]:starts[w + 1]
        self.idf = np.log(1 + (len(self.corpus) - df + 0.5) / (df + 0.5))  # (W,)

    def scores(self, query: str) -> np.ndarray:
        """The score of every passage for one query: float32, (N,)."""
        scores = np.zeros(len(self.corpus))
        for word, times in Counter(words(query)).items():
            row = self.vocabulary.get(word)
            if row is not None:
                postings = slice(self.starts[row], self.starts[row + 1])
                # A passage stands once in a word's postings, so no addition is lost here.
                scores[self.docs[postings]] += times * self.idf[row] * self.parts[postings]
        return scores.astype(np.float32)

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The best k passages of each query, best first, ties in corpus order. k is clamped to
        the corpus; a passage of score zero is never returned, so the list may be empty."""
        if k < 1:
            raise BadInput(f"k must be at least 1, not {k}")
        return [self._best(self.scores(query), min(k, len(self.corpus))) for query in queries]

    def _best(self, scores: np.ndarray, k: int) -> list[Passage]:
        kth = np.partition(scores, -k)[-k]  # everything at or above it is a candidate: ties too
        candidates = np.flatnonzero((scores >= kth) & (scores > 0))
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
        return [replace(self.corpus[number], score=float(scores[number])) for number in best]


def main() -> None:
    parser = Parser(description="Search a corpus of JSON lines with BM25.")
    parser.add_argument("--corpus", required=True, help='JSON lines of {"id", "title", "text"}, plain or .gz')
    parser.add_argument("--k", type=at_least(1), default=3, help="passages to print")
    parser.add_argument("query", nargs="+", help="the words to search for")
    args = parser.parse_args(sys.argv[1:] or ["--help"])
    found = BM25(load_corpus(args.corpus)).search([" ".join(args.query)], args.k)[0]
    for rank, passage in enumerate(found, start=1):
        print(f"{rank}. {passage.score:.4f}  {passage.title}: {passage.text}")
    if not found:
        print("No passage holds any of these words.")


if __name__ == "__main__":
    run_script(main)
