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

    python retriever.py                                               # how a query is scored, word by word
    python retriever.py --corpus micro/corpus.jsonl some words        # a second or two

At the end stands what every script needs to refuse bad input in one clear line.
"""

import argparse
import gzip
import http.client
import json
import os
import re
import secrets
import sys
import time
import unicodedata
import urllib.request
import zlib
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm


class BadInput(ValueError):
    """The user's input is wrong; the message says what, where, and what to do about it."""


@dataclass(frozen=True)
class Passage:
    """One passage of the corpus; score is the retriever's, for the query that found it."""

    id: str
    title: str
    text: str
    score: float = 0.0


def read_corpus(path):
    """Yield passages from lines of {"id", "title", "text"}, or of {"id", "contents"} as Search-R1
    and FlashRAG have them (the first line of contents is the title, in quotes or not).

    Raises BadInput for a malformed line (file and line number) and for an empty corpus.
    """
    where = ""
    for where, row in read_jsonl(path):
        row = row | title_and_text(row["contents"]) if isinstance(row.get("contents"), str) else row
        title, text = row.get("title", ""), row.get("text")
        if not isinstance(text, str) or not isinstance(title, str) or "id" not in row:
            raise BadInput(f'{where}: a passage needs "id" and either "title" and "text" or "contents"')
        yield Passage(str(row["id"]), encodable(title), encodable(text))
    if not where:
        raise BadInput(f"{path}: the corpus is empty")


def title_and_text(contents: str) -> dict[str, str]:
    title, _, text = contents.partition("\n")
    return {"title": title.strip().strip('"'), "text": text}


def load_corpus(path) -> list[Passage]:
    """All of read_corpus(path), in memory."""
    return list(read_corpus(path))


def words(text: str) -> list[str]:
    r"""Lower-cased runs of \w. No stemming and no stop list: "Vitamin C" keeps its c.

    >>> words("Apollo 8's crew")
    ['apollo', '8', 's', 'crew']
    """
    return re.findall(r"\w+", text.lower())


RUN = 1_000_000  # words that are sorted at once while an index is built
BLOCK = 512  # passages whose best score is looked at first: shorter rows cost numpy more than they save
FORMAT = f"search-e1 bm25, version 1, blocks of {BLOCK}"  # saved columns are padded to whole blocks


