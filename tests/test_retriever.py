"""retriever.py against a brute-force oracle written from the formula, and its loaders."""

import gzip
import json
import math
import os
import pickle
import random
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import retriever
from retriever import BM25, BadInput, Passage, RemoteRetriever, SearchFailed, load_corpus, open_index, read_corpus


def oracle(corpus, query, k1=0.9, b=0.4):
    """Lucene's BM25, a passage and a word at a time."""
    bags = [re.findall(r"\w+", f"{p.title} {p.text}".lower()) for p in corpus]
    average = sum(map(len, bags)) / len(bags)
    scores = []
    for bag in bags:
        score = 0.0
        for word in re.findall(r"\w+", query.lower()):
            df = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            tf = bag.count(word)
            if tf:
                score += idf * tf / (tf + k1 * (1 - b + b * len(bag) / average))
        scores.append(score)
    return scores


def test_a_score_worked_by_hand():
    # N = 2. "cat": df 1, idf = ln(1 + 1.5 / 1.5) = ln 2. Both passages have 2 words, so
    # norm = .9; tf = 2 in the first: ln 2 * 2 / 2.9.
    index = BM25([Passage("0", "cat", "cat"), Passage("1", "dog", "dog")])
    assert index.scores("cat") == pytest.approx([math.log(2) * 2 / 2.9, 0.0])
    # Query words count with multiplicity.
    assert index.scores("cat Cat") == pytest.approx([2 * math.log(2) * 2 / 2.9, 0.0])
    assert index.scores("cat").dtype == np.float32


@pytest.mark.parametrize("seed", range(20))
def test_scores_and_ranking_equal_the_oracle_on_random_corpora(seed):
    rng = random.Random(seed)
    vocabulary = ["a", "b", "c8", "ö", "的", "Vitamin", "C", "x_y"]
    text = lambda most: " ".join(rng.choices(vocabulary, k=rng.randrange(most)))  # noqa: E731
    corpus = [Passage(str(i), text(3), text(12)) for i in range(rng.randrange(1, 40))]
    index = BM25(corpus)
    for query in [text(6) for _ in range(10)] + ["", "unheard of"]:
        expected = oracle(corpus, query)
        assert index.scores(query) == pytest.approx(expected, rel=1e-5)
        k = rng.randrange(1, 50)
        ranked = sorted((i for i in range(len(corpus)) if expected[i] > 0), key=lambda i: (-np.float32(expected[i]), i))
        found = index.search([query], k)[0]
        assert [p.score for p in found] == pytest.approx([expected[i] for i in ranked[:k]], rel=1e-5)
        by_scores = np.argsort(-index.scores(query), kind="stable")[: len(found)]
        assert [int(p.id) for p in found] == by_scores.tolist()  # ties in corpus order


def test_ties_are_in_corpus_order_and_k_is_clamped():
    index = BM25([Passage(str(i), "same", "words here") for i in range(5)])
    assert [p.id for p in index.search(["same"], 3)[0]] == ["0", "1", "2"]
    assert len(index.search(["same"], 99)[0]) == 5
    with pytest.raises(BadInput):
        index.search(["same"], 0)


def test_queries_that_match_nothing_find_nothing():
    index = BM25([Passage("0", "", ""), Passage("1", "word", "")])
    assert index.search(["", "?!", "other"], 2) == [[], [], []]
    assert [p.id for p in index.search(["word"], 2)[0]] == ["1"]


def test_both_forms_of_corpus_plain_and_gz(tmp_path):
    rows = [{"id": 7, "title": "T", "text": "x y"}, {"id": "8", "contents": '"A title"\nthe\ntext'}]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "c.jsonl").write_text(lines)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines)
    expected = [Passage("7", "T", "x y"), Passage("8", "A title", "the\ntext")]
    assert load_corpus(tmp_path / "c.jsonl") == load_corpus(tmp_path / "c.jsonl.gz") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "0", "title": "a", "text": "b"}\n{"id": broken\n', "c.jsonl:2: not a line of JSON"),
        ('["id"]\n', "c.jsonl:1: expected a JSON object"),
        ('{"id": "0", "title": "a"}\n', "c.jsonl:1: a passage needs"),
        ('{"title": "a", "text": "b"}\n', "c.jsonl:1: a passage needs"),
        (b"\xff\xfe\n", "c.jsonl:1: not a line of JSON"),
        ("\n", "the corpus is empty"),
    ],
)
def test_a_malformed_corpus_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "c.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=re.escape(message)):
        load_corpus(path)


