"""BM25 in numpy: the search engine that the policy queries.

A passage, with its title, is a bag of lower-cased words. A query is scored against every passage,
and the best k come back. An object with search(queries, k) -> list[list[Passage]] can replace it.

Equations (Lucene's BM25, which has no constant factor k1 + 1; k1 = 0.9, b = 0.4 as in Anserini)

    score(q, d) = sum over the words w of q: idf(w) * tf / (tf + norm(d))    w stands tf times in d
    idf(w)      = ln(1 + (N - df + 0.5) / (df + 0.5))    df of N passages hold w; rare counts more
    norm(d)     = k1 * (1 - b + b * len(d) / avglen)     avglen: mean of len(d), which is in words

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. The paper searches with a dense model, E5-base-v2 (RemoteRetriever speaks to a server of
       it). BM25 needs no download, is exact, and lets you follow a score by hand.

    python retriever.py                                          # a lesson: a score, word by word
    python retriever.py --corpus micro/corpus.jsonl some words   # search; a second or two
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import sys
import time
import unicodedata
import urllib.request
import zlib
from array import array
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

class BadInput(ValueError):
    """The user's input is wrong. The message says what, where, and what to do about it."""

@dataclass(frozen=True)
class Passage:
    """One passage of the corpus. The score is the retriever's, for the query that found it."""

    id: str
    title: str
    text: str
    score: float = 0.0

WORD = r"\w[\w\u0307]*"  # "İ" in lower case is an i and the dot U+0307, which \w does not match

def words(text: str) -> list[str]:
    """The words of a text, in lower case. There is no stemming and no stop list.

    >>> words("Apollo 8's crew")
    ['apollo', '8', 's', 'crew']
    """
    return re.findall(WORD, text.lower())

def bm25_score(query: str, text: str, texts: list[str], k1: float = 0.9, b: float = 0.4) -> float:
    """The formula as it stands above, for one of the texts. A test holds the index to it.

    >>> texts = ["a cat sat on a mat", "a dog"]
    >>> round(bm25_score("which dog", texts[1], texts), 4)  # ln(1 + 1.5 / 1.5) / (1 + .72)
    0.403
    """
    bags, bag, score = [words(other) for other in texts], words(text), 0.0
    for word in filter(bag.__contains__, words(query)):
        tf, df = bag.count(word), sum(word in other for other in bags)
        idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
        norm = k1 * (1 - b + b * len(bag) / (sum(map(len, bags)) / len(bags)))
        score += idf * tf / (tf + norm)
    return score