class BM25:
    """An inverted index of precomputed impacts, idf * tf / (tf + norm): a query adds up those of
    its words. A word in few passages has postings, the numbers of its passages and their impacts;
    one in more than a twentieth of them, where the time would go, has a column: an impact for
    every passage, zeros included, that is added as one vector. There are at most 20 times as many
    such words as a passage has words on average.

    corpus: any iterable of passages, read once; what is held is the index, not the objects.

    >>> corpus = [Passage("0", "Cats", "a cat sat"), Passage("1", "Dogs", "a dog"), Passage("2", "Empty", "")]
    >>> index = BM25(corpus)
    >>> [passage.title for passage in index.search(["a dog"], k=2)[0]]
    ['Dogs', 'Cats']
    >>> index.search(["unheard"], k=2)
    [[]]
    """

    ARRAYS = "vocabulary_text", "starts", "docs", "impacts", "common", "columns", "texts", "ends"

    def __init__(self, corpus, k1: float = 0.9, b: float = 0.4, source: str = ""):
        vocabulary = defaultdict()
        vocabulary.default_factory = vocabulary.__len__  # a word not seen before gets the next row
        texts, ends, lengths = bytearray(), array("q", [0]), array("q")
        tokens, first = array("q"), 0  # the words, as rows, of the passages from number `first` on
        runs = []  # (row << 32 | passage, count), sorted: some million tokens each, so memory stays near the index's

        def close_run() -> None:
            docs = np.repeat(np.arange(first, len(lengths)), lengths[first:])
            keys, counts = np.unique(np.asarray(tokens, np.int64) << 32 | docs, return_counts=True)
            runs.append((keys, counts.astype(np.int32)))

        for passage in tqdm(corpus, desc="indexing", unit=" passages", disable=None, leave=False, delay=1):
            found = words(f"{passage.title} {passage.text}")
            tokens.extend(map(vocabulary.__getitem__, found))
            lengths.append(len(found))
            texts += json.dumps([passage.id, passage.title, passage.text]).encode()
            ends.append(len(texts))
            if len(tokens) > RUN:
                close_run()
                tokens, first = array("q"), len(lengths)
        if not lengths:
            raise BadInput("the corpus is empty: BM25 needs at least one passage")
        close_run()
        del tokens

        size, num_words = len(lengths), len(vocabulary)
        df = sum(np.bincount(keys >> 32, minlength=num_words) for keys, _ in runs)  # (W,)
        idf = np.log(1 + (size - df + 0.5) / (df + 0.5))  # (W,)
        lengths = np.array(lengths)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))  # (N,)
        self.k1, self.b, self.size, self.source = k1, b, size, source
        self.common = np.flatnonzero(df > size / 20)  # (D,) words that have a column
        column = np.full(num_words, -1)  # (W,)
        column[self.common] = np.arange(len(self.common))
        self.columns = np.zeros((len(self.common), -(-size // BLOCK) * BLOCK), np.float32)  # (D, N rounded up)
        self.starts = np.concatenate([[0], np.cumsum(np.where(column < 0, df, 0))])  # word w owns starts[w]:starts[w + 1]
        self.docs = np.empty(self.starts[-1], np.int32)  # (P,) passage of each posting
        self.impacts = np.empty(self.starts[-1], np.float32)  # (P,)
        filled = self.starts[:-1].copy()  # (W,) where each word's next posting goes
        for _ in range(len(runs)):
            keys, counts = runs.pop(0)
            rows, docs = keys >> 32, keys & 0xFFFFFFFF
            impacts = (idf[rows] * counts / (counts + norm[docs])).astype(np.float32)
            dense = column[rows] >= 0
            self.columns[column[rows[dense]], docs[dense]] = impacts[dense]
            rows, docs, impacts = rows[~dense], docs[~dense], impacts[~dense]
            own = np.bincount(rows, minlength=num_words)  # (W,) postings of this run, which stand together
            place = (filled - np.cumsum(own) + own)[rows] + np.arange(len(rows))
            self.docs[place], self.impacts[place] = docs, impacts
            filled += own
        self.texts, self.ends = np.frombuffer(texts, np.uint8), np.array(ends)  # passage n: texts[ends[n] : ends[n + 1]]
        self.vocabulary_text = np.frombuffer("".join(f"{word}\n" for word in vocabulary).encode(), np.uint8)
        vocabulary.default_factory = None
        self._prepare(vocabulary)

    def _prepare(self, vocabulary: dict[str, int]) -> None:
        self.vocabulary = vocabulary  # word -> row
        self.column = {row: column for column, row in enumerate(self.common.tolist())}

    def _scores(self, query: str) -> np.ndarray:
        scores = np.zeros(self.columns.shape[1], np.float32)  # (N rounded up,)
        for word, times in Counter(words(query)).items():
            row = self.vocabulary.get(word)
            if row is None:
                continue
            if row in self.column:
                impacts = self.columns[self.column[row]]
                scores += impacts if times == 1 else times * impacts
            else:
                postings = slice(self.starts[row], self.starts[row + 1])
                # A passage stands once in a word's postings, so no addition is lost here.
                scores[self.docs[postings]] += times * self.impacts[postings]
        return scores

    def scores(self, query: str) -> np.ndarray:
        """The score of every passage for one query: float32, (N,)."""
        return self._scores(query)[: self.size]

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The best k passages of each query, best first, ties in corpus order. k is clamped to
        the corpus; a passage of score zero is never returned, so the list may be empty."""
        if k < 1:
            raise BadInput(f"k must be at least 1, not {k}")
        return [self._best(self._scores(query), k) for query in queries]

    def _best(self, scores: np.ndarray, k: int) -> list[Passage]:
        blocks = scores.reshape(-1, BLOCK)
        tops = blocks.max(axis=1)
        # k blocks reach the k-th highest top, so no passage below it is among the best k.
        bar = max(np.partition(tops, -k)[-k] if k <= len(tops) else 0.0, np.finfo(np.float32).tiny)
        high = np.flatnonzero(tops >= bar)
        block, place = np.nonzero(blocks[high] >= bar)
        candidates = high[block] * BLOCK + place  # in corpus order
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
        return [self.passage(number, float(scores[number])) for number in best]

    def passage(self, number: int, score: float = 0.0) -> Passage:
        return Passage(*json.loads(self.texts[self.ends[number] : self.ends[number + 1]].tobytes()), score)

    def save(self, folder) -> None:
        """Write the index: numpy files under names never used before, and then index.json, which
        names them, in one step. A save that dies anywhere before that leaves the old index whole."""
        folder, token = Path(folder), secrets.token_hex(4)
        head = {"format": FORMAT, "k1": self.k1, "b": self.b, "size": self.size, "source": self.source, "files": {}}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in self.ARRAYS:
                path = folder / f"{name}-{token}.npy"
                with open(path, "wb") as file:
                    np.save(file, getattr(self, name), allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
                head["files"][name] = [path.name, checksum(path)]
            head["checksum"] = zlib.crc32(json.dumps(head).encode())
            with open(folder / "index.json.new", "w") as file:
                json.dump(head, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(folder / "index.json.new", folder / "index.json")
        except OSError as error:
            raise BadInput(f"cannot save the index to {folder}: {error}") from None
        for path in folder.glob("*-????????.npy"):  # of the index before, or of a save that died
            if path.name.rsplit("-")[0] in self.ARRAYS and not path.name.endswith(f"-{token}.npy"):
                path.unlink()

    @classmethod
    def load(cls, folder) -> "BM25":
        """A saved index, memory-mapped: what is not searched stays on disk. Every file is read once
        and checked. Raises BadInput for a folder that holds no index, or no whole or no unchanged one."""
        folder = Path(folder)
        try:
            head = json.loads((folder / "index.json").read_text())
            if head.pop("checksum") != zlib.crc32(json.dumps(head).encode()) or head["format"] != FORMAT:
                raise ValueError(f"index.json is damaged, or not of format {FORMAT}")
            index = cls.__new__(cls)
            for name in cls.ARRAYS:
                file, wanted = head["files"][name]
                if checksum(folder / file) != wanted:
                    raise ValueError(f"{file} is cut off or changed")
                setattr(index, name, np.load(folder / file, mmap_mode="r", allow_pickle=False).view(np.ndarray))
            index.k1, index.b, index.size, index.source = (head[name] for name in ("k1", "b", "size", "source"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{folder} holds no usable index ({error}): build it again") from None
        known = index.vocabulary_text.tobytes().decode().split("\n")[:-1]
        index._prepare({word: row for row, word in enumerate(known)})
        return index


def open_index(corpus, folder=None) -> BM25:
    """The index of a corpus file: the saved one where it is newer than the corpus and was built
    from it, else built anew. folder None looks beside the corpus, in its name with .bm25 after
    it, and saves nothing; a folder that is named is where a new index is saved."""
    corpus, saved = Path(corpus), Path(folder or f"{corpus}.bm25")
    if not corpus.is_file():
        raise BadInput(f"no such file: {corpus}")
    source = f"{corpus.name}, {corpus.stat().st_size} bytes"
    if (saved / "index.json").is_file():
        index = BM25.load(saved)
        if index.source == source and (saved / "index.json").stat().st_mtime >= corpus.stat().st_mtime:
            return index
        print(f"{saved} is older than {corpus}, or of another corpus: building anew", file=sys.stderr)
    index = BM25(read_corpus(corpus), source=source)
    if folder:
        index.save(folder)
    return index


class SearchFailed(BadInput):
    """The retrieval server cannot be used; the message names its address."""


class RemoteRetriever:
    """A retrieval server that speaks Search-R1's protocol, such as its dense one: POST {"queries",
    "topk", "return_scores"} -> {"result": [[{"document": {"contents"}, "score"}, ...], ...]}.

    timeout: seconds an attempt may take. What may pass by itself (no connection, a time-out, a
    server's error 5xx) is tried again, `retries` times, after pause, 2 pause, 4 pause, ... seconds; then, or where
    the server answers what is not of this form, SearchFailed is raised, or, with on_failure "nothing",
    the queries find nothing, which is said on standard error and counted in `failed`.
    """

    def __init__(self, url: str, timeout: float = 60.0, retries: int = 3, pause: float = 1.0, on_failure: str = "stop"):
        if not re.match(r"https?://[^/]", url):
            raise BadInput(f"a retriever's URL begins with http:// or https://, unlike {url!r}")
        self.url, self.timeout, self.retries, self.pause = url, timeout, retries, pause
        self.on_failure, self.failed = on_failure, 0

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """As BM25.search, in one request."""
        if k < 1:
            raise BadInput(f"k must be at least 1, not {k}")
        try:
            return self._ask(queries, k) if queries else []
        except SearchFailed as error:
            if self.on_failure == "stop":
                raise
            self.failed += len(queries)
            print(f"{len(queries)} searches find nothing: {error}", file=sys.stderr)
            return [[] for _ in queries]

    def _ask(self, queries: list[str], k: int) -> list[list[Passage]]:
        answer = self._post({"queries": list(queries), "topk": k, "return_scores": True})
        try:
            found = [[self._passage(hit) for hit in hits] for hits in answer["result"]]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise SearchFailed(f"{self.url} answered, but not in Search-R1's form: {str(answer)[:100]!r}") from None
        if len(found) != len(queries):
            raise SearchFailed(f"{self.url} answered {len(found)} of {len(queries)} queries")
        return [hits[:k] for hits in found]

    def _passage(self, hit: dict) -> Passage:
        document = hit["document"]
        parts = title_and_text(document["contents"])
        return Passage(str(document.get("id", "")), encodable(parts["title"]), encodable(parts["text"]), float(hit["score"]))

    def _post(self, body: dict):
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except (ValueError, RecursionError) as error:
                raise SearchFailed(f"{self.url} answered what is not JSON ({error})") from None
            except (OSError, http.client.HTTPException) as error:  # OSError: no connection, time-outs, HTTP statuses
                reason = f"{type(error).__name__}: {error}"
                if getattr(error, "code", 500) < 500:
                    break  # our request is refused, and would be again
        raise SearchFailed(f"no answer from {self.url} in {attempt + 1} attempts ({reason})")


# ---------------------------------------------------------------- what every script needs


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong flag is one line on standard error and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def printable(text: str) -> str:
    r"""Text of others for a terminal: what would move its cursor, ring its bell, change its colours or
    turn the direction of writing is shown as an escape.

    >>> printable("red\x1b[31m\u202e alert")
    'red\\x1b[31m\\u202e alert'
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode() for c in text)


def paint(text: str, colour: str, plain: str | None = None) -> str:
    """In an ANSI colour, where standard output is a terminal and NO_COLOR is not set; else plain (None: the text)."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[{colour}m{text}\033[0m"
    return text if plain is None else plain


def encodable(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON can carry but neither UTF-8 nor a tokenizer."""
    try:
        text.encode()  # nearly always: reading a corpus must not pay for the rest
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


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
        print(f"{Path(sys.argv[0]).name}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
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


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            value = zlib.crc32(part, value)
    return value


# ---------------------------------------------------------------- run alone


def main() -> None:
    parser = Parser(description="Search a corpus of JSON lines with BM25.")
    parser.add_argument("--corpus", required=True, help='JSON lines of {"id", "title", "text"}, plain or .gz')
    parser.add_argument("--index", help="folder of the saved index: used where it is newer than the corpus, else made")
    parser.add_argument("--k", type=at_least(1), default=3, help="passages to print")
    parser.add_argument("query", nargs="+", help="the words to search for")
    args = parser.parse_args()
    query = " ".join(args.query)
    found = open_index(args.corpus, args.index).search([query], args.k)[0]
    matched = set(words(query))

    def mark(word: re.Match) -> str:
        return paint(word[0], "1", plain=f"*{word[0]}*") if word[0].lower() in matched else word[0]

    for rank, passage in enumerate(found, start=1):
        marked = re.sub(r"\w+", mark, printable(f"{passage.title}: {passage.text}"))
        print(f"{rank}. {passage.score:.4f}  {marked}")
    if not found:
        print("No passage holds any of these words.")


def lesson() -> None:
    """How one query is scored, word by word."""
    index = open_index(Path(__file__).parent / "micro/corpus.jsonl")
    query = "Who founded Hunik Labs, a company with its seat in Stobor Bridge?"
    found = index.search([query], 3)[0]
    print(f"{index.size} passages. Query: {query}\nThe best three:")
    numbers = np.argsort(-index.scores(query), kind="stable")[:3]
    for number, passage in zip(numbers, found):
        print(f"  passage {number}: {passage.text}")
    print("\nA word counts the more, the fewer passages hold it (idf), and the shorter the passage that holds it:\n")
    print(f"{'word':12}{'times':>6}{'in passages':>13}{'idf':>7}" + "".join(f"{f'passage {n}':>14}" for n in numbers))
    for word, times in Counter(words(query)).items():
        scores = index.scores(word)
        df = int((scores > 0).sum())
        idf = np.log(1 + (index.size - df + 0.5) / (df + 0.5))
        print(f"{word:12}{times:6}{df:13}{idf:7.2f}" + "".join(f"{times * scores[n]:14.3f}" for n in numbers))
    print(f"{'sum':38}" + "".join(f"{passage.score:14.3f}" for passage in found))
    print("\nA word in no passage has an idf, but nothing to give. Your own: python retriever.py --corpus FILE WORDS")


if __name__ == "__main__":
    run_script(main if sys.argv[1:] else lesson)
