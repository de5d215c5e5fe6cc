"""Sets of questions: machinery/questions.py and machinery/benchmarks.py."""

import gzip
import json
import re
from argparse import Namespace

import pytest
from conftest import ROOT

from machinery import benchmarks
from machinery.benchmarks import BENCHMARKS, question_sets, trained_limits
from machinery.errors import BadInput
from machinery.questions import load_questions, load_training_questions


def write_lines(path, rows):
    """Write a file of JSON lines, and return its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------ files


def test_questions_plain_and_gz(tmp_path):
    row = {"id": 3, "question": "Who?", "golden_answers": ["me"], "hops": 2}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    for name in ("q.jsonl", "q.jsonl.gz"):
        assert load_questions(str(tmp_path / name)) == [{**row, "id": "3"}]


def test_a_question_without_an_id_gets_its_number(tmp_path):
    row = {"question": "Who?", "golden_answers": ["me"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row))
    questions = load_questions(str(tmp_path / "q.jsonl"))
    assert [question["id"] for question in questions] == ["0", "1"]


def test_empty_values_are_left_out(tmp_path):
    row = {"id": "3", "question": "Who?", "golden_answers": ["me"]}
    name = write_lines(tmp_path / "q.jsonl", [{**row, "hops": None}])
    assert load_questions(name) == [row]


def test_a_byte_order_mark_before_the_questions_is_skipped(tmp_path):
    row = {"id": "3", "question": "Who?", "golden_answers": ["me"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row), encoding="utf-8-sig")
    assert load_questions(str(tmp_path / "q.jsonl")) == [row]


NO_QUESTION = 'q.jsonl:1: "question" is missing'
NO_ANSWERS = 'q.jsonl:1: "golden_answers" must'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"golden_answers": ["x"]}', NO_QUESTION),
        ('{"question": " ", "golden_answers": ["x"]}', NO_QUESTION),
        ('{"question": "Who?"}', NO_ANSWERS),
        ('{"question": "Who?", "golden_answers": []}', NO_ANSWERS),
        ('{"question": "Who?", "golden_answers": "me"}', NO_ANSWERS),
        ('{"question": "Who?", "golden_answers": [""]}', NO_ANSWERS),
        ('{"question": "Who?", "golden_answers": ["me", 3]}', NO_ANSWERS),
        ("\n[]", "q.jsonl:2: expected a JSON object"),
        ("{", "q.jsonl:1: Expecting property name"),
        ("", "q.jsonl: there is nothing in it"),
    ],
)
def test_malformed_questions_are_refused_with_their_line(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(BadInput, match=re.escape(message)):
        load_questions(str(tmp_path / "q.jsonl"))


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def hub_set(tmp_path, monkeypatch):
    """Write a set as the hub holds it. Returns what load_questions takes."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(*rows, split="test"):
        folder = tmp_path / "set"
        folder.mkdir()
        write_lines(folder / "test.jsonl", rows)
        return f"{folder}:default:{split}"

    return write


WHO = {"question": "Who?", "golden_answers": ["me"]}


def test_times_of_the_hub_become_text(hub_set):
    """The datasets library gives datetimes, which no checkpoint holds."""
    times = {"asked": "2020-01-02T03:04:05", "seen": [{"on": "2021-05-06"}]}
    (question,) = load_questions(hub_set({**WHO, **times}))
    assert question.pop("seen")[0]["on"].startswith("2021-05-06")
    assert question == {**WHO, "asked": "2020-01-02T03:04:05", "id": "0"}
    assert json.loads(json.dumps(question)) == question


