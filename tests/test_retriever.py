"""retriever.py: the index against the plain formula, saved indexes, servers, and the loaders."""

import functools
import gzip
import json
import math
import os
import random
import re
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_here

import retriever
from retriever import (
    BM25, BadInput, Passage, RemoteRetriever, bm25_score, load_corpus, open_index, read_jsonl,
    run_script, to_passage, words,
)  # fmt: skip


def oracle(corpus, query, k1=0.9, b=0.4):
    """The plain formula for every passage. Each text is split into words only once."""
    texts = [f"{passage.title} {passage.text}" for passage in corpus]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever, "words", functools.cache(words))
        return [bm25_score(query, text, texts, k1, b) for text in texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Vitamin C, x_y; the 的Ö!", ["vitamin", "c", "x_y", "the", "的ö"]),
        ("Apollo 8's\tcrew\n", ["apollo", "8", "s", "crew"]),
        ("ÉCOLE Σοφός", ["école", "σοφός"]),
        ("?! ...", []),
        ("", []),
    ],
)
def test_words_are_lower_cased_runs_of_letters_digits_and_underscores(text, expected):
    assert words(text) == expected


def test_a_letter_that_becomes_two_in_lower_case_stays_in_its_word():
    """The lower case of the Turkish İ is an i and a dot above it, and the dot is no letter."""
    assert len(words("İzmir")) == 1 and words("İzmir") != words("Izmir")
    assert "i" not in words("İ")
    assert words("Ukpeag\u0307vik") == ["ukpeag\u0307vik"]  # the same dot over another letter
    index = BM25([Passage("0", "", "I sleep"), Passage("1", "", "İzmir lies on the sea")])
    assert index.search(["İ"], 2) == [[]]
    assert [passage.id for passage in index.search(["in İzmir"], 2)[0]] == ["1"]


def test_a_score_worked_by_hand():
    # N = 2. "cat": df 1, idf = ln(1 + 1.5 / 1.5) = ln 2. Both passages have 2 words, so
    # norm = .9; tf = 2 in the first: ln 2 * 2 / 2.9.
    corpus = [Passage("0", "cat", "cat"), Passage("1", "dog", "dog")]
    index, texts = BM25(corpus), ["cat cat", "dog dog"]
    by_hand = math.log(2) * 2 / 2.9
    assert index.scores("cat") == pytest.approx([by_hand, 0.0])
    # Query words count with multiplicity.
    assert index.scores("cat Cat") == pytest.approx([2 * by_hand, 0.0])
    assert index.scores("cat").dtype == np.float32
    # The plain formula agrees. It also knows other k1 and b: a norm of 2 (1 - .5 + .5 * 4 / 3).
    assert [bm25_score("cat Cat", text, texts) for text in texts] == [2 * by_hand, 0.0]
    longer = ["cat cat cat dog", "dog dog"]
    by_hand = math.log(2) * 3 / (3 + 2 * (0.5 + 0.5 * 4 / 3))
    assert bm25_score("a cat", longer[0], longer, 2.0, 0.5) == pytest.approx(by_hand)


@pytest.mark.parametrize("seed", range(20))
def test_scores_and_ranking_equal_the_oracle_on_random_corpora(seed):
    rng = random.Random(seed)
    vocabulary = ["a", "b", "c8", "ö", "的", "Vitamin", "C", "x_y"]
    text = lambda most: " ".join(rng.choices(vocabulary, k=rng.randrange(most)))  # noqa: E731
    corpus = [Passage(str(i), text(3), text(12)) for i in range(rng.randrange(1, 40))]
    k1, b = rng.choice([(0.9, 0.4), (1.2, 0.75), (2.0, 0.0)])
    for index, how in ((BM25(corpus), ()), (BM25(corpus, k1, b), (k1, b))):
        for query in [text(6) for _ in range(10)] + ["", "unheard of"]:
            expected = oracle(corpus, query, *how)
            assert index.scores(query) == pytest.approx(expected, rel=1e-5)
            k = rng.randrange(1, 50)
            ranked = sorted(
                (i for i in range(len(corpus)) if expected[i] > 0),
                key=lambda i: (-np.float32(expected[i]), i),
            )
            found = index.search([query], k)[0]
            best = [expected[i] for i in ranked[:k]]
            assert [p.score for p in found] == pytest.approx(best, rel=1e-5)
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


