"""retriever.py: the index against the plain formula, saved, and by the command."""

import functools
import math
import os
import random
import re
import shutil
import time
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from conftest import ROOT, run_here

import retriever
from machinery.errors import BadInput
from machinery.json_lines import write_jsonl
from machinery.saved_index import checksum
from retriever import (
    BM25,
    Passage,
    best_first,
    bm25_score,
    load_corpus,
    open_index,
    words,
)


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
    """The lower case of the Turkish İ is an i and a dot, and the dot is no letter."""
    assert len(words("İzmir")) == 1
    assert words("İzmir") != words("Izmir")
    assert "i" not in words("İ")
    assert words("Ukpeag\u0307vik") == ["ukpea\u0121vik"]  # a dot over another letter
    assert words("Aq\u0307b") == ["aq\u0307b"]  # which is in no one piece
    index = BM25([Passage("0", "", "I sleep"), Passage("1", "", "İzmir lies by a sea")])
    assert index.search(["İ"], 2) == [[]]
    assert [passage.id for passage in index.search(["in İzmir"], 2)[0]] == ["1"]


# "Café Ångström" with accents in one piece, apart, and with the sign of the unit.
ONE_PIECE = "Caf\u00e9 \u00c5ngstr\u00f6m"
FORMS = [ONE_PIECE, "Cafe\u0301 A\u030angstro\u0308m", "Cafe\u0301 \u212bngstr\u00f6m"]


@pytest.mark.parametrize("written", FORMS)
@pytest.mark.parametrize("asked", FORMS)
def test_an_accent_apart_from_its_letter_is_the_same_as_in_one_piece(written, asked):
    assert words(written) == words(asked) == ["caf\u00e9", "\u00e5ngstr\u00f6m"]
    index = BM25([Passage("0", "", written), Passage("1", "", "Cafe Angstrom")])
    assert [passage.id for passage in index.search([asked], 2)[0]] == ["0"]
    assert index.search([asked], 1)[0][0].text == written  # shown as it was written
    one_piece = BM25([Passage("0", "", ONE_PIECE), Passage("1", "", "Cafe Angstrom")])
    assert index.scores(asked).tolist() == one_piece.scores(ONE_PIECE).tolist()


@pytest.mark.parametrize(
    "text",
    ["\u1109\u1165\u110b\u116e\u11af", "I\u0307zmir", "H\u0331a", "\u1fb3\u0301"],
)
def test_any_text_has_the_same_words_in_both_normal_forms(text):
    """Among them Korean in letters, and what has another length in lower case."""
    forms = [text, normalize("NFC", text), normalize("NFD", text)]
    assert words(forms[0]) == words(forms[1]) == words(forms[2]) != []


def test_a_word_with_its_accents_apart_is_marked():
    starred = retriever.starred("a Cafe\u0301, a cafe", "caf\u00e9")
    assert starred == "a *Caf\u00e9*, a cafe"


def test_a_score_worked_by_hand():
    # N = 2. "cat": df 1, idf = ln(1 + 1.5 / 1.5) = ln 2. Both passages have 2 words, so
    # norm = .9; tf = 2 in the first: ln 2 * 2 / 2.9.
    corpus = [Passage("0", "cat", "cat"), Passage("1", "dog", "dog")]
    index = BM25(corpus)
    texts = ["cat cat", "dog dog"]
    by_hand = math.log(2) * 2 / 2.9
    assert index.scores("cat") == pytest.approx([by_hand, 0.0])
    # Query words count with multiplicity.
    assert index.scores("cat Cat") == pytest.approx([2 * by_hand, 0.0])
    assert index.scores("cat").dtype == np.float32
    # The plain formula agrees. It also knows other k1 and b: a norm of
    # 2 (1 - .5 + .5 * 4 / 3).
    assert [bm25_score("cat Cat", text, texts) for text in texts] == [2 * by_hand, 0.0]
    longer = ["cat cat cat dog", "dog dog"]
    by_hand = math.log(2) * 3 / (3 + 2 * (0.5 + 0.5 * 4 / 3))
    score = bm25_score("a cat", longer[0], longer, 2.0, 0.5)
    assert score == pytest.approx(by_hand)


