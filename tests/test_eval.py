"""eval.py: SQuAD's scores on worked examples, what counts as supported, questions, and tables."""

import gzip
import json
import re
from functools import partial

import pytest
import torch
from conftest import ROOT, run_here

import eval as eval_module
from eval import (
    BENCHMARKS, MULTI_HOP, SINGLE_HOP, batch_stats, evaluate, exact_match, f1_score, interval,
    load_mixture, load_questions, normalize_answer, print_results, print_table, rewards_of, score,
    supported,
)  # fmt: skip
from retriever import BadInput, Passage
from rollout import Trajectory, standard_prompt


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
    questions = [
        {"golden_answers": ["Rome"], "hops": 1},
        {"golden_answers": ["Oslo"], "hops": 2},
        {"golden_answers": ["x"], "hops": 2},
    ]
    rows = [
        answered("Rome", "Rome", queries=["q"]),
        answered("Oslo", "Rome", queries=["q", "r"]),
        answered(None),
    ]
    result = score(questions, rows)
    assert result["em"] == result["f1"] == pytest.approx(2 / 3)
    assert result["em_supported"] == pytest.approx(1 / 3)  # Oslo was a guess
    assert (result["searches"], result["answered"], result["n"]) == (1, pytest.approx(2 / 3), 3)
    assert result["em_by"] == {"1-hop": 1.0, "2-hop": 0.5}
    kinds = [{"golden_answers": ["Rome"], "type": kind} for kind in ("bridge", 4, "bridge")]
    del kinds[2]["type"]
    assert score(kinds, rows)["em_by"] == {"4": 0.0, "bridge": 1.0}
    for wrong in (rows[:2], rows * 2):  # it is one trajectory a question
        with pytest.raises(ValueError):
            score(questions, wrong)


def test_rewards_are_of_each_trajectory_question_by_question():
    questions = [{"golden_answers": ["Rome"]}, {"golden_answers": ["Oslo", "Bergen"]}]
    rows = [answered(answer) for answer in ("rome", "Oslo", None, "Oslo", "the Bergen", "Rome")]
    assert rewards_of(questions, rows) == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError):
        rewards_of(questions, rows[:5])


def test_what_a_batch_says_before_training():
    rows = [answered("x", queries=["a b", "A B"]), answered(None, queries=["a", "b"])]
    rows += [answered("y", queries=["a"]), answered("z")]
    for row, length in zip(rows, (4, 2, 1, 1)):
        row.extend([7] * length, [0.0] * length)
    stats = batch_stats(rows, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert stats == {
        "reward": 0.75, "zero_var": 0.5, "length": 2, "searches": 1.25, "no_answer": 0.25,
        "repeats": 0.25,
    }  # fmt: skip


def test_questions_plain_and_gz(tmp_path):
    row = {"id": 3, "question": "Who?", "golden_answers": ["me"], "hops": 2}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    for name in ("q.jsonl", "q.jsonl.gz"):
        assert load_questions(str(tmp_path / name)) == [{**row, "id": "3"}]
    del row["id"]  # then it is the number of the row
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row))
    assert [row["id"] for row in load_questions(str(tmp_path / "q.jsonl"))] == ["0", "1"]


def test_a_byte_order_mark_before_the_questions_is_skipped(tmp_path):
    row = {"id": "3", "question": "Who?", "golden_answers": ["me"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row), encoding="utf-8-sig")
    assert load_questions(str(tmp_path / "q.jsonl")) == [row]