def test_an_empty_corpus_is_refused():
    with pytest.raises(BadInput, match="the corpus is empty"):
        BM25([])


def test_both_forms_of_corpus_plain_and_gz(tmp_path):
    rows = [
        {"id": 7, "title": "T", "text": "x y"},
        {"id": "8", "contents": '"A title"\nthe\ntext'},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "c.jsonl").write_text(lines)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines)
    expected = [Passage("7", "T", "x y"), Passage("8", "A title", "the\ntext")]
    assert load_corpus(tmp_path / "c.jsonl") == load_corpus(tmp_path / "c.jsonl.gz") == expected
    assert list(read_jsonl(tmp_path / "c.jsonl")) == rows  # as it stands, if no form is asked for


def test_a_byte_order_mark_is_skipped(tmp_path):
    """Some editors write one at the beginning of a file."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "0", "title": "a", "text": "b"}\n', encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert load_corpus(path) == [Passage("0", "a", "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "0", "title": "a", "text": "b"}\n{"id": broken\n', "c.jsonl:2: Expecting value"),
        ('["id"]\n', "c.jsonl:1: expected a JSON object"),
        ('{"id": "0", "title": "a"}\n', "c.jsonl:1: a passage needs"),
        ('{"title": "a", "text": "b"}\n', "c.jsonl:1: a passage needs"),
        ('{"id": "0", "title": 1, "text": "b"}\n', "c.jsonl:1: a passage needs"),
        (b"\xff\xfe\n", "c.jsonl:1: 'utf-8' codec can't decode"),
        ("[" * 10**5, "c.jsonl:1: maximum recursion depth"),
        ("", "c.jsonl: there is nothing in it"),
        ("\n", "there is nothing in it"),
    ],
)
def test_a_malformed_corpus_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "c.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=re.escape(message)) as error:
        load_corpus(path)
    assert str(error.value).startswith(str(path))


def test_a_corpus_that_cannot_be_read_is_refused(tmp_path):
    whole = gzip.compress(b'{"id": "0", "title": "a", "text": "b"}\n' * 1000)
    path = tmp_path / "c.jsonl.gz"
    wrong = bytes([whole[0], whole[1] ^ 1])
    for content in (whole[: len(whole) // 2], b"no gzip", wrong + whole[2:], whole[:-9] + b"x" * 9):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=f"^{re.escape(str(path))}"):
            load_corpus(path)
    missing = tmp_path / "nowhere"
    with pytest.raises(BadInput, match=re.escape(f"{missing}: [Errno 2] No such file")):
        load_corpus(missing)
    with pytest.raises(BadInput, match=re.escape(f"{tmp_path}: [Errno 21]")):
        load_corpus(tmp_path)


# ---------------------------------------------------------------- large enough for every path


def many(size: int, seed: int = 0) -> list[Passage]:
    """Passages over words of all frequencies: in many passages, in some, in a single one."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(300)]
    weights = [1 / (i + 1) for i in range(300)]
    text = lambda: " ".join(rng.choices(vocabulary, weights, k=rng.randrange(30)))  # noqa: E731
    return [Passage(str(i), f"Title{i}" if i % 3 else "", text()) for i in range(size)]


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1030])
def test_columns_postings_and_blocks_change_nothing(size):
    corpus = many(size)
    index = BM25(iter(corpus))
    assert 0 < (index.column_of >= 0).sum() < len(index.vocabulary) or size == 1
    for query in ["w0", "w0 w1 w7 w7", "w250 w3 w299", "title4 w0", "w1 " * 9, "absent"]:
        scores = index.scores(query)
        assert scores.shape == (size,)
        assert scores == pytest.approx(oracle(corpus, query), rel=1e-5)
        for k in (1, 2, 8, 9, 100, 2 * size):
            best = [i for i in np.argsort(-scores, kind="stable")[:k] if scores[i] > 0]
            rows = [(corpus[i], float(scores[i])) for i in best]
            expected = [Passage(row.id, row.title, row.text, score) for row, score in rows]
            assert index.search([query], k) == [expected]