@pytest.mark.parametrize("seed", range(20))
def test_scores_and_ranking_equal_the_oracle_on_random_corpora(seed):
    rng = random.Random(seed)
    vocabulary = ["a", "b", "c8", "ö", "的", "Vitamin", "C", "x_y"]

    def text(most):
        return " ".join(rng.choices(vocabulary, k=rng.randrange(most)))

    size = rng.randrange(1, 40)
    corpus = [Passage(str(i), text(3), text(12)) for i in range(size)]
    k1, b = rng.choice([(0.9, 0.4), (1.2, 0.75), (2.0, 0.0)])
    for index, settings in ((BM25(corpus), ()), (BM25(corpus, k1, b), (k1, b))):
        queries = [text(6) for _ in range(10)]
        for query in [*queries, "", "unheard of"]:
            expected = oracle(corpus, query, *settings)
            scores = index.scores(query)
            assert scores == pytest.approx(expected, rel=1e-5)
            k = rng.randrange(1, 50)
            passages = index.search([query], k)[0]
            best = sorted((score for score in expected if score > 0), reverse=True)[:k]
            assert [p.score for p in passages] == pytest.approx(best, rel=1e-5)
            order = np.argsort(-scores, kind="stable")[: len(passages)]
            assert [int(p.id) for p in passages] == order.tolist()  # ties as they come


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


# ------------------------------------------------ large enough for every path


