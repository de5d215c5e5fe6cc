"""retriever.py against a brute-force oracle written from the formula, and its loaders."""

import gzip
import json
import math
import random
import re

import numpy as np
import pytest

from retriever import BM25, BadInput, Passage, load_corpus


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


def test_the_command(command, refused, tmp_path):
    done = command("retriever.py", "--corpus", "micro/corpus.jsonl", "the", "Harbor")
    assert done.returncode == 0 and done.stdout.startswith("1. ") and "Harbor" in done.stdout
    assert "no such file: nowhere" in refused("retriever.py", "--corpus", "nowhere", "x")
    assert "--frobnicate" in refused("retriever.py", "--corpus", "micro/corpus.jsonl", "--frobnicate", "x")
