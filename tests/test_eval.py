"""eval.py: scores of worked examples, what counts as supported, and the command."""

import gzip
import inspect
import json
import os
import re
from dataclasses import replace
from functools import partial

import pytest
from conftest import ROOT, SMALL, read, run_here

import eval as eval_module
from eval import (
    evaluate,
    exact_match,
    f1_score,
    load_questions,
    normalize_answer,
    rewards_of,
    score,
    supported,
)
from machinery.passages import Passage
from machinery.tables import interval
from rollout import Trajectory, rollout, standard_prompt
from train import train

# ------------------------------------------------------------------ one answer


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
        ("Alpha—the—Omega", "alpha— —omega"),  # a space stands for the article
    ],
)
def test_normalisation(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "golden_answers", "em", "f1"),
    [
        ("Paris", ["Paris"], 1.0, 1.0),
        ("the paris!", ["London", "Paris"], 1.0, 1.0),
        ("Paris France", ["Paris"], 0.0, 2 / 3),  # precision 1/2, recall 1
        ("Paris", ["Paris", "Paris, France"], 1.0, 1.0),  # the best counts
        ("a b c", ["b c d e"], 0.0, 4 / 6),  # the article goes: 2 shared of 2, of 4
        ("to be to be", ["to be"], 0.0, 2 / 3),  # a bag: precision 2/4, recall 1
        ("Bora Bora isle", ["Bora Bora"], 0.0, 0.8),  # a bag: 2 shared of 3, of 2
        ("Zürich", ["Zurich"], 0.0, 0.0),  # no folding
        ("", ["Paris"], 0.0, 0.0),
        (None, ["Paris"], 0.0, 0.0),
        ("the", ["the"], 0.0, 0.0),  # empty once normalised
    ],
)
def test_scores_against_worked_examples(prediction, golden_answers, em, f1):
    assert exact_match(prediction, golden_answers) == em
    assert f1_score(prediction, golden_answers) == pytest.approx(f1)


def answered(answer, *texts, queries=()):
    """A trajectory with this answer. Its one search found passages with these texts."""
    passages = [Passage(str(number), "", text) for number, text in enumerate(texts)]
    return Trajectory(
        "?", [], answer=answer, passages=[passages], queries=list(queries)
    )


def test_supported_means_in_an_own_passage_as_whole_words():
    assert supported(answered("The Rome", "nothing", "He went to Rome."))
    assert not supported(answered("Rome", "the Romeo"))
    assert not supported(answered("Rome"))
    assert not supported(answered(None, "Rome"))
    assert not supported(answered("the", "the"))


def test_a_title_and_a_later_search_support_too():
    trajectory = Trajectory("?", [], answer="Rome")
    trajectory.passages = [[Passage("0", "", "x")], [Passage("1", "Rome", "It is old")]]
    assert supported(trajectory)


# ---------------------------------------------------------------- many answers


QUESTIONS = [
    {"golden_answers": ["Rome"], "hops": 1},
    {"golden_answers": ["Oslo"], "hops": 2},
    {"golden_answers": ["x"], "hops": 2},
]
TRAJECTORIES = [
    answered("Rome", "Rome", queries=["q"]),
    answered("Oslo", "Rome", queries=["q", "r"]),
    answered(None),
]


def test_score_adds_up():
    result = score(QUESTIONS, TRAJECTORIES)
    assert result["em"] == result["f1"] == pytest.approx(2 / 3)
    assert result["em_supported"] == pytest.approx(1 / 3)  # Oslo was a guess
    assert result["searches"] == 1
    assert result["answered"] == pytest.approx(2 / 3)
    assert result["n"] == 3
    assert result["em_by"] == {"1-hop": 1.0, "2-hop": 0.5}
    for wrong in (TRAJECTORIES[:2], TRAJECTORIES * 2):  # it is one for each question
        with pytest.raises(ValueError):
            score(QUESTIONS, wrong)


def test_an_answer_that_a_passage_holds_is_still_wrong():
    """The passage supports Rome, but the answer is Oslo."""
    result = score([{"golden_answers": ["Oslo"]}], [answered("Rome", "On Rome.")])
    assert supported(answered("Rome", "On Rome."))
    assert (result["em"], result["em_supported"], result["answered"]) == (0, 0, 1)


def test_kinds_are_by_hops_or_else_by_type_and_sorted_by_number():
    questions = [
        {"golden_answers": ["Rome"], "type": "bridge"},
        {"golden_answers": ["Rome"], "type": 4},
        {"golden_answers": ["Rome"]},
    ]
    assert score(questions, TRAJECTORIES)["em_by"] == {"4": 0.0, "bridge": 1.0}
    questions = [
        {"golden_answers": ["Rome"], "hops": hops, "type": "bridge"}
        for hops in (10, 2, 1)
    ]
    result = score(questions, TRAJECTORIES)
    assert list(result["em_by"].items()) == [("1-hop", 0), ("2-hop", 0), ("10-hop", 1)]