def test_parity_with_bm25s():
    bm25s = pytest.importorskip("bm25s")
    corpus = many(700, seed=1)
    peer = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    peer.index([words(f"{p.title} {p.text}") for p in corpus], show_progress=False)
    index = BM25(corpus)
    for query in ["w0 w1", "w5 w5 w80", "w299 title7"]:
        assert index.scores(query) == pytest.approx(peer.get_scores(words(query)), abs=1e-4)


# ---------------------------------------------------------------- saved


QUERIES = ["w0 w1 w7", "w250 w299", "title4 w0 w0", "", "absent"]
FILES = [f"{name}.npy" for name in BM25.ARRAYS] + ["source.txt"]


@pytest.mark.parametrize(
    "corpus",
    [
        many(300),
        [Passage("0", "", "")],
        [Passage("\ud800", "a\x00\n\u2028\"", "\ud83d <answer> \U0001f600 İ \u202eright")],
    ],
    ids=["many", "no words", "hostile"],
)
def test_saved_equals_unsaved(tmp_path, corpus):
    index = BM25(corpus, k1=1.2, b=0.7, source="a corpus")
    index.save(tmp_path / "new" / "index")
    loaded = BM25.load(tmp_path / "new" / "index")
    assert isinstance(loaded.docs.base, np.memmap)
    assert (loaded.source, loaded.size) == ("a corpus", len(corpus))
    for query in QUERIES + ["answer right", "İ"]:
        assert (loaded.scores(query) == index.scores(query)).all()
        assert loaded.search([query], 5) == index.search([query], 5)
    assert [loaded.passage(i) for i in range(len(corpus))] == corpus


DAMAGES = ["missing", "truncated", "halved", "emptied", "pickled"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((f"{name}.npy", damage) for name in BM25.ARRAYS for damage in DAMAGES),
        ("source.txt", "missing"),  # open_index compares the rest of it: see below
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, damage):
    folder = tmp_path / "index"
    BM25(many(200), source="x" * 64).save(folder)
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "pickled":
        np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
    else:
        size = {"truncated": len(content) - 1, "halved": len(content) // 2, "emptied": 0}[damage]
        path.write_bytes(content[:size])
    with pytest.raises(BadInput, match=f"{re.escape(str(folder))} holds no usable index"):
        BM25.load(folder)


class Bomb:
    """Unpickling this ends the process."""

    def __reduce__(self):
        return (os._exit, (1,))


def test_a_folder_without_an_index_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match=f"{re.escape(str(folder))} holds no usable index"):
            BM25.load(folder)


class Killed(BaseException):
    """What nothing catches, like kill -9."""


def dies_at(monkeypatch, step: int) -> None:
    """Let the step-th of all the calls by which a save changes the disk raise Killed. One that
    writes a file has written something of it by then."""
    calls = iter(range(1000))

    def dying(function, writes):
        def call(path, *args, **kwargs):
            if next(calls) != step:
                return function(path, *args, **kwargs)
            if writes:
                path.write_bytes(b"half a file")
            raise Killed

        return call

    monkeypatch.setattr(np, "save", dying(np.save, writes=True))
    monkeypatch.setattr(Path, "write_text", dying(Path.write_text, writes=True))
    monkeypatch.setattr(Path, "replace", dying(Path.replace, writes=False))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink, writes=False))


STEPS = 2 * len(BM25.ARRAYS) + 2  # source.txt goes; each array is written, renamed; source.txt


@pytest.mark.parametrize("step", range(STEPS))
def test_a_save_that_dies_leaves_no_index_and_the_next_one_is_whole(
    tmp_path, monkeypatch, capsys, step
):
    """Only before its first step, which removes source.txt, is the old index still there."""
    corpus, folder = tmp_path / "c.jsonl", tmp_path / "c.jsonl.bm25"
    write(corpus, many(50, seed=1))
    old = open_index(corpus, save=True)
    write(corpus, many(60, seed=2))
    new = BM25(load_corpus(corpus), source=source_of(corpus))
    with monkeypatch.context() as patch:
        dies_at(patch, step)
        with pytest.raises(Killed):
            new.save(folder)
    if step == 0:
        assert BM25.load(folder).search(QUERIES, 3) == old.search(QUERIES, 3)
    elif step < STEPS - 1:
        with pytest.raises(BadInput, match="holds no usable index"):
            BM25.load(folder)
    assert open_index(corpus).search(QUERIES, 3) == new.search(QUERIES, 3)
    assert "It is built anew" in capsys.readouterr().err
    new.save(folder)
    assert open_index(corpus).search(QUERIES, 3) == new.search(QUERIES, 3)
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)  # no half file is left


