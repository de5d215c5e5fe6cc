"""BM25 in numpy: the search engine that the policy queries.

A passage, with its title, is a bag of lower-cased words. A query is scored against
every passage, and the best k come back. Any object with a method
search(queries, k) -> list[list[Passage]] can take its place.

Equations (Lucene's BM25, which has no constant factor k1 + 1; k1 = 0.9 and b = 0.4 as
in Anserini). Of N passages df contain the word w, and passage d contains it tf times.

    score(q, d) = sum over the words w of q:  idf(w) * tf / (tf + norm(d))
    idf(w)      = ln(1 + (N - df + 0.5) / (df + 0.5))    a rare word counts more
    norm(d)     = k1 * (1 - b + b * len(d) / avglen)     long passages are penalized
    len(d)      = the number of words of d; avglen is its mean over all passages

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. The paper searches with a dense model, E5-base-v2. (RemoteRetriever queries a
       server that runs one.) BM25 needs no download, is exact, and lets you follow a
       score by hand.

Start reading at bm25_score, which is the formula. BM25.__init__ computes the same for
all words and passages at once, and BM25.search looks it up. Nothing here is trained.
The same on one page, without an index that is built beforehand: lessons/plain.py.

    python -m lessons.retriever                                  # a score, word by word
    python retriever.py --corpus micro/corpus.jsonl some words   # search
"""

import json
import math
import os
import re
import sys
from array import array
from collections import defaultdict
from unicodedata import normalize

import numpy as np
from tqdm import tqdm

from machinery.errors import BadInput
from machinery.json_lines import read_jsonl
from machinery.passages import Passage, load_corpus, to_passage
from machinery.remote import RemoteRetriever
from machinery.saved_index import checksum, read_index, write_index
from machinery.terminal import Parser, printable, run_script

# Passage, load_corpus and RemoteRetriever can be imported from here, too.
__all__ = [
    "BM25",
    "Passage",
    "RemoteRetriever",
    "bm25_score",
    "load_corpus",
    "open_index",
    "words",
]

# Letters, digits and underscores. In lower case the Turkish "İ" is an i and the dot
# U+0307, which \w does not match, so it is added.
WORD = r"\w[\w\u0307]*"


def words(text: str) -> list[str]:
    """The words of a text, in lower case. There is no stemming and no stop list.

    An accent may be written apart from its letter, or in one piece with it (NFC). Here
    it is always in one piece, so that the two are the same word.

    >>> words("Apollo 8's crew")
    ['apollo', '8', 's', 'crew']
    """
    text = text.lower()
    if not text.isascii():
        text = normalize("NFC", text)
    return re.findall(WORD, text)


def bm25_score(
    query: str, text: str, texts: list[str], k1: float = 0.9, b: float = 0.4
) -> float:
    """The formula above, for one of the texts. A test checks BM25 against it.

    Below, one text of two contains "dog": ln(1 + 1.5 / 1.5) / (1 + 0.72) = 0.403.

    >>> texts = ["a cat sat on a mat", "a dog"]
    >>> round(bm25_score("which dog", texts[1], texts), 4)
    0.403
    """
    bags = [words(other) for other in texts]
    bag = words(text)
    avglen = sum(len(other) for other in bags) / len(bags)
    score = 0.0
    for word in words(query):
        if word in bag:
            tf = bag.count(word)
            df = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            norm = k1 * (1 - b + b * len(bag) / avglen)
            score += idf * tf / (tf + norm)
    return score