def test_rewards_are_of_each_trajectory_question_by_question():
    questions = [{"golden_answers": ["Rome"]}, {"golden_answers": ["Oslo", "Bergen"]}]
    answers = ("rome", "Oslo", None, "Oslo", "the Bergen", "Rome")
    trajectories = [answered(answer) for answer in answers]
    assert rewards_of(questions, trajectories) == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="5 trajectories of 2 questions"):
        rewards_of(questions, trajectories[:5])


def test_evaluate_is_greedy_and_deterministic(micro, micro_index):
    questions = load_questions(str(ROOT / "micro/validation.jsonl"))[:8]
    first = evaluate(*micro, micro_index, questions)
    second = evaluate(*micro, micro_index, questions)
    assert first == second
    assert first["n"] == 8 and 0 <= first["em"] <= 1


def test_evaluate_takes_what_rollout_takes():
    """All its keywords with the same defaults, but for one greedy answer a question."""
    ours = inspect.signature(evaluate).parameters
    for name, parameter in inspect.signature(rollout).parameters.items():
        if name not in ("group_size", "temperature"):
            assert ours[name].kind == parameter.kind
            assert ours[name].default == parameter.default
    assert ours["temperature"].default == 0.0 and "group_size" not in ours


def test_evaluate_passes_everything_on(monkeypatch):
    calls = []

    def record(*args, **keywords):
        calls.append((args, keywords))
        return [answered("Rome"), answered(None)]

    monkeypatch.setattr(eval_module, "rollout", record)
    questions = [
        {"question": name, "golden_answers": ["Rome"]} for name in ("one", "two")
    ]
    assert evaluate("model", "tokenizer", "index", questions)["em"] == 0.5
    names = list(inspect.signature(evaluate).parameters)[4:]
    keywords = {name: f"a value of {name}" for name in names}
    evaluate("model", "tokenizer", "index", questions, **keywords)
    for args, _ in calls:
        assert args == ("model", "tokenizer", "index", ["one", "two"])
    assert calls[0][1]["temperature"] == 0.0
    assert calls[1][1] == keywords


# ---------------------------------------------------------------- the command


@pytest.fixture
def script(monkeypatch, capsys):
    """Run eval.py in this process: its exit status, standard output and error."""
    return partial(run_here, monkeypatch, capsys, eval_module.main, "eval.py")


@pytest.fixture
def refused(script):
    """Run eval.py, which must refuse its input: one line of error, exit status 2."""

    def run(*args):
        status, printed, said = script(*args)
        assert (status, printed, said.count("\n")) == (2, "", 1), said
        assert said.startswith("eval.py: ")
        return said

    return run


@pytest.fixture
def no_model(monkeypatch):
    """What is refused must be refused before the slow model is loaded."""
    monkeypatch.setattr(eval_module, "load_model", None)


MODEL = ("--model", "micro/model")
QUESTION_FILE = ("--questions", "micro/test.jsonl")
CORPUS = ("--corpus", "micro/corpus.jsonl")
ALL = (*MODEL, *QUESTION_FILE, *CORPUS)


def test_the_command(script, micro, micro_index):
    status, printed, said = script(*ALL, "--limit", 3)
    assert status == 0, said
    questions = load_questions(str(ROOT / "micro/test.jsonl"))[:3]
    expected = evaluate(*micro, micro_index, questions)
    expected["em_interval"] = list(interval(expected["em"], 3))
    assert json.loads(printed) == expected
    assert expected["n"] == 3


def test_no_flag_at_all_is_answered_with_a_usage_and_the_lesson(refused):
    said = refused()
    assert "usage: python eval.py --model M --questions Q --corpus C" in said
    assert "python -m lessons.evaluation" in said


def test_a_model_that_cannot_be_used_is_refused_in_one_line(refused, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    for folder in (tmp_path, "tests"):
        said = refused("--model", folder, *QUESTION_FILE, *CORPUS)
        assert f"cannot use {folder}: " in said


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--limit", 0),
        ("--limit", -1),
        ("--k", 0),
        ("--k", "x"),
        ("--max-searches", -1),
    ],
)
def test_numbers_that_cannot_be_are_refused(refused, no_model, flag, value):
    said = refused(*ALL, flag, value)
    assert re.search(
        rf"{flag}( must be at least [01]\b|: invalid int value: 'x')", said
    )