class BM25:
    """An index of passages: for each word, which passages hold it and what it adds to a score.

    What a word adds, idf * tf / (tf + norm), is its impact, computed here once. A word in few
    passages has postings: the numbers of its passages, and their impacts. A word in more than a
    twentieth of them has a column, an impact for each passage: adding a vector is faster.

    >>> index = BM25([Passage("0", "Cats", "a cat sat"), Passage("1", "Dogs", "a dog")])
    >>> [passage.title for passage in index.search(["a dog"], k=2)[0]]
    ['Dogs', 'Cats']
    """

    def __init__(self, corpus, k1: float = 0.9, b: float = 0.4, source: str = ""):
        # Read the corpus. Words become numbers: one that was not seen before gets the next.
        vocabulary = defaultdict(lambda: len(vocabulary))
        tokens, lengths = array("i"), array("q")
        texts, ends = bytearray(), array("q", [0])  # passage n: texts[ends[n] : ends[n + 1]]
        for passage in tqdm(corpus, desc="indexing", disable=None, leave=False, delay=1):
            found = words(f"{passage.title} {passage.text}")
            tokens.extend(map(vocabulary.__getitem__, found))
            lengths.append(len(found))
            texts += json.dumps([passage.id, passage.title, passage.text]).encode()
            ends.append(len(texts))
        if not lengths:
            raise BadInput("the corpus is empty: BM25 needs at least one passage")

        # Group the tokens. A key is a word's number in its upper half and a passage's in its lower
        # one, so sorting goes word by word. Equal keys are one word in one passage: tf of them.
        self.size = size = len(lengths)
        keys = np.array(tokens, np.int64) << 32  # (T,) T tokens
        keys |= np.repeat(np.arange(size), lengths)
        keys.sort()
        first = np.flatnonzero(np.diff(keys, prepend=-1))  # (P,) P postings
        tf = np.diff(first, append=len(keys)).astype(np.int32)  # (P,)
        keys = keys[first]  # (P,)
        word, docs = (keys >> 32).astype(np.int32), keys.astype(np.int32)  # (P,) the two halves
        del tokens, keys, first  # these arrays are long

        # The formula, for all postings at once.
        df = np.bincount(word, minlength=len(vocabulary))  # (W,) W words
        idf = np.log(1 + (size - df + 0.5) / (df + 0.5))  # (W,)
        lengths = np.array(lengths)  # (N,)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))  # (N,)
        impacts = (idf[word] * (tf / (tf + norm[docs]))).astype(np.float32)  # (P,)

        # Words in many passages get a column, and the others keep their postings.
        common = df > size / 20  # (W,)
        self.column_of = np.where(common, np.cumsum(common) - 1, -1)  # (W,) -1: none
        in_column = common[word]  # (P,)
        self.columns = np.zeros((common.sum(), size), np.float32)  # (C, N) C common words
        self.columns[self.column_of[word[in_column]], docs[in_column]] = impacts[in_column]
        self.docs, self.impacts = docs[~in_column], impacts[~in_column]  # (R,) the other postings
        self.starts = np.concatenate([[0], np.cumsum(np.where(common, 0, df))])  # (W + 1,)
        self.vocabulary, self.source = vocabulary, source  # source: the corpus file's checksum
        self.words = np.array(" ".join(vocabulary).encode())  # as it is saved
        self.texts, self.ends = np.frombuffer(texts, np.uint8), np.array(ends)

    def scores(self, query: str) -> np.ndarray:
        """The score of every passage for one query: float32, (N,)."""
        scores = np.zeros(self.size, np.float32)
        known = [self.vocabulary[word] for word in words(query) if word in self.vocabulary]
        for number in known:
            if self.column_of[number] >= 0:
                scores += self.columns[self.column_of[number]]
            else:
                postings = slice(self.starts[number], self.starts[number + 1])
                scores[self.docs[postings]] += self.impacts[postings]  # no passage comes twice
        return scores

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The best k passages of each query: best first, ties in corpus order. A passage of
        score zero is never returned, so a list may be shorter than k."""
        if k < 1:
            raise BadInput(f"k must be at least 1, not {k}")
        found = []
        for scores in map(self.scores, queries):
            # Sorting all scores is slow. Take the best of every 512 passages: the k-th highest of
            # these is a bar that at least k passages reach, so the best k are among them.
            tops = np.maximum.reduceat(scores, range(0, self.size, 512))
            bar = np.partition(tops, -k)[-k] if k <= len(tops) else 0.0
            candidates = np.flatnonzero(scores >= max(bar, np.finfo(np.float32).tiny))
            best = candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
            found.append([self.passage(number, float(scores[number])) for number in best])
        return found

    def passage(self, number: int, score: float = 0.0) -> Passage:
        """Passage `number` of the corpus, counted from 0."""
        text = self.texts[self.ends[number] : self.ends[number + 1]].tobytes()
        return Passage(*json.loads(text), score)

    # ---------------------------------------------------------------- machinery

    ARRAYS = "column_of", "columns", "starts", "docs", "impacts", "texts", "ends", "words"

    def save(self, folder) -> None:
        """Write numpy files and, last, source.txt, which marks the index as whole. A process that
        has the old files open keeps reading them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "source.txt").unlink(missing_ok=True)
        for name in self.ARRAYS:
            np.save(folder / "new.npy", getattr(self, name))
            (folder / "new.npy").replace(folder / f"{name}.npy")
        (folder / "source.txt").write_text(self.source)

    @classmethod
    def load(cls, folder) -> "BM25":
        """A saved index, memory-mapped: what no query touches stays on disk. BadInput is raised
        for a folder that holds no index, or only a part of one."""
        index, folder = cls.__new__(cls), Path(folder)
        try:
            index.source = (folder / "source.txt").read_text()
            for name in cls.ARRAYS:
                mapped = np.load(folder / f"{name}.npy", mmap_mode="r")
                setattr(index, name, mapped.view(np.ndarray))
        except (OSError, EOFError, ValueError) as error:
            raise BadInput(f"{folder} holds no usable index ({error})") from None
        known = enumerate(index.words.item().decode().split())
        index.vocabulary = {word: number for number, word in known}
        index.size = len(index.ends) - 1
        return index