def test_what_json_cannot_hold_is_refused_by_row_and_name(monkeypatch):
    pytest.importorskip("datasets")
    rows = [{**WHO, "scan": "x"}, {**WHO, "scan": b"\x00"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    message = 'a/b:c:d, row 2: "scan" cannot be written as JSON: a value of type bytes'
    with pytest.raises(BadInput, match=message):
        load_questions("a/b:c:d")


def test_a_row_of_the_hub_without_a_question_is_refused_by_its_number(hub_set):
    spec = hub_set(WHO, {**WHO, "question": ""})
    with pytest.raises(BadInput, match=f'{spec}, row 2: "question" is missing'):
        load_questions(spec)


def test_a_split_that_is_not_there_is_refused(hub_set):
    with pytest.raises(BadInput, match=r'cannot load .* Unknown split "dev"'):
        load_questions(hub_set(WHO, split="dev"))


def test_a_split_that_is_empty_is_refused(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: [])
    with pytest.raises(BadInput, match="a/b:c:d: there is nothing in it"):
        load_questions("a/b:c:d")


def test_a_damaged_file_of_the_hub_is_refused_with_the_cause(hub_set, tmp_path):
    spec = hub_set(WHO)
    (tmp_path / "set/test.jsonl").write_text('{"question":\n')
    with pytest.raises(BadInput, match=r"generating the dataset \(.*JSON"):
        load_questions(spec)


@pytest.mark.parametrize("name", ["no/such-set", "no such set"])
def test_a_set_that_the_hub_does_not_give_is_refused(name):
    pytest.importorskip("datasets")
    with pytest.raises(BadInput, match=f"cannot load {name}:nq:test from the hub"):
        load_questions(f"{name}:nq:test")  # the tests are offline


def test_a_name_of_nothing_is_refused():
    with pytest.raises(BadInput, match="expected a file, or hub/dataset:config:split"):
        load_questions("::")


def test_our_own_mistakes_show_their_traceback(monkeypatch):
    """What the datasets library does not raise is not dressed as the user's error."""
    pytest.importorskip("datasets")

    def broken(*args, **kwargs):
        raise AttributeError("a mistake")

    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(AttributeError):
        load_questions("a/b:c:d")


# ----------------------------------------------------------- training questions


def normalize(text: str) -> str:
    """Which texts are the same is for the caller to say. Here: letter case aside."""
    return text.lower()


def test_training_questions_are_those_of_all_sets(tmp_path):
    rows = [{**WHO, "id": str(number)} for number in range(3)]
    one = write_lines(tmp_path / "one.jsonl", rows[:2])
    two = write_lines(tmp_path / "two.jsonl", rows[2:])
    assert load_training_questions(f"{one},{two}", [], normalize) == rows


def test_no_training_question_is_a_test_question(tmp_path):
    one = write_lines(tmp_path / "one.jsonl", [WHO])
    two = write_lines(tmp_path / "two.jsonl", [WHO, {**WHO, "question": "Who is D?"}])
    message = r"two.jsonl: 1 training questions are test questions.* 'Who is D\?'"
    test_questions = [{"question": "WHO is d?"}]
    with pytest.raises(BadInput, match=message):
        load_training_questions(f"{one},{two}", test_questions, normalize)
    assert len(load_training_questions(f"{one},{two}", test_questions, str)) == 3


def test_a_name_with_a_comma_in_it_is_one_file_if_there_is_such_a_file(tmp_path):
    row = {**WHO, "id": "7"}
    name = write_lines(tmp_path / "one,two.jsonl", [row])
    assert load_training_questions(name, [], normalize) == [row]


# ------------------------------------------------------------------- benchmarks


def flags(**changes):
    """The flags of eval.py that choose the questions."""
    chosen = Namespace(
        questions=None,
        benchmarks=None,
        data=None,
        limit=None,
        corpus="corpus.jsonl",
        retriever_url=None,
    )
    vars(chosen).update(changes)
    return chosen


def test_the_hub_has_the_questions_of_the_seven_benchmarks(monkeypatch):
    specs = []

    def record(spec):
        specs.append(spec)
        return [WHO, WHO]

    monkeypatch.setattr(benchmarks, "load_questions", record)
    sets = question_sets(flags(benchmarks="all", limit=1))
    assert [question_set.name for question_set in sets] == list(BENCHMARKS)
    assert all(question_set.questions == [WHO] for question_set in sets)
    expected = """nq:test triviaqa:test popqa:test hotpotqa:dev 2wikimultihopqa:dev
    musique:dev bamboogle:test"""
    hub = "RUC-NLPIR/FlashRAG_datasets"
    assert specs == [f"{hub}:{split}" for split in expected.split()]
    # They come without passages.
    message = "no corpus for nq: give --corpus or --retriever-url, or with --benchmarks"
    with pytest.raises(BadInput, match=message):
        question_sets(flags(benchmarks="all", corpus=None))


def test_a_folder_may_hold_questions_and_corpus_of_each_benchmark(tmp_path):
    """Plain or .gz; a plain file goes before one that is packed."""
    for name in ("nq", "popqa"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "questions.jsonl", [{**WHO, "id": name}])
    with gzip.open(tmp_path / "nq/questions.jsonl.gz", "wt") as file:
        file.write(json.dumps({**WHO, "id": "packed"}))
    (tmp_path / "nq/corpus.jsonl").touch()
    (tmp_path / "popqa/corpus.jsonl.gz").touch()
    wanted = flags(benchmarks="popqa,nq,popqa", data=str(tmp_path), corpus=None)
    sets = question_sets(wanted)
    assert [question_set.name for question_set in sets] == ["popqa", "nq"]
    assert [question_set.questions[0]["id"] for question_set in sets] == ["popqa", "nq"]
    assert sets[0].corpus == str(tmp_path / "popqa/corpus.jsonl.gz")
    assert sets[1].corpus == str(tmp_path / "nq/corpus.jsonl")


@pytest.mark.parametrize("missing", ["questions", "corpus"])
def test_a_benchmark_without_its_file_is_refused(tmp_path, missing):
    """Also if it is the second set's."""
    for name in ("nq", "popqa"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "questions.jsonl", [WHO])
        (tmp_path / name / "corpus.jsonl").touch()
    (tmp_path / f"popqa/{missing}.jsonl").unlink()
    messages = {
        "questions": "popqa/questions.jsonl: .*No such file",
        "corpus": "no corpus for popqa",
    }
    with pytest.raises(BadInput, match=messages[missing]):
        question_sets(flags(benchmarks="nq,popqa", data=str(tmp_path), corpus=None))


def test_a_server_or_a_corpus_for_all_needs_none_of_a_set():
    path = str(ROOT / "micro/test.jsonl")
    for changes in ({}, {"corpus": None, "retriever_url": "http://here"}):
        (question_set,) = question_sets(flags(questions=path, limit=3, **changes))
        assert len(question_set.questions) == 3 and question_set.corpus is None
    with pytest.raises(BadInput, match=f"no corpus for {path}: give --corpus"):
        question_sets(flags(questions=path, corpus=None))


def test_a_trained_model_is_tested_within_its_own_limits():
    """They come with its tokenizer. A flag wins, also one of 0 searches."""
    limits = {"max_searches": 2, "k": 1, "max_tokens": 700}
    trained = Namespace(init_kwargs={"search_limits": limits})
    untrained = Namespace(init_kwargs={})
    none = Namespace(k=None, max_searches=None)
    assert trained_limits(none, trained) == limits
    assert trained_limits(none, untrained) == {"k": 3, "max_searches": 4}
    both = Namespace(k=5, max_searches=0)
    expected = {"max_searches": 0, "k": 5, "max_tokens": 700}
    assert trained_limits(both, trained) == expected
    assert limits["k"] == 1  # the tokenizer's own are left alone