SOME = "--benchmarks takes all, or some of nq,"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--questions", "nowhere", *CORPUS), "nowhere: [Errno 2] No such file"),
        (("--benchmarks", "nq,trivia", "--data", "x"), SOME),
        (("--benchmarks", "", "--data", "x"), SOME),
        (("--benchmarks", "nq", "--data", "nowhere"), "nowhere/nq/questions.jsonl"),
        (
            (*QUESTION_FILE, "--corpus", "micro/nowhere.jsonl"),
            "No such file or directory: 'micro/nowhere.jsonl'",
        ),
        (QUESTION_FILE, "no corpus for micro/test.jsonl: give --corpus"),
        ((*QUESTION_FILE, "--benchmarks", "nq"), "not allowed with"),
        (
            (*QUESTION_FILE, *CORPUS, "--retriever-url", "http://127.0.0.1:9"),
            "--retriever-url: not allowed with",
        ),
        ((*QUESTION_FILE, "--retriever-url", "here"), "URL is http://"),
        (CORPUS, "one of the arguments --questions --benchmarks"),
        ((*QUESTION_FILE, *CORPUS, "--published"), "--published"),
    ],
)
def test_what_cannot_be_run_is_refused(refused, no_model, arguments, message):
    assert message in refused(*MODEL, *arguments)


# ----------------------------------------------------- benchmarks and their file


def write_sets(folder, *names, questions=None, corpus=None):
    """A folder with these benchmarks in it, as --data takes it."""
    if questions is None:
        questions = (ROOT / "micro/test.jsonl").read_bytes()
    for name in names:
        (folder / name).mkdir()
        (folder / name / "questions.jsonl").write_bytes(questions)
        if corpus is not None:
            (folder / name / "corpus.jsonl").write_bytes(corpus)


def test_benchmarks_from_a_folder(script, micro, tmp_path):
    lines = (ROOT / "micro/test.jsonl").read_bytes().splitlines(keepends=True)
    questions = b"".join(lines[:40])
    corpus = (ROOT / "micro/corpus.jsonl").read_bytes()
    write_sets(tmp_path, "nq", questions=questions, corpus=corpus)
    (tmp_path / "musique").mkdir()
    packed = {"questions": gzip.compress(questions), "corpus": gzip.compress(corpus)}
    for kind, content in packed.items():
        (tmp_path / f"musique/{kind}.jsonl.gz").write_bytes(content)
    out = tmp_path / "result.json"
    sets = ("--benchmarks", "nq,musique", "--data", tmp_path)
    status, printed, said = script(*MODEL, *sets, "--limit", 20, "--out", out)
    assert status == 0, said
    saved = json.loads(out.read_text())
    # What made the results is there, too.
    assert saved["model"] == "micro/model" and saved["data"] == str(tmp_path)
    assert (saved["limit"], saved["k"], saved["max_searches"]) == (20, 3, 4)
    assert saved["prompt"] == standard_prompt(micro[1], "{question}")
    assert list(saved["results"]) == ["nq", "musique"]
    result = saved["results"]["nq"]
    assert result == saved["results"]["musique"]
    assert result["n"] == 20 and result["em"] > 0
    low, high = result["em_interval"]
    assert low < result["em"] < high
    rows = [line.split() for line in printed.splitlines()[1:]]
    titles = ["nq", "musique", "single-hop", "multi-hop", "average"]
    assert [row[0] for row in rows] == titles
    assert rows[0][1] == rows[-1][1] == f"{result['em']:.3f}"


def test_a_result_by_a_server_names_the_server(
    script, micro_index, tmp_path, monkeypatch
):
    """Also where --data holds a corpus: it is not read."""
    write_sets(tmp_path, "nq", corpus=b"no passages")
    urls = []

    def server(url):
        urls.append(url)
        return micro_index

    monkeypatch.setattr(eval_module, "RemoteRetriever", server)
    out = tmp_path / "result.json"
    sets = ("--benchmarks", "nq", "--data", tmp_path, "--limit", 5, "--out", out)
    status, _, said = script(*MODEL, *sets, "--retriever-url", "http://here")
    assert status == 0, said
    saved = json.loads(out.read_text())
    assert urls == [saved["retriever_url"]] == ["http://here"]
    assert saved["corpus"] is None
    assert saved["results"]["nq"]["n"] == 5 and saved["results"]["nq"]["searches"] > 0


RESULT = {"em": 0.5, "f1": 0.75, "searches": 1.25, "answered": 1.0, "n": 100}