def test_a_truncated_gz_is_refused(tmp_path):
    whole = gzip.compress(b'{"id": "0", "title": "a", "text": "b"}\n' * 1000)
    (tmp_path / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="cannot be read"):
        load_corpus(tmp_path / "c.jsonl.gz")


# ---------------------------------------------------------------- large enough for every path


def many(size: int, seed: int = 0) -> list[Passage]:
    """Passages over a vocabulary of all frequencies: words with a column, with postings, in one passage only."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(300)]
    weights = [1 / (i + 1) for i in range(300)]
    text = lambda: " ".join(rng.choices(vocabulary, weights, k=rng.randrange(30)))  # noqa: E731
    return [Passage(str(i), f"Title{i}" if i % 3 else "", text()) for i in range(size)]


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1030])
@pytest.mark.parametrize("run", [1, 500, 10**6])
def test_runs_columns_and_blocks_change_nothing(monkeypatch, size, run):
    monkeypatch.setattr(retriever, "RUN", run)  # passages are indexed in runs of so many words
    corpus = many(size)
    index = BM25(iter(corpus))
    assert 0 < len(index.common) < len(index.vocabulary) or size == 1
    for query in ["w0", "w0 w1 w7 w7", "w250 w3 w299", "title4 w0", "w1 " * 9, "absent"]:
        scores = index.scores(query)
        assert scores.shape == (size,) and scores == pytest.approx(oracle(corpus, query), rel=1e-5)
        for k in (1, 2, 8, 9, 100, 2 * size):
            best = [i for i in np.argsort(-scores, kind="stable")[:k] if scores[i] > 0]
            expected = [Passage(corpus[i].id, corpus[i].title, corpus[i].text, float(scores[i])) for i in best]
            assert index.search([query], k) == [expected]


def test_parity_with_bm25s():
    bm25s = pytest.importorskip("bm25s")
    corpus = many(700, seed=1)
    peer = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    peer.index([retriever.words(f"{p.title} {p.text}") for p in corpus], show_progress=False)
    index = BM25(corpus)
    for query in ["w0 w1", "w5 w5 w80", "w299 title7"]:
        assert index.scores(query) == pytest.approx(peer.get_scores(retriever.words(query)), abs=1e-4)


# ---------------------------------------------------------------- saved


QUERIES = ["w0 w1 w7", "w250 w299", "title4 w0 w0", "", "absent"]


@pytest.mark.parametrize(
    "corpus",
    [
        many(300),
        [Passage("0", "", "")],
        [Passage("\ud800", "a\x00\n\u2028\"", "\ud83d <answer> \U0001f600 \u202eright")],
    ],
    ids=["many", "no words", "hostile"],
)
def test_saved_equals_unsaved(tmp_path, corpus):
    index = BM25(corpus, k1=1.2, b=0.7)
    index.save(tmp_path / "new" / "index")
    loaded = BM25.load(tmp_path / "new" / "index")
    assert isinstance(loaded.docs.base, np.memmap)
    assert (loaded.k1, loaded.b, loaded.size) == (1.2, 0.7, len(corpus))
    for query in QUERIES + ["answer right"]:
        assert (loaded.scores(query) == index.scores(query)).all()
        assert loaded.search([query], 5) == index.search([query], 5)
    assert [loaded.passage(i) for i in range(len(corpus))] == corpus


@pytest.mark.parametrize("name", BM25.ARRAYS)
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "swapped", "pickled"])
def test_a_damaged_file_is_refused(tmp_path, name, damage):
    folder = tmp_path / "index"
    BM25(many(200)).save(folder)
    (path,) = folder.glob(f"{name}-*.npy")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "swapped":
        (other,) = folder.glob(f"{BM25.ARRAYS[BM25.ARRAYS.index(name) - 1]}-*.npy")
        path.write_bytes(other.read_bytes())
    else:
        np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
        head = json.loads((folder / "index.json").read_text())  # even with the right checksums
        head["files"][name][1] = retriever.checksum(path)
        write_head(folder, head)
    with pytest.raises(BadInput, match=f"{re.escape(str(folder))} holds no usable index"):
        BM25.load(folder)


class Bomb:
    def __reduce__(self):
        return (os._exit, (1,))


def write_head(folder, head):
    head.pop("checksum")
    head["checksum"] = retriever.zlib.crc32(json.dumps(head).encode())
    (folder / "index.json").write_text(json.dumps(head))


def test_a_foreign_or_changed_head_is_refused(tmp_path):
    folder = tmp_path / "index"
    with pytest.raises(BadInput, match="holds no usable index"):
        BM25.load(folder)
    BM25(many(20)).save(folder)
    text = (folder / "index.json").read_text()
    head = json.loads(text)
    for wrong in ("", "[]", "null", "{}", pickle.dumps(1).decode("latin1"), text.replace("0.9", "0.8"), text[: len(text) // 2], "[" * 10**5):
        (folder / "index.json").write_text(wrong)
        with pytest.raises(BadInput, match="holds no usable index"):
            BM25.load(folder)
    other_block = retriever.FORMAT.replace(str(retriever.BLOCK), "128")  # its columns would not fold into ours
    without_size = {name: value for name, value in head.items() if name != "size"}
    write_head(folder, dict(without_size))
    with pytest.raises(BadInput, match="holds no usable index"):
        BM25.load(folder)
    for wrong in ({"format": "search-e1 bm25, version 99"}, {"format": other_block}, {"files": {}}, {"files": {n: ["../x.npy", 1] for n in BM25.ARRAYS}}):
        write_head(folder, head | wrong)
        with pytest.raises(BadInput, match="holds no usable index"):
            BM25.load(folder)


@pytest.mark.parametrize("step", range(2 * len(BM25.ARRAYS) + 2))
def test_a_save_that_dies_leaves_the_old_index_whole(tmp_path, monkeypatch, step):
    folder = tmp_path / "index"
    old, new = BM25(many(50, seed=1)), BM25(many(60, seed=2))
    old.save(folder)

    class Dead(BaseException):  # what nothing catches, as kill -9
        pass

    calls = iter(range(1000))

    def dying(function):
        def call(*args, **kwargs):
            if next(calls) == step:
                raise Dead
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((np, "save"), (os, "fsync"), (os, "replace")):
            patch.setattr(module, name, dying(getattr(module, name)))
        with pytest.raises(Dead):
            new.save(folder)
    assert BM25.load(folder).search(QUERIES, 3) == old.search(QUERIES, 3)
    new.save(folder)
    assert BM25.load(folder).search(QUERIES, 3) == new.search(QUERIES, 3)
    assert len(list(folder.iterdir())) == len(BM25.ARRAYS) + 1  # what the dead left is gone


def test_a_save_that_cannot_write_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot save the index to"):
        BM25(many(3)).save(tmp_path / "file" / "index")


def test_a_newer_saved_index_is_found_beside_its_corpus(tmp_path, monkeypatch, capsys):
    path = tmp_path / "c.jsonl"
    write = lambda passages: path.write_text("".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in passages))  # noqa: E731
    write(many(30))
    built = open_index(path)
    assert not (tmp_path / "c.jsonl.bm25").exists()  # nothing is written unasked
    open_index(path, tmp_path / "c.jsonl.bm25")
    with monkeypatch.context() as patch:
        patch.setattr(retriever, "read_corpus", None)  # it may not be read now
        assert open_index(path).search(QUERIES, 3) == built.search(QUERIES, 3)
    write(many(30, seed=5))  # of another content; and older than its index, or newer
    for age in (-10, 10):
        os.utime(path, (time.time() + age,) * 2)
        assert open_index(path).search(QUERIES, 3) == BM25(read_corpus(path)).search(QUERIES, 3)
        assert "building anew" in capsys.readouterr().err
    open_index(path, tmp_path / "c.jsonl.bm25")
    shutil.copytree(tmp_path / "c.jsonl.bm25", tmp_path / "elsewhere")
    next((tmp_path / "c.jsonl.bm25").glob("docs-*")).unlink()
    with pytest.raises(BadInput, match="holds no usable index"):
        open_index(path)


# ---------------------------------------------------------------- a retrieval server


@pytest.fixture
def server():
    """A server whose answers a test sets: each is (status, body) or a function of the request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request)
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            status, body = answer(request) if callable(answer) else answer
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:  # the client has given up
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.answers = [], [found]
    server.url = f"http://127.0.0.1:{server.server_port}/retrieve"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def found(request):
    """What Search-R1's server answers."""
    hit = lambda query, n: {"document": {"id": str(n), "contents": f'"About {query}"\ntext {n}'}, "score": 1.0 / (n + 1)}  # noqa: E731
    return 200, {"result": [[hit(query, n) for n in range(request["topk"])] for query in request["queries"]]}