class BM25:
    """An index: for each word, the passages that contain it and what it adds to them.

    What a word adds to the score of a passage, idf * tf / (tf + norm), is the same for
    every query. We call it the word's impact on the passage, and compute it once. A
    word has a list of postings: the passages that contain it, and its impact on each. A
    search adds up the lists of its words.

    The list of a word like "the" names nearly every passage, and is slow to add. So a
    word in more than a twentieth of the passages has a dense row instead: its impact on
    every passage, zero if the word is missing. Adding it is one vector addition.

    >>> index = BM25([Passage("0", "Cats", "a cat sat"), Passage("1", "Dogs", "a dog")])
    >>> [passage.title for passage in index.search(["a dog"], k=2)[0]]
    ['Dogs', 'Cats']
    """

    def __init__(self, corpus, k1: float = 0.9, b: float = 0.4, source: str = ""):
        # Read the corpus. A word becomes a number: looking up a new word adds it to the
        # vocabulary, with the next number. A passage becomes bytes, so that a loaded
        # index can leave it on the disk.
        vocabulary = defaultdict(lambda: len(vocabulary))
        occurrences = array("i")  # all words of all passages, in order, as numbers
        lengths = array("q")
        texts = bytearray()
        ends = array("q", [0])
        for passage in tqdm(corpus, "indexing", disable=None, leave=False, delay=1):
            passage_words = words(f"{passage.title} {passage.text}")
            occurrences.extend([vocabulary[word] for word in passage_words])
            lengths.append(len(passage_words))
            texts += json.dumps([passage.id, passage.title, passage.text]).encode()
            ends.append(len(texts))
        if not lengths:
            raise BadInput("the corpus is empty: BM25 needs at least one passage")
        self.source = source  # the checksum of the corpus file, for open_index
        self.size = len(lengths)  # N
        self.vocabulary = vocabulary  # W words
        self.texts = np.frombuffer(texts, np.uint8)
        self.ends = np.array(ends)  # (N + 1,) passage n is texts[ends[n] : ends[n + 1]]
        lengths = np.array(lengths)  # (N,)

        # The formula, for all postings at once. There are P of them.
        word, docs, tf = count_words(occurrences, lengths)  # (P,) each
        del occurrences  # it has an entry for every word of the corpus
        df = np.bincount(word, minlength=len(vocabulary))  # (W,)
        idf = np.log(1 + (self.size - df + 0.5) / (df + 0.5))  # (W,)
        avglen = max(lengths.mean(), 1e-9)  # not 0, even if every passage is empty
        norm = k1 * (1 - b + b * lengths / avglen)  # (N,)
        impacts = tf / (tf + norm[docs])  # (P,)
        impacts *= idf[word]
        impacts = impacts.astype(np.float32)

        # The C words that are in many passages get a dense row.
        common = df > self.size / 20  # (W,)
        self.row_of = np.where(common, np.cumsum(common) - 1, -1)  # (W,) -1: none
        self.dense = np.zeros((common.sum(), self.size), np.float32)  # (C, N)
        is_dense = common[word]  # (P,)
        self.dense[self.row_of[word[is_dense]], docs[is_dense]] = impacts[is_dense]

        # The others keep their postings: docs[starts[w] : starts[w + 1]] of word w, and
        # the same part of impacts.
        self.docs = docs[~is_dense]
        self.impacts = impacts[~is_dense]
        counts = np.where(common, 0, df)  # (W,)
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # (W + 1,)

    def scores(self, query: str) -> np.ndarray:
        """The score of every passage for one query: float32, (N,)."""
        scores = np.zeros(self.size, np.float32)
        for word in words(query):
            number = self.vocabulary.get(word)
            if number is None:
                continue  # no passage contains this word
            row = self.row_of[number]
            if row >= 0:
                scores += self.dense[row]
            else:
                # A word has one posting per passage, so no place is added to twice.
                postings = slice(self.starts[number], self.starts[number + 1])
                scores[self.docs[postings]] += self.impacts[postings]
        return scores

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The best k passages of each query: best first, ties in corpus order.

        A passage of score zero is never returned, so a list may be shorter than k.
        """
        if k < 1:
            raise BadInput(f"k must be at least 1, not {k}")
        results = []
        for query in queries:
            scores = self.scores(query)
            best = best_first(scores, k)
            results.append([self.passage(n, float(scores[n])) for n in best])
        return results

    def passage(self, number: int, score: float = 0.0) -> Passage:
        """Passage `number` of the corpus, counted from 0."""
        text = self.texts[self.ends[number] : self.ends[number + 1]].tobytes()
        return Passage(*json.loads(text), score)

    def save(self, folder) -> None:
        """Keep the index in a folder, replacing any index already there."""
        index = dict(vars(self))
        index["vocabulary"] = list(self.vocabulary)  # in the order of their numbers
        write_index(folder, index)

    @classmethod
    def load(cls, folder) -> "BM25":
        """A saved index, memory-mapped: what no query touches stays on the disk.

        BadInput is raised for a folder with no index, or with only a part of one. The
        attributes are those of __init__, which is not called: it would need the corpus.
        """
        index = cls.__new__(cls)
        vars(index).update(read_index(folder))
        numbered = enumerate(index.vocabulary)
        index.vocabulary = {word: number for number, word in numbered}
        return index


def count_words(occurrences, lengths: np.ndarray) -> tuple:
    """Count each word in each passage: (word, passage, tf), (P,) each, sorted by word.

    `occurrences` are all words of all passages, in order, as numbers. lengths (N,) says
    how many of them each passage has.

    >>> word, passage, tf = count_words([0, 1, 0, 1], np.array([3, 1]))
    >>> word.tolist(), passage.tolist(), tf.tolist()
    ([0, 1, 1], [0, 0, 1], [2, 1, 1])
    """
    # A pair of word and passage becomes one number, which is sorted by word first.
    size = len(lengths)
    pairs = np.array(occurrences, np.int64)  # (T,) T occurrences
    pairs *= size
    pairs += np.repeat(np.arange(size), lengths)
    # Count equal pairs. The next lines are np.unique(pairs, return_counts=True), with
    # less memory.
    pairs.sort()
    first = np.flatnonzero(np.diff(pairs, prepend=-1))  # (P,) where a new pair begins
    tf = np.diff(first, append=len(pairs)).astype(np.int32)  # (P,)
    pairs = pairs[first]  # (P,)
    del first
    word = (pairs // size).astype(np.int32)  # (P,)
    passage = (pairs % size).astype(np.int32)  # (P,)
    return word, passage, tf


def best_first(scores: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k highest scores, highest first, omitting zero scores.

    >>> best_first(np.array([0.5, 0.0, 0.7, 0.5, 0.2]), k=3).tolist()
    [2, 0, 3]

    It is np.argsort(-scores, kind="stable")[:k], but does not sort them all. Take the
    best of every 512 scores. The k-th highest of these is a bar that at least k scores
    reach. So the best k are among those that reach it, and these are few.
    """
    block_best = np.maximum.reduceat(scores, range(0, len(scores), 512))
    bar = np.finfo(np.float32).tiny  # few blocks: all positive scores are candidates
    if k <= len(block_best):
        bar = max(bar, np.partition(block_best, -k)[-k])
    candidates = np.flatnonzero(scores >= bar)
    order = np.argsort(-scores[candidates], kind="stable")  # ties keep their order
    return candidates[order[:k]]


