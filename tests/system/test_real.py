"""experiments/real.py: the questions are split once, without overlap, a run is counted,
and the logs are read right."""

import gzip
import json
from dataclasses import replace

import pytest
from conftest import ROOT, SMALL, line_of, run_here, run_main

from eval import normalize_answer
from experiments import real
from machinery.json_lines import write_jsonl
from machinery.questions import load_questions
from train import Config


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_set(folder, name, questions):
    """A set of questions, and its one passage, in the form that real.py reads. The
    passage holds the answer to questions with a 7 in them."""
    (folder / name).mkdir(parents=True)
    rows = []
    for question in questions:
        answer = "says" if "7" in question else "denies"
        row = {"id": question, "question": question, "golden_answers": [answer]}
        rows.append(row)
    passages = [{"id": "0", "title": name, "text": f"What {name} says."}]
    for kind, lines in {"questions": rows, "corpus": passages}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name / f"{kind}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def test_no_question_is_in_two_parts(tmp_path, monkeypatch, capsys):
    """One of popqa's stands in nq too, written otherwise: it is kept once."""
    sets = tmp_path / "sets"
    for name in real.ONE_PASSAGE_SETS + real.SEVERAL_HOP_SETS:
        questions = [f"What is {name} {number}?" for number in range(210)]
        if name == "popqa":
            questions = ["what is NQ 7", *questions[:209]]
        write_set(sets, name, questions)
    monkeypatch.setattr(real, "DATA", tmp_path / "made")
    status, _, _ = run_here(monkeypatch, capsys, real.main, "real.py", "data", sets)
    assert status == 0
    counts = {"test": 400, "validation": 100, "train": 4 * 85 - 1, "hops": 400}
    texts = []
    for name, count in counts.items():
        questions = load_questions(str(tmp_path / f"made/{name}.jsonl"))
        assert len(questions) == count
        texts += [normalize_answer(question["question"]) for question in questions]
    assert len(set(texts)) == len(texts)

    # Those to train on whose first passage holds an answer.
    train = load_questions(str(tmp_path / "made/train.jsonl"))
    found = load_questions(str(tmp_path / "made/found.jsonl"))
    assert found == [question for question in train if "7" in question["id"]]

    before = (tmp_path / "made/test.jsonl").read_text()
    real.split_questions(str(sets))
    assert (tmp_path / "made/test.jsonl").read_text() == before


def test_the_table_counts_the_tokens_before_each_test(monkeypatch, capsys):
    folder = ROOT / "results/real/gpu/search-e1-0"
    assert [test["em"] for test in real.tests_of(folder)] == [0.285, 0.305]
    status, out, _ = run_here(
        monkeypatch, capsys, real.main, "real.py", "table", folder
    )
    assert status == 0
    _, *lines = [line.split() for line in out.strip().splitlines()]
    spent = 0
    for cost in rows_of(folder / "cost.jsonl"):
        if cost["for"] == "rollout":
            spent += cost["tokens"]
    base, grpo = lines
    assert base[1:3] == ["base", "0.285"]
    assert base[-1] == "0"
    assert grpo[1:3] == ["grpo-1", "0.305"]
    assert grpo[-1] == f"{spent / 1000:.0f}"


@pytest.mark.parametrize("plan_name", real.PLANS)
def test_both_arms_have_the_settings_of_the_recipe(plan_name):
    plan = real.PLANS[plan_name]
    for arm in ("search-e1", "grpo"):
        config = real.settings_of(plan_name, arm, seed=3)
        assert config.seed == 3
        assert config.prompt == plan.search_e1.prompt
        assert config.ofsd == (arm == "search-e1")
        assert config.out.endswith(f"{plan_name}/{arm}-3")
        # Only the plans for a CPU ask for bfloat16: on a GPU it is the default.
        expected = "auto" if plan_name == "gpu" else "bfloat16"
        assert config.arithmetic == expected


def test_a_run_that_goes_on_keeps_its_date(tmp_path, monkeypatch):
    """A date is in some chat templates, and a run may go on after midnight."""
    begun = []

    def count(config, resume=False):
        begun.append((config.date, resume))

    monkeypatch.setattr(real, "CountedRun", count)
    monkeypatch.setattr(real, "run_stages", lambda run: None)
    config = Config(out=str(tmp_path))
    real.train_counted(config)
    (tmp_path / "config.json").write_text('{"date": "2026-01-31"}')
    real.train_counted(config)
    assert begun == [("", False), ("2026-01-31", True)]


def test_a_run_counts_what_it_samples_and_a_resumed_one_only_once(
    tmp_path, monkeypatch
):
    """Stopped in the middle, it goes on to the same logs."""
    monkeypatch.chdir(ROOT)
    settings = replace(SMALL, save_every=1, date="2026-01-31")
    whole = tmp_path / "whole"
    real.train_counted(replace(settings, out=str(whole)))
    costs = rows_of(whole / "cost.jsonl")
    order = ["test base", "rollout", "rollout", "test grpo-1", "pool", "student"]
    order += ["teacher", "control", "test ofsd-1"]
    assert [cost["for"] for cost in costs] == order
    pool = costs[order.index("pool")]
    assert pool["trajectories"] == SMALL.ofsd_questions * SMALL.group_size
    assert 0 < pool["sampled"] < pool["tokens"]  # observations were read, not sampled

    stopped = tmp_path / "stopped"
    sample = real.CountedRun.sample

    def stop_in_the_pool(self, questions, *, progress="", **keywords):
        trajectories = sample(self, questions, progress=progress, **keywords)
        if progress == "pool":
            raise KeyboardInterrupt
        return trajectories

    with monkeypatch.context() as patch:
        patch.setattr(real.CountedRun, "sample", stop_in_the_pool)
        with pytest.raises(KeyboardInterrupt):
            real.train_counted(replace(settings, out=str(stopped)))
    assert rows_of(stopped / "cost.jsonl")[-1]["for"] == "pool"
    real.train_counted(replace(settings, out=str(stopped)))
    assert rows_of(stopped / "cost.jsonl") == costs