def test_the_remote_retriever_speaks_search_r1s_protocol(server):
    remote = RemoteRetriever(server.url)
    assert remote.search(["a", "ö"], 2) == [
        [Passage("0", "About a", "text 0", 1.0), Passage("1", "About a", "text 1", 0.5)],
        [Passage("0", "About ö", "text 0", 1.0), Passage("1", "About ö", "text 1", 0.5)],
    ]
    assert server.requests == [{"queries": ["a", "ö"], "topk": 2, "return_scores": True}]
    assert remote.search([], 3) == [] and len(server.requests) == 1
    with pytest.raises(BadInput, match="k must be at least 1"):
        remote.search(["a"], 0)


def test_what_may_pass_is_tried_again(server):
    server.answers = [(500, b"busy"), (503, b"busy"), found]
    assert len(RemoteRetriever(server.url, pause=0.01).search(["a"], 1)[0]) == 1
    assert len(server.requests) == 3
    server.answers = [(500, b"busy")]
    with pytest.raises(SearchFailed, match=f"no answer from {server.url} in 3 attempts .*500"):
        RemoteRetriever(server.url, retries=2, pause=0.01).search(["a"], 1)
    assert len(server.requests) == 6


def test_a_slow_server_times_out(server):
    server.answers = [lambda request: (time.sleep(1), found(request))[1]]
    with pytest.raises(SearchFailed, match=f"no answer from {server.url} in 2 attempts .*[Tt]ime"):
        RemoteRetriever(server.url, timeout=0.1, retries=1, pause=0.01).search(["a"], 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, b"no such page"), "in 1 attempts .*404"),
        ((200, b"<html>"), "not JSON"),
        ((200, b"[" * 10**5), "not JSON"),
        ((200, {"error": "no"}), "not in Search-R1's form"),
        ((200, []), "not in Search-R1's form"),
        ((200, {"result": [["a"]]}), "not in Search-R1's form"),
        ((200, {"result": [[{"document": {"contents": 3}, "score": 1}]]}), "not in Search-R1's form"),
        ((200, {"result": [[{"document": {"contents": "a"}, "score": None}]]}), "not in Search-R1's form"),
        ((200, {"result": []}), "answered 0 of 1 queries"),
    ],
)
def test_a_wrong_answer_is_not_tried_again(server, answer, message):
    server.answers = [answer]
    with pytest.raises(SearchFailed, match=message) as error:
        RemoteRetriever(server.url, pause=0.01).search(["a"], 1)
    assert server.url in str(error.value) and len(server.requests) == 1


