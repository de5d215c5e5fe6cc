"""eval.py: SQuAD's scores on worked examples, what counts as supported, and the loader of questions."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest

import eval as eval_module
from eval import (
    BENCHMARKS, PUBLISHED, averages, evaluate, exact_match, f1_score, interval, load_mixture, load_questions, normalize_answer, score, supported,
)  # fmt: skip
from retriever import BadInput, Passage
from rollout import Trajectory

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles", "beatles"),
        ("  a  CAT, an owl; the dog ", "cat owl dog"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),  # an article only as a whole word
        ("Café—Noir", "café—noir"),  # the dash is not ASCII: it stays
        ("the", ""),
        ("", ""),
        ("1,000", "1000"),
    ],
)
def test_normalisation(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "golden", "em", "f1"),
    [
        ("Paris", ["Paris"], 1.0, 1.0),
        ("the paris!", ["London", "Paris"], 1.0, 1.0),
        ("Paris France", ["Paris"], 0.0, 2 / 3),  # precision 1/2, recall 1
        ("a b c", ["b c d e"], 0.0, 4 / 6),  # the article goes: 2 shared of 2, of 4
        ("to be to be", ["to be"], 0.0, 2 / 3),  # a bag: precision 2/4, recall 1
        ("Zürich", ["Zurich"], 0.0, 0.0),  # no folding
        ("", ["Paris"], 0.0, 0.0),
        (None, ["Paris"], 0.0, 0.0),
        ("the", ["the"], 0.0, 0.0),  # empty once normalised
    ],
)
def test_scores_against_worked_examples(prediction, golden, em, f1):
    assert exact_match(prediction, golden) == em
    assert f1_score(prediction, golden) == pytest.approx(f1)


def answered(answer, *texts, queries=()):
    found = [[Passage(str(i), "", text) for i, text in enumerate(texts)]]
    return Trajectory("?", [], answer=answer, passages=found, queries=list(queries))


def test_supported_means_in_an_own_passage_as_whole_words():
    assert supported(answered("The Rome", "nothing", "He went to Rome."))
    assert not supported(answered("Rome", "the Romeo"))
    assert not supported(answered("Rome"))
    assert not supported(answered(None, "Rome"))
    assert not supported(answered("the", "the"))


def test_score_adds_up():
    questions = [{"golden_answers": ["Rome"], "hops": 1}, {"golden_answers": ["Oslo"], "hops": 2}, {"golden_answers": ["x"], "hops": 2}]
    rows = [answered("Rome", "Rome", queries=["q"]), answered("Oslo", "Rome", queries=["q", "r"]), answered(None)]
    result = score(questions, rows)
    assert result["em"] == result["f1"] == pytest.approx(2 / 3)
    assert result["em_supported"] == pytest.approx(1 / 3)  # Oslo was a guess
    assert (result["searches"], result["answered"], result["n"]) == (1, pytest.approx(2 / 3), 3)
    assert result["em_by"] == {"1-hop": 1.0, "2-hop": 0.5}
    with pytest.raises(ValueError):
        score(questions, rows[:2])


def test_questions_plain_and_gz(tmp_path):
    row = {"id": 3, "question": "Who?", "golden_answers": ["me"], "hops": 2}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    assert load_questions(str(tmp_path / "q.jsonl")) == load_questions(str(tmp_path / "q.jsonl.gz")) == [{**row, "id": "3"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"golden_answers": ["x"]}', 'q.jsonl:1: "question" is missing'),
        ('{"question": " ", "golden_answers": ["x"]}', 'q.jsonl:1: "question" is missing'),
        ('{"question": "Who?"}', 'q.jsonl:1: "golden_answers" must'),
        ('{"question": "Who?", "golden_answers": []}', 'q.jsonl:1: "golden_answers" must'),
        ('{"question": "Who?", "golden_answers": "me"}', 'q.jsonl:1: "golden_answers" must'),
        ('{"question": "Who?", "golden_answers": [""]}', 'q.jsonl:1: "golden_answers" must'),
        ("{", "q.jsonl:1: not a line of JSON"),
        ("", "no questions in it"),
    ],
)
def test_malformed_questions_are_refused_with_their_line(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(BadInput, match=re.escape(message)):
        load_questions(str(tmp_path / "q.jsonl"))


def test_evaluate_is_greedy_and_deterministic(micro, micro_index):
    questions = load_questions("micro/validation.jsonl")[:8]
    first, second = (evaluate(*micro, micro_index, questions) for _ in range(2))
    assert first == second and first["n"] == 8 and 0 <= first["em"] <= 1


def test_the_command(command, refused, tmp_path):
    ask = ["eval.py", "--model", "micro/model", "--questions", "micro/test.jsonl", "--corpus", "micro/corpus.jsonl"]
    done = command(*ask, "--limit", 3)
    assert done.returncode == 0 and json.loads(done.stdout)["n"] == 3
    assert "no such file" in refused(*ask[:3], "--questions", "nowhere", *ask[5:])
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert "cannot load" in refused("eval.py", "--model", tmp_path, *ask[3:])
    assert "not a model folder" in refused("eval.py", "--model", "tests", *ask[3:])
    for flag in ("--limit", "--k"):
        assert f"{flag}: expected a whole number of at least 1" in refused(*ask, flag, 0)
    assert "--max-searches" in refused(*ask, "--max-searches", -1)


def test_intervals_and_averages():
    """Wilson: 0 of 10 is 0 to 3.8416 / 13.8416; half of 100 is .404 to .596. Averages count each set once."""
    assert interval(0.0, 10) == (pytest.approx(0.0), pytest.approx(0.27754, abs=1e-4))
    assert interval(0.5, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    published = {name: {"em": em} for name, em in zip(BENCHMARKS, PUBLISHED["Search-E1"], strict=True)}
    assert averages(published)["average"] == pytest.approx(0.440, abs=5e-4)
    assert averages({"nq": {"em": 0.2}, "popqa": {"em": 0.4}, "musique": {"em": 0.1}}) == pytest.approx(
        {"single-hop": 0.3, "multi-hop": 0.1, "average": 0.7 / 3}
    )


def test_benchmarks_from_a_folder(command, tmp_path):
    for name, suffix in (("nq", ""), ("musique", ".gz")):
        (tmp_path / name).mkdir()
        for file in ("questions", "corpus"):
            source = "test" if file == "questions" else file
            lines = (ROOT / f"micro/{source}.jsonl").read_bytes().splitlines(keepends=True)
            packed = gzip.compress if suffix else bytes
            (tmp_path / name / f"{file}.jsonl{suffix}").write_bytes(packed(b"".join(lines[: 40 if file == "questions" else None])))
    out = tmp_path / "result.json"
    how = "--model", "micro/model", "--benchmarks", "nq,musique", "--data", tmp_path, "--limit", "20", "--out", out, "--published"
    done = command("eval.py", *how)
    assert done.returncode == 0, done.stderr
    saved = json.loads(out.read_text())
    assert {"model", "retriever", "k", "max_searches", "prompt", "commit", "averages"} <= saved.keys()
    one, two = saved["results"]["nq"], saved["results"]["musique"]
    assert one["n"] == 20 and one["em"] == two["em"] > 0 and one["em_interval"][0] < one["em"] < one["em_interval"][1]
    assert one["corpus"].endswith("nq/corpus.jsonl") and two["questions"].endswith("musique/questions.jsonl.gz")
    assert "single-hop" in done.stdout and "Search-E1" in done.stdout and "0.440" in done.stdout


def test_a_result_by_a_server_names_no_corpus(micro_index, tmp_path, monkeypatch):
    """Also where --data holds one."""
    (tmp_path / "nq").mkdir()
    (tmp_path / "nq/questions.jsonl").write_bytes((ROOT / "micro/test.jsonl").read_bytes())
    out = tmp_path / "result.json"
    monkeypatch.setattr(eval_module, "RemoteRetriever", lambda url, **how: micro_index)
    how = "--model", str(ROOT / "micro/model"), "--benchmarks", "nq", "--data", str(tmp_path), "--limit", "5", "--out", str(out)
    monkeypatch.setattr(sys, "argv", ["eval.py", *how, "--retriever-url", "http://here"])
    eval_module.main()
    saved = json.loads(out.read_text())
    row = saved["results"]["nq"]
    assert saved["retriever"] == "http://here" and row["corpus"] is None and row["failed_searches"] == 0


def test_a_mixture_is_all_its_sets_and_no_test_question(tmp_path):
    rows = [{"id": str(i), "question": f"Who is {name}?", "golden_answers": ["x"]} for i, name in enumerate("abcd")]
    for name, part in (("one", rows[:2]), ("two", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    specs = f"{tmp_path}/one.jsonl,{tmp_path}/two.jsonl"
    assert [row["question"] for row in load_mixture(specs, [])] == [row["question"] for row in rows]
    with pytest.raises(BadInput, match=r"two.jsonl: 1 training questions are test questions, such as 'Who is d\?'"):
        load_mixture(specs, [{"question": "who is D"}])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--benchmarks", "nq,trivia", "--data", "x"), "trivia?"),
        (("--benchmarks", "nq", "--data", "nowhere"), "nowhere/nq/questions.jsonl"),
        (("--benchmarks", "nq"), "where to search?"),
        (("--questions", "micro/test.jsonl", "--corpus", "micro/nowhere.jsonl"), "no such file: micro/nowhere.jsonl"),
        (("--questions", "micro/test.jsonl"), "where to search?"),
        (("--questions", "micro/test.jsonl", "--benchmarks", "nq"), "not allowed with"),
    ],
)
def test_benchmarks_that_cannot_be_run_are_refused(refused, arguments, message):
    assert message in refused("eval.py", "--model", "micro/model", *arguments)