def test_a_set_that_the_hub_does_not_give_is_refused():
    pytest.importorskip("datasets")
    with pytest.raises(BadInput, match="cannot load no/such-set:nq:test from the hub"):
        load_questions("no/such-set:nq:test")  # the tests are offline


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"golden_answers": ["x"]}', 'q.jsonl:1: "question" is missing'),
        ('{"question": " ", "golden_answers": ["x"]}', 'q.jsonl:1: "question" is missing'),
        ('{"question": "Who?"}', 'q.jsonl:1: "golden_answers" must'),
        ('{"question": "Who?", "golden_answers": []}', 'q.jsonl:1: "golden_answers" must'),
        ('{"question": "Who?", "golden_answers": "me"}', 'q.jsonl:1: "golden_answers" must'),
        ('{"question": "Who?", "golden_answers": [""]}', 'q.jsonl:1: "golden_answers" must'),
        ('{"question": "Who?", "golden_answers": ["me", 3]}', 'q.jsonl:1: "golden_answers" must'),
        ("\n[]", "q.jsonl:2: expected a JSON object"),
        ("{", "q.jsonl:1: Expecting property name"),
        ("", "q.jsonl: there is nothing in it"),
    ],
)
def test_malformed_questions_are_refused_with_their_line(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(BadInput, match=re.escape(message)):
        load_questions(str(tmp_path / "q.jsonl"))


def test_evaluate_is_greedy_and_deterministic(micro, micro_index):
    questions = load_questions(str(ROOT / "micro/validation.jsonl"))[:8]
    first, second = (evaluate(*micro, micro_index, questions) for _ in range(2))
    assert first == second and first["n"] == 8 and 0 <= first["em"] <= 1


def test_evaluate_takes_what_rollout_takes(monkeypatch):
    heard = []
    answers = [answered("Rome"), answered(None)]
    monkeypatch.setattr(eval_module, "rollout", lambda *a, **how: heard.append((a, how)) or answers)
    questions = [{"question": name, "golden_answers": ["Rome"]} for name in ("one", "two")]
    assert evaluate("model", "tokenizer", "index", questions)["em"] == 0.5
    evaluate("model", "tokenizer", "index", questions, temperature=0.7, seed=3, k=2)
    passed = "model", "tokenizer", "index", ["one", "two"]
    assert heard == [
        (passed, {"temperature": 0.0}),
        (passed, {"temperature": 0.7, "seed": 3, "k": 2}),
    ]


# ---------------------------------------------------------------- the command


@pytest.fixture
def script(monkeypatch, capsys):
    """Run eval.py in this process: its exit status and what it wrote to both streams."""
    return partial(run_here, monkeypatch, capsys, eval_module.main, "eval.py")


@pytest.fixture
def refused(script):
    """Run eval.py, which must refuse its input: one line on standard error, exit status 2."""

    def run(*args):
        status, printed, said = script(*args)
        assert (status, printed, said.count("\n")) == (2, "", 1), said
        assert said.startswith("eval.py: ")
        return said

    return run


ASK = "--model", "micro/model", "--questions", "micro/test.jsonl", "--corpus", "micro/corpus.jsonl"


def test_the_command(script, micro, micro_index):
    status, printed, said = script(*ASK, "--limit", 3)
    assert status == 0, said
    result = json.loads(printed)
    questions = load_questions(str(ROOT / "micro/test.jsonl"))[:3]
    row = evaluate(*micro, micro_index, questions)
    assert result == row | {"em_interval": list(interval(row["em"], 3))} and row["n"] == 3


def test_the_command_refuses_in_one_line(refused, tmp_path):
    wrong = "--model", "micro/model", "--questions", "nowhere", "--corpus", "micro/corpus.jsonl"
    assert "nowhere: [Errno 2] No such file" in refused(*wrong)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    for folder in (tmp_path, "tests"):
        assert f"cannot use {folder}: " in refused("--model", folder, *ASK[2:])
    assert re.search(r"\bk\b.* at least 1\b", refused(*ASK, "--limit", 3, "--k", 0))
    assert "--k: invalid int value: 'x'" in refused(*ASK, "--k", "x")
    # What is written at the end is tried at the beginning, before the model is loaded.
    said = refused("--model", "nowhere", *ASK[2:], "--out", tmp_path / "no/such/folder")
    assert "No such file or directory" in said and "no/such/folder" in said


@pytest.mark.parametrize("flag, value", [("--limit", 0), ("--limit", -1), ("--max-searches", -1)])
def test_numbers_that_are_too_small_are_refused(refused, monkeypatch, flag, value):
    monkeypatch.setattr(eval_module, "load_model", None)  # before the model is loaded
    assert flag in refused(*ASK, flag, value)


def test_intervals():
    """Wilson: 0 of 10 is 0 to 3.8416 / 13.8416; half of 100 is .404 to .596."""
    assert interval(0.0, 10) == (pytest.approx(0.0), pytest.approx(0.27754, abs=1e-4))
    assert interval(1.0, 10) == (pytest.approx(1 - 0.27754, abs=1e-4), pytest.approx(1.0))
    assert interval(0.5, 100) == (
        pytest.approx(0.4038, abs=1e-4),
        pytest.approx(0.5962, abs=1e-4),
    )
    for hits in range(11):
        low, high = interval(hits / 10, 10)
        assert 0 <= low < high <= 1


def row_of(em: float) -> dict:
    return {"em": em, "f1": 0.5, "searches": 1.25, "answered": 1.0, "n": 100}


def test_a_table_of_results_ends_with_averages_that_count_each_set_once(capsys):
    print_results({"nq": row_of(0.2), "popqa": row_of(0.4), "musique": row_of(0.1)})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["set", "EM", "95", "%", "F1", "searches", "answered", "n"]
    assert lines[2].split() == "popqa 0.400 0.309-0.498 0.500 1.250 1.000 100".split()
    assert [line.split() for line in lines[4:]] == [
        ["single-hop", "0.300"], ["multi-hop", "0.100"], ["average", "0.233"],
    ]  # fmt: skip
    assert len({len(line) for line in lines[:4]}) == 1  # columns
    # Of the sets that are there; and of none of the seven there is no average.
    print_results({"micro": row_of(0.2)})
    assert len(capsys.readouterr().out.splitlines()) == 2
    print_results({"nq": row_of(0.2), "mine": row_of(0.9)})
    parts = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert parts == [["single-hop", "0.200"], ["average", "0.200"]]


def test_the_average_of_published_results_is_the_published_one(capsys):
    """Search-E1's row, set by set, and the average that its paper reports."""
    names = "nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle"
    assert tuple(BENCHMARKS) == names and tuple(SINGLE_HOP) == names[:3]
    assert {*MULTI_HOP} == {*names[3:]}
    ems = 0.474, 0.626, 0.461, 0.427, 0.436, 0.193, 0.464
    print_results({name: row_of(em) for name, em in zip(names, ems, strict=True)})
    assert capsys.readouterr().out.splitlines()[-1].split() == ["average", "0.440"]


def test_a_table_has_the_widths_of_its_columns(capsys):
    print_table([{"name": "a", "share": 0.25}, {"name": "longer", "share": 2}])
    assert capsys.readouterr().out == "  name  share\n     a  0.250\nlonger      2\n"


def test_benchmarks_from_a_folder(script, micro, tmp_path):
    questions = (ROOT / "micro/test.jsonl").read_bytes().splitlines(keepends=True)[:40]
    corpus = (ROOT / "micro/corpus.jsonl").read_bytes()
    for name, suffix, pack in (("nq", "", bytes), ("musique", ".gz", gzip.compress)):
        (tmp_path / name).mkdir()
        for file, content in (("questions", b"".join(questions)), ("corpus", corpus)):
            (tmp_path / name / f"{file}.jsonl{suffix}").write_bytes(pack(content))
    out = tmp_path / "result.json"
    how = "--model", "micro/model", "--benchmarks", "nq,musique", "--data", tmp_path
    status, printed, said = script(*how, "--limit", 20, "--out", out)
    assert status == 0, said
    saved = json.loads(out.read_text())
    # What made the results is there, too.
    assert saved["model"] == "micro/model" and saved["data"] == str(tmp_path)
    assert (saved["limit"], saved["k"], saved["max_searches"]) == (20, 3, 4)
    assert saved["prompt"] == standard_prompt(micro[1], "{question}")
    assert list(saved["results"]) == ["nq", "musique"]
    one, two = saved["results"]["nq"], saved["results"]["musique"]
    assert one == two and one["n"] == 20 and one["em"] > 0
    assert one["em_interval"][0] < one["em"] < one["em_interval"][1]
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "nq", "musique", "single-hop", "multi-hop", "average",
    ]  # fmt: skip
    assert f"{one['em']:.3f}" in lines[1] and f"{one['em']:.3f}" in lines[-1]