def test_no_server_at_all(refused):
    with pytest.raises(SearchFailed, match="no answer from http://127.0.0.1:9/retrieve in 2 attempts .*refused"):
        RemoteRetriever("http://127.0.0.1:9/retrieve", retries=1, pause=0.01).search(["a"], 1)
    with pytest.raises(BadInput, match="begins with http"):
        RemoteRetriever("127.0.0.1:8000/retrieve")


# ---------------------------------------------------------------- the command


def test_the_command(command, refused, tmp_path):
    done = command("retriever.py", "--corpus", "micro/corpus.jsonl", "the", "Harbor")
    assert done.returncode == 0 and done.stdout.startswith("1. ") and "*Harbor*" in done.stdout  # marked
    for _ in range(2):  # builds and saves; loads
        again = command("retriever.py", "--corpus", "micro/corpus.jsonl", "--index", tmp_path / "index", "the", "Harbor")
        assert again.stdout == done.stdout
    next((tmp_path / "index").glob("starts-*")).write_bytes(b"")
    args = "retriever.py", "--corpus", "micro/corpus.jsonl", "--index", tmp_path / "index", "x"
    assert "holds no usable index" in refused(*args)
    assert "no such file: nowhere" in refused("retriever.py", "--corpus", "nowhere", "x")
    assert "--frobnicate" in refused("retriever.py", "--corpus", "micro/corpus.jsonl", "--frobnicate", "x")
