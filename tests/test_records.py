"""machinery/records.py: what a run keeps to be looked at, by the plain forward pass."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from eval import load_questions
from grpo import response_logits, token_logprobs
from machinery.records import OBJECTION, first_varied, reading_of, token_moves
from ofsd import Pair, token_divergences
from rollout import Trajectory, rollout


def test_the_group_that_is_kept_is_the_first_that_teaches_something():
    assert first_varied([[1.0, 1.0], [0.5, 0.5], [0.0, 0.1], [1.0, 0.0]]) == 2
    assert first_varied([[1.0, 1.0], [0.0, 0.0]]) == 0


def test_a_token_of_the_policy_has_its_log_probability_before_and_now(
    random_model, tokenizer
):
    trajectory = Trajectory("?", [3, 4], [5, 6, 7, 8], [1, 0, 0, 1], [-1.5, 0, 0, -2.0])
    moves = token_moves(random_model, tokenizer, trajectory)
    with torch.no_grad():
        logits = response_logits(random_model, trajectory)  # (T, V)
    now = token_logprobs(logits, torch.tensor(trajectory.response_ids)).tolist()
    texts = [tokenizer.decode([token]) for token in trajectory.response_ids]
    assert [move[0] for move in moves] == texts
    assert moves[1:3] == [texts[1:2], texts[2:3]]
    assert moves[0][1:] == pytest.approx([-1.5, now[0]], abs=1e-4)
    assert moves[3][1:] == pytest.approx([-2.0, now[3]], abs=1e-4)


def test_an_objection_has_the_teachers_first_tokens_and_both_probabilities(
    micro, micro_index, tokenizer
):
    """By the plain forward pass: each token above the bound, and no other."""
    model = micro[0]
    question = load_questions(str(ROOT / "micro/train.jsonl"))[0]
    group = rollout(*micro, micro_index, [question["question"]], group_size=3, seed=0)
    prompt = group[0].prompt_ids + group[2].prompt_ids
    pair = Pair(question, group[0], group[2], prompt, [])
    privileged = replace(pair.student, prompt_ids=pair.prompt)
    with torch.no_grad():
        p_s = response_logits(model, pair.student).softmax(-1)  # (T, V)
        p_t = response_logits(model, privileged).softmax(-1)  # (T, V)
    values, kept = reading_of(model, tokenizer, pair)
    assert values == token_divergences(model, pair)
    large = [value is not None and value > OBJECTION for value in values]
    expected = [number for number, is_large in enumerate(large) if is_large]
    assert [row[0] for row in kept] == expected
    assert 0 < len(kept) < sum(pair.student.loss_mask)
    for place, *tokens in kept:
        first = p_t[place].argsort(descending=True)[:3].tolist()
        ids = [pair.student.response_ids[place], *first]
        assert [token[0] for token in tokens] == [tokenizer.decode([i]) for i in ids]
        for token, (_, p_teacher, p_student) in zip(ids, tokens, strict=True):
            assert p_teacher == pytest.approx(p_t[place, token].item(), abs=1e-4)
            assert p_student == pytest.approx(p_s[place, token].item(), abs=1e-4)