def test_a_save_has_no_further_step(tmp_path, monkeypatch):
    """So the test above lets it die at each of them."""
    index = BM25(many(3))
    index.save(tmp_path)
    with monkeypatch.context() as patch:
        dies_at(patch, STEPS - 1)
        with pytest.raises(Killed):
            index.save(tmp_path)
    with monkeypatch.context() as patch:
        dies_at(patch, STEPS)
        index.save(tmp_path)


def test_a_save_does_not_disturb_who_has_the_old_index_open(tmp_path):
    old, new = BM25(many(300, seed=1)), BM25(many(20, seed=2))
    old.save(tmp_path)
    opened = BM25.load(tmp_path)
    new.save(tmp_path)
    assert opened.search(QUERIES, 9) == old.search(QUERIES, 9)
    assert BM25.load(tmp_path).search(QUERIES, 9) == new.search(QUERIES, 9)


def test_a_save_that_cannot_write_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        run_script(lambda: BM25(many(3)).save(tmp_path / "file" / "index"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and str(tmp_path / "file") in said and said.count("\n") == 1


def write(path, passages) -> None:
    rows = ({"id": p.id, "title": p.title, "text": p.text} for p in passages)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def source_of(path) -> str:
    return retriever.hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def corpus(tmp_path):
    """A corpus file with a saved index beside it."""
    path = tmp_path / "c.jsonl"
    write(path, many(30))
    open_index(path, save=True)
    return path


def test_an_index_is_saved_only_when_asked(tmp_path):
    write(tmp_path / "c.jsonl", many(30))
    open_index(tmp_path / "c.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
    open_index(tmp_path / "c.jsonl", save=True)
    saved = tmp_path / "c.jsonl.bm25"
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    assert BM25.load(saved).source == source_of(tmp_path / "c.jsonl")


@pytest.mark.parametrize("age", [-1000, 0, 1000])
def test_a_saved_index_is_used_whatever_the_dates_say(corpus, monkeypatch, capsys, age):
    """Also in another place and by another name."""
    expected = BM25(load_corpus(corpus)).search(QUERIES, 3)
    moved = corpus.with_name("moved.jsonl")
    shutil.copy(corpus, moved)
    shutil.copytree(f"{corpus}.bm25", f"{moved}.bm25")
    monkeypatch.setattr(retriever, "to_passage", None)  # no passage may be read now
    for path in (corpus, moved):
        os.utime(path, (time.time() + age,) * 2)
        assert open_index(path).search(QUERIES, 3) == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("age", [-1000, 0, 1000])
def test_an_index_of_other_content_is_built_anew(corpus, capsys, age):
    """Even if the changed corpus has the same size and is older than the index."""
    changed = corpus.read_text().replace("w1 ", "w7 ")
    assert changed != corpus.read_text() and len(changed) == len(corpus.read_text())
    corpus.write_text(changed)
    os.utime(corpus, (time.time() + age,) * 2)
    expected = BM25(load_corpus(corpus)).search(QUERIES, 3)
    for save in (False, True):
        assert open_index(corpus, save).search(QUERIES, 3) == expected
        said = capsys.readouterr().err
        assert f"{corpus}.bm25 is the index of another corpus. It is built anew" in said
    assert open_index(corpus).search(QUERIES, 3) == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "emptied"])
def test_a_damaged_index_is_built_anew_with_a_word(corpus, capsys, name, damage):
    path = Path(f"{corpus}.bm25") / name
    path.unlink()
    if damage == "emptied":
        path.touch()
    expected = BM25(load_corpus(corpus)).search(QUERIES, 3)
    for save in (False, True):
        assert open_index(corpus, save).search(QUERIES, 3) == expected
        said = capsys.readouterr().err
        assert said.startswith(f"{corpus}.bm25 ") and said.endswith("It is built anew\n")
        assert said.count("\n") == 1
    assert open_index(corpus).search(QUERIES, 3) == expected
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- a retrieval server


@pytest.fixture
def server():
    """A server with the answers that a test sets: (status, body), raw pieces of a response, or a
    function that makes one of these from the request. The last answer is given again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request)
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            answer = answer(request) if callable(answer) else answer
            try:
                if isinstance(answer, tuple):
                    status, body = answer
                    body = body if isinstance(body, bytes) else json.dumps(body).encode()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    answer = [body]
                for piece in answer:
                    self.wfile.write(piece)
            except OSError:  # the client has given up
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.answers = [], [found]
    server.url = f"http://127.0.0.1:{server.server_port}/retrieve"
    often = dict(poll_interval=0.01)  # so that shutdown(), which waits for a poll, is quick
    threading.Thread(target=server.serve_forever, kwargs=often, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def found(request):
    """What Search-R1's server answers."""

    def hit(query, n):
        document = {"id": str(n), "contents": f'"About {query}"\ntext {n}'}
        return {"document": document, "score": 1.0 / (n + 1)}

    hits = [[hit(query, n) for n in range(request["topk"])] for query in request["queries"]]
    return 200, {"result": hits}


def test_the_remote_retriever_speaks_search_r1s_protocol(server):
    remote = RemoteRetriever(server.url)
    assert remote.search(["a", "ö"], 2) == [
        [Passage("0", "About a", "text 0", 1.0), Passage("1", "About a", "text 1", 0.5)],
        [Passage("0", "About ö", "text 0", 1.0), Passage("1", "About ö", "text 1", 0.5)],
    ]
    assert server.requests == [{"queries": ["a", "ö"], "topk": 2, "return_scores": True}]
    assert remote.search([], 3) == [] and len(server.requests) == 1


def test_a_hit_may_lack_its_score_and_its_id_and_more_than_k_are_cut(server):
    hit = {"document": {"contents": "T\na b"}}
    server.answers = [(200, {"result": [[hit, hit | {"score": 2}, hit], []]})]
    found = RemoteRetriever(server.url).search(["a", "b"], 2)
    assert found == [[Passage("", "T", "a b", 0.0), Passage("", "T", "a b", 2.0)], []]


def test_what_may_pass_is_tried_again(server):
    server.answers = [(500, b"busy"), (429, b"too many"), (503, b"busy"), found]
    assert len(RemoteRetriever(server.url, pause=0.01).search(["a"], 1)[0]) == 1
    assert len(server.requests) == 4
    for tries, status in enumerate((500, 429), start=1):
        server.answers = [(status, b"busy")]
        message = f"no answer from {server.url} in 3 attempts .*{status}"
        with pytest.raises(BadInput, match=message):
            RemoteRetriever(server.url, retries=2, pause=0.01).search(["a"], 1)
        assert len(server.requests) == 4 + 3 * tries


def test_each_pause_is_twice_the_one_before(server, monkeypatch):
    server.answers, pauses = [(500, b"busy")], []
    monkeypatch.setattr(retriever.time, "sleep", pauses.append)
    with pytest.raises(BadInput, match="in 4 attempts"):
        RemoteRetriever(server.url, retries=3, pause=1.5).search(["a"], 1)
    assert [pause for pause in pauses if pause] == [1.5, 3.0, 6.0]


def test_a_slow_server_times_out(server):
    server.answers = [lambda request: (time.sleep(1), found(request))[1]]
    message = f"no answer from {server.url} in 2 attempts .*[Tt]ime"
    with pytest.raises(BadInput, match=message):
        RemoteRetriever(server.url, timeout=0.1, retries=1, pause=0.01).search(["a"], 1)


@pytest.mark.parametrize(
    ("head", "piece"),
    [(b"HTTP/1.0 200 OK\r\n", b"x: y\r\n"), (b"HTTP/1.0 200 OK\r\n\r\n", b"[")],
    ids=["headers", "body"],
)
def test_a_server_that_drips_times_out(server, head, piece):
    """Each piece comes soon enough for a socket's timeout, but the whole takes far too long."""

    def drip(request):
        yield head
        for _ in range(80):
            time.sleep(0.1)
            yield piece

    server.answers, began = [drip], time.monotonic()
    with pytest.raises(BadInput, match=f"no answer from {server.url} in 2 attempts .*[Tt]ime"):
        RemoteRetriever(server.url, timeout=0.5, retries=1, pause=0.01).search(["a"], 1)
    assert 1.0 <= time.monotonic() - began < 5.0 and len(server.requests) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, b"no such page"), "in 1 attempts .*404"),
        ((200, b"<html>"), "not answer in Search-R1's form"),
        ((200, b"[" * 10**5), "not answer in Search-R1's form"),
        ((200, b"\xff"), "not answer in Search-R1's form"),
        ((200, {"error": "no"}), "not answer in Search-R1's form"),
        ((200, []), "not answer in Search-R1's form"),
        ((200, {"result": [["a"]]}), "not answer in Search-R1's form"),
        ((200, {"result": [[{"score": 1}]]}), "not answer in Search-R1's form"),
        ((200, {"result": [[{"document": "a", "score": 1}]]}), "not answer in Search-R1's form"),
        (
            (200, {"result": [[{"document": {"contents": 3}, "score": 1}]]}),
            "not answer in Search-R1's form",
        ),
        (
            (200, {"result": [[{"document": {"contents": "a"}, "score": None}]]}),
            "not answer in Search-R1's form",
        ),
        (
            (200, {"result": [[{"document": {"contents": "a"}, "score": 10**400}]]}),
            "not answer in Search-R1's form",
        ),
        ((200, {"result": []}), "0 lists for 1 queries"),
        ((200, {"result": [[], []]}), "2 lists for 1 queries"),
    ],
)
def test_a_wrong_answer_is_not_tried_again(server, answer, message):
    server.answers = [answer]
    with pytest.raises(BadInput, match=message) as error:
        RemoteRetriever(server.url, pause=0.01).search(["a"], 1)
    assert server.url in str(error.value) and len(server.requests) == 1


