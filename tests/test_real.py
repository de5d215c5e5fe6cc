"""results/real/run.py: the questions are split once, without overlap, and the logs are read right."""

import gzip
import json

import pytest
import torch
from conftest import ROOT, run_here
from real import run

from eval import load_questions, normalize_answer
from train import Config


def write_set(folder, name, questions):
    (folder / name).mkdir(parents=True)
    rows = [{"id": q, "question": q, "golden_answers": ["a"]} for q in questions]
    passages = [{"id": "0", "title": name, "text": f"What {name} says."}]
    for kind, lines in ("questions", rows), ("corpus", passages):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name / f"{kind}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def test_no_question_is_in_two_parts(tmp_path, monkeypatch, capsys):
    """One of popqa's stands in nq too, written otherwise: it is kept once."""
    for name in run.SINGLE + run.SEVERAL:
        write_set(tmp_path / "sets", name, [f"What is {name} {i}?" for i in range(210)])
    popqa = ["what is NQ 7", *(f"What is popqa {i}?" for i in range(209))]
    (tmp_path / "sets/popqa/questions.jsonl.gz").unlink()
    (tmp_path / "sets/popqa/corpus.jsonl.gz").unlink()
    (tmp_path / "sets/popqa").rmdir()
    write_set(tmp_path / "sets", "popqa", popqa)
    monkeypatch.setattr(run, "DATA", tmp_path / "made")
    assert run_here(monkeypatch, capsys, run.main, "run.py", "data", tmp_path / "sets")[0] == 0
    parts = {name: load_questions(str(tmp_path / f"made/{name}.jsonl"))
             for name in ("test", "validation", "train", "hops")}  # fmt: skip
    assert [len(rows) for rows in parts.values()] == [400, 100, 4 * 85 - 1, 400]
    texts = [normalize_answer(row["question"]) for rows in parts.values() for row in rows]
    assert len({*texts}) == len(texts)
    again = parts["test"]
    run.data(str(tmp_path / "sets"))
    assert load_questions(str(tmp_path / "made/test.jsonl")) == again


def test_the_table_counts_the_tokens_before_each_test(monkeypatch, capsys):
    folder = "results/real/gpu/search-e1-0"
    assert [row["em"] for row in run.tests_of(ROOT / folder)] == [0.285, 0.305]
    status, out, _ = run_here(monkeypatch, capsys, run.main, "run.py", "table", folder)
    header, *lines = (line.split() for line in out.strip().splitlines())
    costs = [json.loads(line) for line in (ROOT / folder / "cost.jsonl").read_text().splitlines()]
    spent = sum(row["tokens"] for row in costs if row["for"] == "rollout")
    assert status == 0 and [line[1:3] for line in lines] == [["base", "0.285"], ["grpo-1", "0.305"]]
    assert [line[-1] for line in lines] == ["0", f"{spent / 1000:.0f}"]


@pytest.mark.parametrize("machine", run.PLANS)
def test_both_arms_have_the_settings_of_the_recipe(machine):
    for arm in "search-e1", "grpo":
        config = run.settings(machine, arm, seed=3)
        assert config.seed == 3 and config.prompt == run.PLANS[machine].settings.prompt
        assert config.ofsd == (arm == "search-e1") and config.out.endswith(f"{machine}/{arm}-3")


def test_a_run_that_goes_on_keeps_its_date_and_the_arithmetic_of_its_plan(tmp_path, monkeypatch):
    """A date is in some chat templates, and a run may go on after midnight."""
    seen = []

    def train(config, resume):
        half = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
        seen.append((config.date, resume, *half))

    monkeypatch.setattr(run.train_module, "train", train)
    monkeypatch.setattr(run.train_module, "rollout", None)  # so that its wrapper is undone
    config = Config(out=str(tmp_path))
    run.run_counted("cpu", config)
    (tmp_path / "config.json").write_text('{"date": "2026-01-31"}')
    run.run_counted("gpu", config)
    assert seen == [("", False, True, False), ("2026-01-31", True, False, False)]


def test_an_answer_that_was_read_is_found_in_the_observation_only(tmp_path):
    said, read = [1, "<think> Hm </think><answer> Paris </answer>"], [0, "- Ada: Born in London."]
    row = {"kind": "eval", "stage": "base", "id": "1", "em": 0.0, "answer": "Paris",
           "queries": ["Ada", "Ada"], "text": [read, said]}  # fmt: skip
    rows = [row | {"golden_answers": golden} for golden in (["London!"], ["Paris"])]
    run.write(tmp_path / "trajectories.jsonl", rows)
    run.answers(str(tmp_path))
    told = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["found"] for row in told] == [True, False]
    assert {row["queries"] - row["different"] for row in told} == {1}
    assert all(row["turns"] == [["think", "answer"]] for row in told)


def test_what_it_does_not_know_is_one_line(monkeypatch, capsys):
    status, _, error = run_here(monkeypatch, capsys, run.main, "run.py", "sing")
    assert status == 2 and "data, start" in error and len(error.splitlines()) == 1