def test_results_are_kept_after_each_set(script, monkeypatch, tmp_path):
    """So a run that dies in its second set has lost only that."""
    questions, out = (ROOT / "micro/test.jsonl").read_bytes(), tmp_path / "result.json"
    for name in ("nq", "popqa"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "questions.jsonl").write_bytes(questions)
    answers = iter([row_of(0.5)])
    monkeypatch.setattr(eval_module, "evaluate", lambda *args, **how: next(answers))
    how = "--model", "micro/model", "--benchmarks", "nq,popqa", "--data", tmp_path, "--out", out
    with pytest.raises(StopIteration):
        script(*how, "--corpus", "micro/corpus.jsonl")
    saved = json.loads(out.read_text())
    assert list(saved["results"]) == ["nq"] and saved["results"]["nq"]["em"] == 0.5


def test_a_result_by_a_server_names_the_server(script, micro_index, tmp_path, monkeypatch):
    """Also where --data holds a corpus: it is not read."""
    (tmp_path / "nq").mkdir()
    (tmp_path / "nq/questions.jsonl").write_bytes((ROOT / "micro/test.jsonl").read_bytes())
    (tmp_path / "nq/corpus.jsonl").write_text("no passages")
    out, asked = tmp_path / "result.json", []
    server = lambda url: asked.append(url) or micro_index  # noqa: E731
    monkeypatch.setattr(eval_module, "RemoteRetriever", server)
    how = "--model", "micro/model", "--benchmarks", "nq", "--data", tmp_path, "--limit", 5
    status, _, said = script(*how, "--out", out, "--retriever-url", "http://here")
    assert status == 0, said
    saved = json.loads(out.read_text())
    assert asked == [saved["retriever_url"]] == ["http://here"] and saved["corpus"] is None
    assert saved["results"]["nq"]["n"] == 5 and saved["results"]["nq"]["searches"] > 0