def test_no_server_at_all():
    message = "no answer from http://127.0.0.1:9/retrieve in 2 attempts .*refused"
    with pytest.raises(BadInput, match=message):
        RemoteRetriever("http://127.0.0.1:9/retrieve", retries=1, pause=0.01).search(["a"], 1)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000/retrieve", "ftp://127.0.0.1/", "http://", "http:///retrieve", "",
        "http://host/with a space", "http://host/é", "http://host:port/", "http://host/\n",
        "http://me:secret@host/",
    ],
)  # fmt: skip
def test_what_is_no_url_is_refused(url):
    with pytest.raises(BadInput, match="a retriever's URL is http:// or https://") as error:
        RemoteRetriever(url)
    assert "secret" not in str(error.value)  # it would stand in a log


@pytest.mark.parametrize("url", ["http://[::1]:80/a?b=c", "https://a-b.example.org.", "http://h:1"])
def test_what_is_a_url_is_not_refused(url):
    assert RemoteRetriever(url).url == url


def test_the_proxies_of_the_environment_are_not_used(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert RemoteRetriever(server.url, retries=0).search(["a"], 1)[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_with_the_whole_request(server, status):
    head = f"HTTP/1.0 {status} Elsewhere\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
    server.answers = [lambda request: [head.encode()], found]
    assert RemoteRetriever(server.url, retries=0).search(["a"], 1)[0][0].title == "About a"
    assert server.requests == [{"queries": ["a"], "topk": 1, "return_scores": True}] * 2


# ---------------------------------------------------------------- the command


@pytest.fixture
def script(monkeypatch, capsys):
    """Run retriever.py in this process: its exit status and what it wrote to both streams."""
    return functools.partial(run_here, monkeypatch, capsys, retriever.main, "retriever.py")


def test_the_command(script, corpus):
    arguments = "--corpus", "micro/corpus.jsonl", "the", "Harbor"
    status, printed, said = script(*arguments)
    assert status == 0 and said == ""
    best = load_corpus(ROOT / "micro/corpus.jsonl")
    expected = BM25(best).search(["the Harbor"], 3)[0]
    lines = printed.splitlines()
    assert len(lines) == 3
    for line, passage in zip(lines, expected):
        score, text = line.split("  ", 1)
        assert score == f"{passage.score:.4f}"
        assert text.replace("*", "") == f"{passage.title}: {passage.text}"
        marked = re.findall(r"\*(\w+)\*", text)  # the words that matched, and all of them
        assert {word.lower() for word in marked} <= {"the", "harbor"}
        assert len(marked) == sum(word in ("the", "harbor") for word in words(text))
    assert "*Harbor*" in printed
    assert script(*arguments, "--k", 1) == (0, lines[0] + "\n", "")
    assert script("--corpus", corpus, "nowhere to be found") == (0, "", "")


def test_the_command_saves_an_index_when_asked(script, tmp_path):
    path, saved = tmp_path / "c.jsonl", tmp_path / "c.jsonl.bm25"
    write(path, many(30))
    first = script("--corpus", path, "w0", "w1")
    assert first[0] == 0 and first[1] and not saved.exists()
    for _ in range(2):  # builds and saves; loads
        assert script("--corpus", path, "--save", "w0", "w1") == first
        assert saved.is_dir()
    (saved / "starts.npy").write_bytes(b"damaged")
    status, printed, said = script("--corpus", path, "w0", "w1")
    assert (status, printed) == first[:2]
    assert "holds no usable index" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--corpus", "nowhere", "x"), "No such file or directory: 'nowhere'"),
        (("--corpus", "micro", "x"), "Is a directory: 'micro'"),
        (("--corpus", "README.md", "x"), "README.md:1: Expecting value"),
        (("--corpus", "/dev/null", "x"), "/dev/null: there is nothing in it"),
        (("--corpus", "micro/corpus.jsonl"), "query"),
        (("--corpus", "micro/corpus.jsonl", "--frobnicate", "x"), "--frobnicate"),
        (("--corpus", "micro/corpus.jsonl", "--k", "0", "x"), "k must be at least 1, not 0"),
        (("--corpus", "micro/corpus.jsonl", "--k", "many", "x"), "--k: invalid int value: 'many'"),
    ],
)
def test_the_command_refuses_in_one_line(script, arguments, message):
    status, printed, said = script(*arguments)
    assert (status, printed, said.count("\n")) == (2, "", 1), said
    assert said.startswith("retriever.py: ") and message in said