def test_the_flags_reach_the_rollouts_and_the_interval_is_of_em(script, monkeypatch):
    calls = []

    def record(model, tokenizer, retriever, questions, **keywords):
        calls.append((len(questions), keywords))
        return dict(RESULT)

    monkeypatch.setattr(eval_module, "evaluate", record)
    sizes = ("--limit", 7, "--k", 5, "--max-searches", 0)
    status, printed, said = script(*ALL, *sizes)
    assert status == 0, said
    assert calls == [(7, {"k": 5, "max_searches": 0, "progress": "micro/test.jsonl"})]
    low, high = interval(0.5, 100)
    assert json.loads(printed) == {**RESULT, "em_interval": [low, high]}


def test_a_trained_model_is_tested_as_its_run_tested_it(script, tmp_path):
    """Within the limits of its training, with its prompt, and with no flag at all."""
    limits = {
        "k": 1,
        "max_searches": 2,
        "max_tokens": 150,
        "max_turn_tokens": 40,
        "max_observation_tokens": 60,
    }
    prompt = "{question} "
    run = replace(SMALL, out=str(tmp_path / "run"), rounds=0, prompt=prompt, **limits)
    folder = train(run)
    tested = read(folder, "metrics.jsonl")[0]
    out = tmp_path / "result.json"
    model = ("--model", folder / "model", "--limit", 6, "--out", out)
    status, _, said = script(*model, *QUESTION_FILE, *CORPUS)
    assert status == 0, said
    saved = json.loads(out.read_text())
    assert limits.items() <= saved.items() and saved["prompt"] == prompt
    result = saved["results"]["micro/test.jsonl"]
    for name in ("em", "f1", "em_supported", "searches", "answered", "em_by"):
        assert result[name] == tested[name]
    status, _, said = script(*model, *QUESTION_FILE, *CORPUS, "--k", 3)
    saved = json.loads(out.read_text())
    assert (saved["k"], saved["max_searches"]) == (3, 2)
    assert saved["results"]["micro/test.jsonl"] != result


@pytest.fixture
def two_sets(script, monkeypatch, tmp_path):
    """Run eval.py on two sets: the first has a RESULT, then comes an error."""
    write_sets(tmp_path, "nq", "popqa")

    def run(error, *arguments):
        outcomes = iter([dict(RESULT)])

        def fake_evaluate(*args, **keywords):
            for result in outcomes:
                return result
            raise error

        monkeypatch.setattr(eval_module, "evaluate", fake_evaluate)
        sets = ("--benchmarks", "nq,popqa", "--data", tmp_path, *CORPUS)
        return script(*MODEL, *sets, *arguments)

    return run


def test_results_are_kept_after_each_set(two_sets, tmp_path):
    """So a run that dies in its second set has lost only that."""
    out = tmp_path / "result.json"
    with pytest.raises(ZeroDivisionError):
        two_sets(ZeroDivisionError(), "--out", out)
    saved = json.loads(out.read_text())
    assert list(saved["results"]) == ["nq"] and saved["results"]["nq"]["em"] == 0.5


def test_results_are_shown_also_if_a_later_set_fails(two_sets):
    status, printed, said = two_sets(OSError("the server is gone"))
    assert (status, said) == (2, "eval.py: the server is gone\n")
    assert printed.splitlines()[1].split()[:2] == ["nq", "0.500"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full disk")
def test_results_are_shown_if_the_disk_is_full(two_sets):
    status, printed, said = two_sets(None, "--out", "/dev/full")
    assert status == 2
    assert said.startswith("eval.py: cannot write the results to /dev/full: ")
    assert said.count("\n") == 1
    assert printed.splitlines()[1].split()[:2] == ["nq", "0.500"]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    refused, no_model, tmp_path
):
    said = refused(*ALL, "--out", tmp_path)
    assert "Is a directory" in said and str(tmp_path) in said
    said = refused(*ALL, "--out", tmp_path / "no/such/folder")
    assert "No such file or directory" in said and "no/such/folder" in said


def test_a_file_that_may_only_be_read_is_refused_and_kept(refused, no_model, tmp_path):
    out = tmp_path / "result.json"
    out.write_text("earlier results")
    out.chmod(0o400)
    if os.access(out, os.W_OK):
        pytest.skip("root may write everywhere")
    assert "Permission denied" in refused(*ALL, "--out", out)
    assert out.read_text() == "earlier results"


def test_a_run_that_fails_early_leaves_no_file_and_no_gap(refused, tmp_path):
    """--out is tried before the model is loaded, but nothing is written yet."""
    old = tmp_path / "old.json"
    old.write_text("earlier results")
    for out in (old, tmp_path / "new.json"):
        wrong = ("--model", "nowhere", *QUESTION_FILE, *CORPUS)
        assert "cannot use nowhere" in refused(*wrong, "--out", out)
    assert old.read_text() == "earlier results"
    assert not (tmp_path / "new.json").exists()