def open_index(corpus, save: bool = False) -> BM25:
    """The index of a corpus file: CORPUS.bm25 if it was built from this very file (remove it when
    you change words() or BM25), else a new one, which is kept in CORPUS.bm25 if you say save."""
    with open(corpus, "rb") as file:
        source = hashlib.file_digest(file, "sha256").hexdigest()
    saved = Path(f"{corpus}.bm25")
    if os.path.exists(saved):
        try:
            index = BM25.load(saved)
            if index.source == source:
                return index
            raise BadInput(f"{saved} is the index of another corpus")
        except BadInput as error:
            print(f"{error}. It is built anew", file=sys.stderr)
    index = BM25(read_jsonl(corpus, to_passage), source=source)
    if save:
        index.save(saved)
    return index

def load_corpus(path) -> list[Passage]:
    """The passages of a file, as read_jsonl and to_passage read them."""
    return list(read_jsonl(path, to_passage))

def to_passage(row: dict, score: float = 0.0) -> Passage:
    """From {"id", "title", "text"}, or from {"id", "contents"} as Search-R1 and FlashRAG write
    it: the first line of contents is the title. Raises ValueError for anything else."""
    title, text = row.get("title", ""), row.get("text")
    if isinstance(row.get("contents"), str):
        title, _, text = row["contents"].partition("\n")
        title = re.sub(r'^"(.*)"$', r"\1", title.strip())
    if not isinstance(text, str) or not isinstance(title, str) or "id" not in row:
        raise ValueError('a passage needs "id", and "text" (with a "title") or "contents"')
    return Passage(str(row["id"]), title, text, score)

def read_jsonl(path, form=dict):
    """Yield form(object) for each line of JSON that is not blank; the file may be .gz. BadInput
    names the file, or the file and the line, that is empty, cannot be read, or is not in form."""
    where, row = path, None
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                if line.strip():
                    row = json.loads(line.decode("utf-8-sig"))  # a byte-order mark is skipped
                    if not isinstance(row, dict):
                        raise ValueError(f"expected a JSON object, not {str(row)[:50]}")
                    yield form(row)
        if row is None:
            raise ValueError("there is nothing in it")
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise BadInput(f"{where}: {error}") from None

URL = re.compile(r"https?://(\[[:.\w]+\]|[\w-]+(\.[\w-]+)*\.?)(:\d+)?([/?][!-~]*)?", re.ASCII)