def open_index(corpus, save: bool = False) -> BM25:
    """The index of a corpus file: CORPUS.bm25, if that was built from this very file.

    Otherwise it is built, and with save=True kept in CORPUS.bm25. Delete that folder
    after changing words() or BM25: only the corpus is checked.
    """
    source = checksum(corpus)
    saved = f"{corpus}.bm25"
    if os.path.exists(saved):
        try:
            index = BM25.load(saved)
            if index.source == source:
                return index
            problem = f"{saved} is the index of another corpus"
        except BadInput as error:
            problem = str(error)
        remedy = "Rebuilding it"
        if not save:
            remedy = "Building one in memory: python retriever.py --save replaces it"
        print(f"{problem}. {remedy}", file=sys.stderr)
    index = BM25(read_jsonl(corpus, to_passage), source=source)
    if save:
        index.save(saved)
    return index


def starred(text: str, query: str) -> str:
    """A text, with the words of the query in asterisks."""
    query_words = words(query)

    def star(match):
        if match[0].lower() in query_words:
            return f"*{match[0]}*"
        return match[0]

    return re.sub(WORD, star, normalize("NFC", text))


def main() -> None:
    """Search a corpus file, and print the best passages."""
    parser = Parser(description="Build an index of a corpus, and search it with BM25.")
    parser.add_argument("--corpus", required=True, help="passages, .jsonl or .jsonl.gz")
    parser.add_argument(
        "--save", action="store_true", help="keep the index in CORPUS.bm25"
    )
    parser.add_argument("--k", type=int, default=3, help="passages to print")
    parser.add_argument("query", nargs="+", help="the words to search for")
    if len(sys.argv) == 1:
        parser.error(
            "say what to search: python retriever.py --corpus CORPUS QUERY... "
            "(python -m lessons.retriever shows how a score is made)"
        )
    args = parser.parse_args()
    query = " ".join(args.query)
    index = open_index(args.corpus, args.save)
    for passage in index.search([query], args.k)[0]:
        text = printable(f"{passage.title}: {passage.text}")
        print(f"{passage.score:.4f}  {starred(text, query)}")


if __name__ == "__main__":
    run_script(main)
