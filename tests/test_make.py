"""micro/: what its data and its model promise. The files are those that are committed."""

import json
from pathlib import Path

import pytest
import torch

import make
from eval import load_questions
from retriever import load_corpus
from rollout import load_model

MICRO = Path(make.__file__).parent


@pytest.fixture(scope="module")
def sets():
    names = "train", "validation", "test", "evidence-train", "evidence-validation", "evidence-test", "evidence-test-2", "evidence-test-3"
    return {name: load_questions(str(MICRO / f"{name}.jsonl")) for name in names}


def test_sizes_and_hops(sets):
    assert len(load_corpus(MICRO / "corpus.jsonl")) > 1000
    assert len(sets["test"]) >= 400 and len(sets["validation"]) >= 200
    for name, questions in sets.items():
        assert {question["hops"] for question in questions} == ({3} if name.startswith("evidence") else {1, 2, 3})


def test_the_agent_seldom_answers_the_questions_of_the_evidence(sets):
    """Two links have to be followed, and after each it goes on with the probability 1 - EARLY."""
    for name in ("evidence-train", "evidence-validation", "evidence-test", "evidence-test-2", "evidence-test-3"):
        for first, second, _ in (row["chain"] for row in sets[name]):
            assert (1 - make.EARLY[first]) * (1 - make.EARLY[second]) <= 0.1


def test_no_question_occurs_twice_in_text_or_in_substance(sets):
    rows = [question for questions in sets.values() for question in questions]
    assert len({row["question"] for row in rows}) == len(rows)
    assert len({(row["path"][0], *row["chain"]) for row in rows}) == len(rows)


def test_half_of_the_test_questions_are_about_entities_no_other_question_mentions(sets):
    known = {name for part, questions in sets.items() if "test" not in part for row in questions for name in row["path"]}
    for part in ("test", "evidence-test", "evidence-test-2", "evidence-test-3"):
        held = [row for row in sets[part] if row["held_out"]]
        assert len(held) * 2 == len(sets[part])
        assert not known & {name for row in held for name in row["path"]}


def test_every_answer_can_be_found_by_following_the_passages(sets):
    passages = {passage.title: passage.text for passage in load_corpus(MICRO / "corpus.jsonl")}
    for row in (row for questions in sets.values() for row in questions):
        assert row["path"][0] in row["question"] and row["path"][-1] == row["golden_answers"][0]
        for here, there in zip(row["path"], row["path"][1:]):
            assert there in passages[here]
        assert row["golden_answers"][0] not in row["question"]


def test_names_are_shared_so_that_half_a_name_finds_strangers(micro_index, sets):
    first = 0
    for row in sets["train"][:100]:
        full, half = (micro_index.search([query], 1)[0][0].title for query in (row["path"][0], row["path"][0].split()[0]))
        assert full == row["path"][0]
        first += half == row["path"][0]
    assert first < 50


def test_the_committed_data_is_what_the_script_makes(tmp_path, command):
    assert command("micro/make.py", "--data-only", "--out", tmp_path).returncode == 0
    names = sorted(path.name for path in MICRO.glob("*.jsonl"))
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == names and len(names) == 9
    for name in names:
        assert (tmp_path / name).read_text() == (MICRO / name).read_text()


def test_the_model_is_small_and_knows_no_fact(micro, sets):
    """With a retriever that finds nothing it must be at a loss: the facts are invented."""
    from types import SimpleNamespace

    from eval import evaluate

    model, tokenizer = micro
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert (MICRO / "model/model.safetensors").stat().st_size < 8_000_000
    nothing = SimpleNamespace(search=lambda queries, k: [[] for _ in queries])
    assert evaluate(model, tokenizer, nothing, sets["test"][:200])["em"] <= 0.05


def test_the_demonstrations_are_clumsy_and_the_efficient_ones_are_right():
    import random

    rng = random.Random(0)
    world = make.World(rng, make.name_pools(rng))
    questions = [q for q in (world.question(rng, 2) for _ in range(300)) if q]
    right = {}
    for name in ("clumsy", "efficient"):
        plays = [make.demonstrate(rng, world, question, clumsy=name == "clumsy") for question in questions]
        right[name] = sum(f"<answer> {q['golden_answers'][0]}</answer>" in play[-1] for q, play in zip(questions, plays))
        assert all(sum(isinstance(step, list) for step in play) <= make.MAX_SEARCHES for play in plays)
    assert right["efficient"] == len(questions) > right["clumsy"] > len(questions) / 3


def test_the_data_is_json_lines_of_the_documented_form():
    for name in ("train", "validation", "test"):
        for line in (MICRO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            assert {"id", "question", "golden_answers"} <= json.loads(line).keys()


def test_a_real_question_is_demonstrated_by_what_is_found(three):
    question = {"question": "Whose engine, Lovelace?", "golden_answers": ["Ada Lovelace"], "supporting_titles": ["Ada Lovelace", "London"]}
    steps = make.demonstrate_real(three, question)
    assert [type(step) for step in steps] == [str, list, str, list, str]  # the question itself finds Ada
    assert "<search> Whose engine, Lovelace? </search>" in steps[0] and "<search> London </search>" in steps[2]
    assert steps[-1].endswith("<answer> Ada Lovelace </answer>")
    assert make.demonstrate_real(three, {**question, "golden_answers": ["a bus driver"]}) is None


def test_a_real_model_is_given_its_start(tmp_path, command, micro):
    """The command end to end, on micro/model."""
    how = "--model", "micro/model", "--questions", "micro/train.jsonl", "--corpus", "micro/corpus.jsonl", "--count", "6"
    done = command("micro/make.py", *how, "--out", tmp_path / "started")
    assert done.returncode == 0, done.stderr
    assert "6 demonstrations from 1080 questions" in done.stdout
    started, tokenizer = load_model(str(tmp_path / "started"))
    assert tokenizer.init_kwargs["search_prompt"] == "{question}"
    assert not torch.equal(next(started.parameters()), next(micro[0].parameters()))
    again = command("micro/make.py", *how, "--out", tmp_path / "started")
    assert again.returncode == 2 and "holds a model already" in again.stderr