class RemoteRetriever:
    """A server that speaks Search-R1's protocol, in place of an index: it is sent {"queries",
    "topk", "return_scores"}, and answers {"result": [[{"document": {"contents"}, "score"}, ...]]}.
    An attempt may take `timeout` seconds. If no answer comes, or status 429 or 5xx, `retries` more
    follow, after pause, 2 pause, 4 pause, ... seconds. BadInput is raised where that is no help."""

    def __init__(self, url: str, timeout: float = 60.0, retries: int = 3, pause: float = 1.0):
        if not re.fullmatch(URL, url):
            raise BadInput("a retriever's URL is http:// or https://, a host, a port and a path, in"
                           " ASCII, without spaces and without a password")  # fmt: skip
        self.url, self.timeout, self.retries, self.pause = url, timeout, retries, pause

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Like BM25.search, in one request. The server decides about scores of zero."""
        body = {"queries": list(queries), "topk": k, "return_scores": True}
        answer, found = (self._ask(json.dumps(body).encode()) if queries else '{"result": []}'), []
        try:
            for hits in json.loads(answer)["result"]:
                rows = [({"id": ""} | hit["document"], hit.get("score", 0.0)) for hit in hits[:k]]
                found.append([to_passage(row, float(score)) for row, score in rows])
            if len(found) != len(queries):
                raise ValueError(f"{len(found)} lists for {len(queries)} queries")
        except Exception as error:  # of the many that a wrong form brings about
            raise BadInput(f"{self.url} did not answer in Search-R1's form ({error!r})") from None
        return found

    def _ask(self, body: bytes) -> bytes:
        for attempt in range(self.retries + 1):
            time.sleep(self.pause * 2 ** (attempt - 1) if attempt else 0)
            request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
            post = lambda: OPENER.open(request, timeout=self.timeout).read()
            try:
                with ThreadPool(1) as pool:  # a socket's timeout would begin anew at each read
                    return pool.apply_async(post).get(self.timeout)
            except Exception as error:  # there are many kinds: no connection, no time, a status
                reason, status = f"{type(error).__name__} {error}", getattr(error, "code", 500)
                if status < 500 and status != 429:
                    break  # the server refuses this request, and would refuse it again
        raise BadInput(f"no answer from {self.url} in {attempt + 1} attempts ({reason})")

class Redirects(urllib.request.HTTPRedirectHandler):
    """Send the same request to where the server says. Python's own handler drops its body."""

    def redirect_request(self, request, file, code, message, headers, url):
        return urllib.request.Request(url, request.data, request.headers)

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), Redirects)  # {}: no proxies

# Without its usage, argparse says what is wrong with a flag in one line. It exits with status 2.
Parser = partial(argparse.ArgumentParser, usage=argparse.SUPPRESS)

def printable(text: str) -> str:
    r"""Text of others for a terminal. What could move its cursor shows as an escape.

    >>> printable("red\x1b[31m\u202e alert")
    'red\\x1b[31m\\u202e alert'
    """
    safe = lambda char: char in "\n\t" or unicodedata.category(char)[0] != "C"
    return "".join(char if safe(char) else ascii(char)[1:-1] for char in text)

def run_script(main) -> None:
    """Run a script's main(). Bad input ends it with one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # a log shows each line at once, whatever is in it
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except (BadInput, OSError, KeyboardInterrupt) as error:
        text = ". ".join([str(error) or "stopped", *getattr(error, "__notes__", [])])
        text = f"{Path(sys.argv[0]).name}: {printable(' '.join(text.splitlines()))}"
        print(text, file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # it is closed or full, and Python would try once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)

def main() -> None:
    parser = Parser(description="Search a corpus of JSON lines with BM25.")
    parser.add_argument("--corpus", required=True, help="a file of passages, plain or .gz")
    parser.add_argument("--save", action="store_true", help="keep the index in CORPUS.bm25")
    parser.add_argument("--k", type=int, default=3, help="passages to print")
    parser.add_argument("query", nargs="+", help="the words to search for")
    args = parser.parse_args()
    query = " ".join(args.query)
    mark = lambda match: f"*{match[0]}*" if {*words(match[0])} & {*words(query)} else match[0]
    for passage in open_index(args.corpus, args.save).search([query], args.k)[0]:
        text = re.sub(WORD, mark, printable(f"{passage.title}: {passage.text}"))
        print(f"{passage.score:.4f}  {text}")

if __name__ == "__main__":
    if not sys.argv[1:]:  # slow to import; its BadInput is not __main__'s, so it brings run_script
        from micro.lessons import retriever_lesson as main, run_script
    run_script(main)