def test_the_start_is_made_by_the_settings_of_the_plan(monkeypatch):
    made = {}

    def make_start(model, questions, corpus, out, **keywords):
        made.update(keywords, model=model, out=out)

    monkeypatch.setattr(real, "make_start", make_start)
    run_main(monkeypatch, real.main, "real.py", "start", "cpu", "some/model")
    settings = real.PLANS["cpu"].search_e1
    assert made["model"] == "some/model"
    assert made["out"] == real.settings_of("cpu", "grpo", 0).model
    assert (made["count"], made["privileged"], made["batch"]) == (32, 16, 4)
    for name in ("prompt", "k", "max_searches", "max_observation_tokens", "arithmetic"):
        assert made[name] == getattr(settings, name)


def test_a_pilot_is_short_has_its_changes_and_is_tested_on_validation_questions(
    monkeypatch, capsys
):
    begun = []
    monkeypatch.setattr(real, "train_counted", begun.append)
    changes = ["grpo_lr=2e-5", "ofsd=true"]
    run_main(monkeypatch, real.main, "real.py", "pilot", "cpu", "fast", *changes)
    (config,) = begun
    assert (config.grpo_lr, config.ofsd, config.grpo_steps) == (2e-5, True, 10)
    assert config.eval_questions.endswith("validation.jsonl")
    assert config.out.endswith("cpu/pilot-fast")
    for change in ("grpo_lr", "lr=2e-5", "grpo_lr=fast"):
        flags = ["pilot", "cpu", "fast", change]
        run_main(monkeypatch, real.main, "real.py", *flags, status=2)
        assert change in line_of(capsys)


def test_models_are_tested_by_the_limits_of_the_plan(tmp_path, monkeypatch, capsys):
    """The start is a model folder itself, and that of a run is in it."""
    (tmp_path / "cpu/search-e1-0/model").mkdir(parents=True)
    write_jsonl(
        tmp_path / "hops.jsonl", [{"id": "1", "question": "?", "golden_answers": ["a"]}]
    )
    passages = [{"id": "1", "title": "a", "text": "b"}]
    write_jsonl(tmp_path / "hops-corpus.jsonl", passages)
    loaded = []
    limits = {}

    def load_model(name, arithmetic):
        loaded.append(name)
        return arithmetic, None

    def evaluate(model, tokenizer, index, questions, **keywords):
        assert (model, len(questions)) == ("bfloat16", 1)
        limits.update(keywords)
        return {"em": 0.5}

    monkeypatch.setattr(real, "DATA", tmp_path)
    monkeypatch.setattr(real, "load_model", load_model)
    monkeypatch.setattr(real, "evaluate", evaluate)
    names = ["start", "search-e1-0"]
    run_main(monkeypatch, real.main, "real.py", "test", "cpu", "hops", *names)
    folder = tmp_path / "cpu"
    assert loaded == [str(folder / "start"), str(folder / "search-e1-0/model")]
    settings = real.PLANS["cpu"].search_e1
    for name in (
        "k",
        "max_searches",
        "max_tokens",
        "max_turn_tokens",
        "max_observation_tokens",
    ):
        assert limits[name] == getattr(settings, name)
    tested = rows_of(folder / "tested-hops.jsonl")
    assert tested == [{"model": name, "em": 0.5} for name in names]


def test_an_answer_that_was_read_is_found_in_the_observation_only(tmp_path):
    observation = [0, "- Ada: Born in London."]
    turn = [1, "<think> Hm </think><answer> Paris </answer>"]
    rows = []
    for golden_answers in (["London!"], ["Paris"]):
        row = {
            "kind": "eval",
            "stage": "base",
            "id": "1",
            "em": 0.0,
            "answer": "Paris",
            "golden_answers": golden_answers,
            "queries": ["Ada", "Ada"],
            "text": [observation, turn],
        }
        rows.append(row)
    write_jsonl(tmp_path / "trajectories.jsonl", rows)
    real.answers(str(tmp_path))
    london, paris = rows_of(tmp_path / "answers.jsonl")
    assert london["found"]
    assert not paris["found"]
    for line in (london, paris):
        assert line["queries"] == 2
        assert line["different"] == 1
        assert line["turns"] == [["think", "answer"]]


def test_what_it_does_not_know_is_one_line(monkeypatch, capsys):
    status, _, error = run_here(monkeypatch, capsys, real.main, "real.py", "sing")
    assert status == 2
    assert "data" in error
    assert "start" in error
    assert len(error.splitlines()) == 1