def many(size: int, seed: int = 0) -> list[Passage]:
    """Passages over words of all frequencies: in many passages, in some, in one."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(300)]
    weights = [1 / (i + 1) for i in range(300)]
    corpus = []
    for i in range(size):
        text = " ".join(rng.choices(vocabulary, weights, k=rng.randrange(30)))
        corpus.append(Passage(str(i), f"Title{i}" if i % 3 else "", text))
    return corpus


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1030])
def test_columns_postings_and_blocks_change_nothing(size):
    corpus = many(size)
    index = BM25(iter(corpus))
    columns = (index.row_of >= 0).sum()
    assert 0 < columns < len(index.vocabulary) or size == 1
    for query in (
        "w0",
        "w0 w1 w7 w7",
        "w250 w3 w299",
        "title4 w0",
        "w1 " * 9,
        "absent",
    ):
        scores = index.scores(query)
        assert scores.shape == (size,)
        assert scores == pytest.approx(oracle(corpus, query), rel=1e-5)
        for k in (1, 2, 8, 9, 100, 2 * size):
            expected = []
            for i in np.argsort(-scores, kind="stable")[:k]:
                if scores[i] > 0:
                    passage = corpus[i]
                    score = float(scores[i])
                    expected.append(
                        Passage(passage.id, passage.title, passage.text, score)
                    )
            assert index.search([query], k) == [expected]


@pytest.mark.parametrize("size", [1, 512, 513, 2000])
def test_the_best_are_those_of_a_whole_sort(size):
    rng = np.random.default_rng(size)
    scores = rng.integers(0, 9, size).astype(np.float32)  # many ties, and zeros
    for k in (1, 2, 4, 5, 2000):
        expected = np.argsort(-scores, kind="stable")[:k]
        expected = expected[scores[expected] > 0]
        assert best_first(scores, k).tolist() == expected.tolist()


def test_parity_with_bm25s():
    bm25s = pytest.importorskip("bm25s")
    corpus = many(700, seed=1)
    peer = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    peer.index([words(f"{p.title} {p.text}") for p in corpus], show_progress=False)
    index = BM25(corpus)
    for query in ["w0 w1", "w5 w5 w80", "w299 title7"]:
        expected = peer.get_scores(words(query))
        assert index.scores(query) == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------ saved


WORDS = {  # what is said of an unusable index, by whether a new one is saved
    True: "Rebuilding it",
    False: "Building one in memory: python retriever.py --save replaces it",
}
QUERIES = ["w0 w1 w7", "w250 w299", "title4 w0 w0", "", "absent"]
STRANGE = Passage(
    "\ud800", 'a\x00\n\u2028"', "\ud83d <answer> \U0001f600 İ \u202eright"
)


@pytest.mark.parametrize(
    "corpus",
    [many(300), [Passage("0", "", "")], [STRANGE]],
    ids=["many", "no words", "hostile"],
)
def test_saved_equals_unsaved(tmp_path, corpus):
    index = BM25(corpus, k1=1.2, b=0.7, source="a corpus")
    index.save(tmp_path / "new" / "index")
    loaded = BM25.load(tmp_path / "new" / "index")
    assert (loaded.source, loaded.size) == ("a corpus", len(corpus))
    for query in [*QUERIES, "answer right", "İ"]:
        assert (loaded.scores(query) == index.scores(query)).all()
        assert loaded.search([query], 5) == index.search([query], 5)
    assert [loaded.passage(i) for i in range(len(corpus))] == corpus
    loaded.save(tmp_path / "copy")  # it can be saved again, too
    again = BM25.load(tmp_path / "copy")
    assert again.search(QUERIES, 5) == index.search(QUERIES, 5)


def test_a_save_does_not_disturb_who_has_the_old_index_open(tmp_path):
    old = BM25(many(300, seed=1))
    new = BM25(many(20, seed=2))
    old.save(tmp_path)
    opened = BM25.load(tmp_path)
    new.save(tmp_path)
    assert opened.search(QUERIES, 9) == old.search(QUERIES, 9)
    assert BM25.load(tmp_path).search(QUERIES, 9) == new.search(QUERIES, 9)


def write(path, passages) -> None:
    write_jsonl(
        path, [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
    )


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
    assert [path.name for path in saved.iterdir()] == ["index"]
    assert BM25.load(saved).source == checksum(tmp_path / "c.jsonl")


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
    before = corpus.read_text()
    changed = before.replace("w1 ", "w7 ")
    assert changed != before
    assert len(changed) == len(before)
    corpus.write_text(changed)
    os.utime(corpus, (time.time() + age,) * 2)
    expected = BM25(load_corpus(corpus)).search(QUERIES, 3)
    for save in (False, True):
        assert open_index(corpus, save).search(QUERIES, 3) == expected
        said = capsys.readouterr().err
        assert f"{corpus}.bm25 is the index of another corpus. {WORDS[save]}" in said
    assert open_index(corpus).search(QUERIES, 3) == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["missing", "emptied", "cut"])
def test_a_damaged_index_is_built_anew_with_a_word(corpus, capsys, damage):
    path = Path(f"{corpus}.bm25") / "index"
    content = path.read_bytes()
    path.unlink()
    if damage == "emptied":
        path.touch()
    if damage == "cut":
        path.write_bytes(content[:-1])
    expected = BM25(load_corpus(corpus)).search(QUERIES, 3)
    for save in (False, True):
        assert open_index(corpus, save).search(QUERIES, 3) == expected
        said = capsys.readouterr().err
        assert said.startswith(f"{corpus}.bm25 holds no usable index")
        assert said.endswith(f"{WORDS[save]}\n")
        assert said.count("\n") == 1
    assert open_index(corpus).search(QUERIES, 3) == expected
    assert capsys.readouterr().err == ""


# ------------------------------------------------ the command


@pytest.fixture
def script(monkeypatch, capsys):
    """Run retriever.py in this process: its exit status and what both streams got."""
    return functools.partial(
        run_here, monkeypatch, capsys, retriever.main, "retriever.py"
    )


def test_the_command(script, corpus):
    arguments = "--corpus", "micro/corpus.jsonl", "the", "Harbor"
    status, printed, said = script(*arguments)
    assert (status, said) == (0, "")
    index = BM25(load_corpus(ROOT / "micro/corpus.jsonl"))
    expected = index.search(["the Harbor"], 3)[0]
    lines = printed.splitlines()
    for line, passage in zip(lines, expected, strict=True):
        score, text = line.split("  ", 1)
        assert score == f"{passage.score:.4f}"
        assert text.replace("*", "") == f"{passage.title}: {passage.text}"
        marked = re.findall(r"\*(\w+)\*", text)  # the words that matched, all of them
        assert {word.lower() for word in marked} <= {"the", "harbor"}
        assert len(marked) == sum(word in ("the", "harbor") for word in words(text))
    assert len(lines) == 3
    assert "*Harbor*" in printed
    assert script(*arguments, "--k", 1) == (0, lines[0] + "\n", "")
    assert script("--corpus", corpus, "nowhere to be found") == (0, "", "")


def test_the_command_saves_an_index_when_asked(script, tmp_path):
    path = tmp_path / "c.jsonl"
    saved = tmp_path / "c.jsonl.bm25"
    write(path, many(30))
    first = script("--corpus", path, "w0", "w1")
    assert first[0] == 0
    assert first[1]
    assert not saved.exists()
    for _ in range(2):  # builds and saves; loads
        assert script("--corpus", path, "--save", "w0", "w1") == first
        assert saved.is_dir()
    (saved / "index").write_bytes(b"damaged")
    status, printed, said = script("--corpus", path, "w0", "w1")
    assert (status, printed) == first[:2]
    assert "holds no usable index" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--corpus", "nowhere", "x"), "No such file or directory: 'nowhere'"),
        (("--corpus", "micro", "x"), "Is a directory: 'micro'"),
        (("--corpus", "README.md", "x"), "README.md:1: Expecting value"),
        (("--corpus", "/dev/null", "x"), "/dev/null: there is nothing in it"),
        (("--corpus", "micro/corpus.jsonl"), "query"),
        (("--corpus", "micro/corpus.jsonl", "--frobnicate", "x"), "--frobnicate"),
        (
            ("--corpus", "micro/corpus.jsonl", "--k", "0", "x"),
            "k must be at least 1, not 0",
        ),
        (
            ("--corpus", "micro/corpus.jsonl", "--k", "many", "x"),
            "--k: invalid int value: 'many'",
        ),
        ((), "python -m lessons.retriever"),
    ],
)
def test_the_command_refuses_in_one_line(script, arguments, message):
    status, printed, said = script(*arguments)
    assert (status, printed, said.count("\n")) == (2, "", 1), said
    assert said.startswith("retriever.py: ")
    assert message in said
