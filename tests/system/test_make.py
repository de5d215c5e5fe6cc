"""micro/: what its data and its model promise. The files are those that are committed."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import make
import pytest
import torch
from conftest import line_of, run_main

from eval import evaluate, load_questions
from grpo import response_logits
from retriever import load_corpus
from rollout import Trajectory

MICRO = Path(make.__file__).parent
TESTS = "evidence-test", "evidence-test-2", "evidence-test-3"
EVIDENCE = "evidence-train", "evidence-validation", *TESTS


@pytest.fixture(scope="module")
def sets():
    names = "train", "validation", "test", *EVIDENCE
    return {name: load_questions(str(MICRO / f"{name}.jsonl")) for name in names}


def test_sizes_and_hops(sets):
    assert len(load_corpus(MICRO / "corpus.jsonl")) > 1000
    assert len(sets["test"]) >= 400 and len(sets["validation"]) >= 200
    for name, questions in sets.items():
        wanted = {3} if name.startswith("evidence") else {1, 2, 3}
        assert {question["hops"] for question in questions} == wanted


def test_the_agent_seldom_answers_the_questions_of_the_evidence(sets):
    """Two links have to be followed, and after each it goes on with the probability 1 - EARLY."""
    for name in EVIDENCE:
        for first, second, _ in (row["chain"] for row in sets[name]):
            assert (1 - make.EARLY[first]) * (1 - make.EARLY[second]) <= 0.1


def test_no_question_occurs_twice_in_text_or_in_substance(sets):
    rows = [question for questions in sets.values() for question in questions]
    assert len({row["question"] for row in rows}) == len(rows)
    assert len({(row["path"][0], *row["chain"]) for row in rows}) == len(rows)


def test_half_of_the_test_questions_are_about_entities_no_other_question_mentions(sets):
    read = [row for part, rows in sets.items() if "test" not in part for row in rows]
    known = {name for row in read for name in row["path"]}
    for part in ("test", *TESTS):
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
        name = row["path"][0]
        found = micro_index.search([name, name.split()[0]], 1)
        full, half = (passages[0].title for passages in found)
        assert full == name
        first += half == name
    assert first < 50


def test_the_committed_data_is_what_the_script_makes(tmp_path, monkeypatch):
    run_main(monkeypatch, make.main, "make.py", "--data-only", "--out", tmp_path)
    names = sorted(path.name for path in MICRO.glob("*.jsonl"))
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == names and len(names) == 9
    for name in names:
        assert (tmp_path / name).read_text() == (MICRO / name).read_text()


def test_the_model_is_small_and_knows_no_fact(micro, sets):
    """With a retriever that finds nothing it must be at a loss: the facts are invented."""
    model, tokenizer = micro
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert (MICRO / "model/model.safetensors").stat().st_size < 8_000_000
    nothing = SimpleNamespace(search=lambda queries, k: [[] for _ in queries])
    assert evaluate(model, tokenizer, nothing, sets["test"][:200])["em"] <= 0.05


def test_the_demonstrations_are_clumsy_and_the_efficient_ones_are_right():
    rng = random.Random(0)
    world = make.World(rng, make.name_pools(rng))
    questions = [q for q in (world.question(rng, 2) for _ in range(300)) if q]
    right = {}
    for name in ("clumsy", "efficient"):
        clumsy, right[name] = name == "clumsy", 0
        for question in questions:
            play = make.demonstrate(rng, world, question, clumsy=clumsy)
            right[name] += f"<answer> {question['golden_answers'][0]}</answer>" in play[-1]
            assert sum(isinstance(step, list) for step in play) <= make.MAX_SEARCHES
    assert right["efficient"] == len(questions) > right["clumsy"] > len(questions) / 3


def test_the_data_is_json_lines_of_the_documented_form():
    for name in ("train", "validation", "test"):
        for line in (MICRO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            assert {"id", "question", "golden_answers"} <= json.loads(line).keys()


def test_the_padded_forward_pass_is_the_plain_one(micro):
    """The supervised training's: rows of any length, each as if it stood alone."""
    rows = [Trajectory("", [5, 6, 7], [8, 9]), Trajectory("", [10], [11, 12, 13, 14])]
    prompts, responses = [row.prompt_ids for row in rows], [row.response_ids for row in rows]
    padded = make.padded_logits(micro[0], prompts, responses)
    for row, logits in zip(rows, padded):
        plain = response_logits(micro[0], row)
        assert torch.allclose(logits[: len(plain)], plain, atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--frobnicate"],
        ["--seed", "many"],
    ],
)
def test_wrong_flags_are_one_line(flags, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, make.main, "make.py", "--out", tmp_path / "made", *flags, status=2)
    line_of(capsys)
    assert not (tmp_path / "made").exists()


def test_a_model_is_measured_by_the_same_functions(monkeypatch, capsys):
    """--check, on twelve questions."""
    few = lambda path: load_questions(path)[:12]  # noqa: E731
    monkeypatch.setattr(make, "load_questions", few)
    run_main(monkeypatch, make.main, "make.py", "--check", "micro/model")
    told = json.loads(capsys.readouterr().out)
    assert {"greedy", "sampled", "pairs", "nothing_found", "edge", "edge_supported"} <= told.keys()
    counts = [told[name] for name in ("pairs", "no_correct", "no_contrast", "too_long")]
    assert sum(counts) == 12