def test_a_script_ends_with_one_line(monkeypatch, capsys):
    """Whatever the text of an error is; and an error can carry notes."""
    monkeypatch.setattr(sys, "argv", ["some/where/script.py"])

    def ends(error) -> tuple[int, str]:
        def main():
            raise error

        with pytest.raises(SystemExit) as end:
            run_script(main)
        return end.value.code, capsys.readouterr().err

    status, said = ends(BadInput("wrong:\n\nthis\r\n"))
    assert status == 2 and said.split() == ["script.py:", "wrong:", "this"]
    assert said.count("\n") == 1 and said.endswith("\n")
    assert ends(BadInput("\x1b[31m\ud800")) == (2, "script.py: \\x1b[31m\\ud800\n")
    assert ends(PermissionError(13, "No", "x")) == (2, "script.py: [Errno 13] No: 'x'\n")
    assert ends(KeyboardInterrupt()) == (130, "script.py: stopped\n")
    noted = KeyboardInterrupt()
    noted.add_note("Go on with this")
    assert ends(noted) == (130, "script.py: stopped. Go on with this\n")
    with pytest.raises(ZeroDivisionError):  # a bug is no bad input: it keeps its traceback
        run_script(lambda: 1 / 0)
    run_script(lambda: print("\ud800"))  # what cannot be encoded is shown as an escape
    assert capsys.readouterr().out == "\\ud800\n"


def test_a_passage_may_carry_a_score():
    row = {"id": 1, "contents": '" A "\nb'}
    assert to_passage(row, 2.5) == Passage("1", " A ", "b", 2.5)
    assert to_passage(row).score == 0.0
    with pytest.raises(ValueError, match="a passage needs"):
        to_passage({"id": 1, "contents": None})