def test_a_mixture_is_all_its_sets_and_no_test_question(tmp_path):
    rows = [
        {"id": str(i), "question": f"Who is {name}?", "golden_answers": ["x"]}
        for i, name in enumerate("abcd")
    ]
    for name, part in (("one", rows[:2]), ("two", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    specs = f"{tmp_path}/one.jsonl,{tmp_path}/two.jsonl"
    assert load_mixture(specs, []) == rows
    message = r"two.jsonl: 1 training questions are test questions.* 'Who is d\?'"
    with pytest.raises(BadInput, match=message):
        load_mixture(specs, [{"question": "who is D"}])
    # A name with a comma in it is one file, if there is such a file.
    (tmp_path / "one,two.jsonl").write_text(json.dumps(rows[3]))
    assert load_mixture(f"{tmp_path}/one,two.jsonl", []) == [rows[3]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--benchmarks", "nq,trivia", "--data", "x"), "--benchmarks takes all, or some of nq,"),
        (("--benchmarks", "", "--data", "x"), "--benchmarks takes all, or some of nq,"),
        (("--benchmarks", "nq", "--data", "nowhere"), "nowhere/nq/questions.jsonl"),
        (
            ("--questions", "micro/test.jsonl", "--corpus", "micro/nowhere.jsonl"),
            "No such file or directory: 'micro/nowhere.jsonl'",
        ),
        (("--questions", "micro/test.jsonl"), "no corpus for micro/test.jsonl: give --corpus"),
        (("--questions", "micro/test.jsonl", "--benchmarks", "nq"), "not allowed with"),
        (
            (*ASK[2:], "--retriever-url", "http://127.0.0.1:9"),
            "--retriever-url: not allowed with",
        ),
        (("--questions", "micro/test.jsonl", "--retriever-url", "here"), "URL is http://"),
        (("--corpus", "micro/corpus.jsonl"), "one of the arguments --questions --benchmarks"),
        ((*ASK[2:], "--published"), "--published"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_model_is_loaded(
    refused, monkeypatch, arguments, message
):
    monkeypatch.setattr(eval_module, "load_model", None)
    assert message in refused("--model", "micro/model", *arguments)


@pytest.mark.parametrize("missing", ["questions", "corpus"])
def test_a_benchmark_without_its_file_is_refused_before_the_model_is_loaded(
    refused, monkeypatch, tmp_path, missing
):
    """Also if it is the second set's."""
    monkeypatch.setattr(eval_module, "load_model", None)
    for name in ("nq", "popqa"):
        (tmp_path / name).mkdir()
        for file, source in (("questions", "test"), ("corpus", "corpus")):
            content = (ROOT / f"micro/{source}.jsonl").read_bytes()
            (tmp_path / name / f"{file}.jsonl").write_bytes(content)
    (tmp_path / "popqa" / f"{missing}.jsonl").unlink()
    how = "--model", "micro/model", "--benchmarks", "nq,popqa", "--data", tmp_path
    message = {"questions": "popqa/questions.jsonl", "corpus": "no corpus for popqa"}[missing]
    assert message in refused(*how)


def test_questions_from_the_hub_need_a_corpus(refused, monkeypatch):
    """FlashRAG's questions of the benchmarks come without passages."""
    specs = []
    rows = load_questions(str(ROOT / "micro/test.jsonl"))
    monkeypatch.setattr(eval_module, "load_model", None)
    monkeypatch.setattr(eval_module, "load_questions", lambda spec: specs.append(spec) or rows)
    said = refused("--model", "micro/model", "--benchmarks", "all")
    assert "no corpus for nq: give --corpus, --retriever-url or --data" in said
    splits = "nq:test triviaqa:test popqa:test hotpotqa:dev 2wikimultihopqa:dev musique:dev"
    splits = [*splits.split(), "bamboogle:test"]
    assert specs == [f"RUC-NLPIR/FlashRAG_datasets:{split}" for split in splits]
