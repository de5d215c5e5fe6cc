"""The forward passes of training: hidden states, logits and log-probabilities of the
policy's tokens, against the plain forward pass."""

import pytest
import torch
from updates import IDS, ROWS, plain_logits

import grpo
from grpo import (
    micro_batches,
    padded,
    policy_hidden,
    policy_logprobs,
    response_logits,
    to_logits,
    token_chunks,
    token_logprobs,
)
from machinery.errors import BadInput
from machinery.models import check_training
from rollout import Trajectory

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "gemma",
    "phi3",
    "olmo2",
    "gpt_neox",
    "granite",
    "stablelm",
    "cohere",
]


def test_response_logits_predict_each_response_token(random_model):
    """The oracle itself: token t is predicted from what stands before it alone."""
    row = ROWS[0]
    logits = response_logits(random_model, row)  # (3, V)
    assert len(logits) == 3
    for t in range(3):
        seen = torch.tensor([row.prompt_ids + row.response_ids[:t]])
        expected = random_model(input_ids=seen, use_cache=False).logits[0, -1]
        assert torch.allclose(logits[t], expected, atol=1e-5)


def test_hidden_states_are_those_that_predict_the_policys_tokens(random_model):
    logits = to_logits(random_model, policy_hidden(random_model, ROWS))  # (5, V)
    assert torch.allclose(logits, plain_logits(random_model), atol=1e-5)


def test_a_prompt_may_be_replaced(random_model):
    prompts = [[3, 4], [8, 8, 8]]
    moved = [
        Trajectory("", prompt, row.response_ids, row.loss_mask)
        for prompt, row in zip(prompts, ROWS, strict=True)
    ]
    hidden = policy_hidden(random_model, ROWS, prompts)
    assert torch.equal(hidden, policy_hidden(random_model, moved))
    assert not torch.allclose(hidden, policy_hidden(random_model, ROWS), atol=1e-3)


@pytest.mark.parametrize("positions", [1, 2, 5, 100])
def test_log_probabilities_in_chunks_are_the_plain_ones(
    random_model, monkeypatch, positions
):
    plain = token_logprobs(plain_logits(random_model), IDS)  # (5,)
    monkeypatch.setattr(grpo, "CHUNK", positions * random_model.config.vocab_size)
    hidden = policy_hidden(random_model, ROWS)
    chunked = policy_logprobs(random_model, hidden, IDS)
    assert torch.allclose(chunked, plain, atol=1e-5)


def test_chunks_cover_all_tokens_once_and_there_is_always_one(
    random_model, monkeypatch
):
    monkeypatch.setattr(grpo, "CHUNK", 3 * random_model.config.vocab_size - 1)
    numbers = list(range(5))
    parts = [numbers[chunk] for chunk in token_chunks(random_model, 5)]
    assert parts == [[0, 1], [2, 3], [4]]
    assert [numbers[:0][chunk] for chunk in token_chunks(random_model, 0)] == [[]]
    monkeypatch.setattr(grpo, "CHUNK", 1)  # a vocabulary larger than a chunk
    assert len(token_chunks(random_model, 5)) == 5


def test_nothing_sampled_has_no_hidden_state(random_model):
    hidden = policy_hidden(random_model, [Trajectory("", [5], [6, 7], [0, 0])])
    ids = torch.tensor([], dtype=torch.long)
    assert policy_logprobs(random_model, hidden, ids).shape == (0,)


def test_micro_batches_are_of_similar_length_and_of_those_that_are_asked():
    lengths = [30, 10, 31, 11, 12]
    assert micro_batches(lengths, 2) == [[1, 3], [4, 0], [2]]
    assert micro_batches(lengths, 2, among=[0, 2, 4]) == [[4, 0], [2]]
    assert micro_batches([], 2) == []


def test_padding_stands_behind():
    assert padded([[1], [], [2, 3]], torch.long).tolist() == [[1, 0], [0, 0], [2, 3]]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_output_layer_of_each_family_gives_its_logits(kind, small_model):
    settings = {}
    if kind not in ("gpt2", "gpt_neox"):
        settings["num_key_value_heads"] = 2
    if kind == "granite":
        settings["logits_scaling"] = 3.0
    model = small_model(kind, **settings)
    logits = to_logits(model, policy_hidden(model, ROWS))
    assert torch.allclose(logits, plain_logits(model), atol=1e-5)
    check_training(model)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_whose_logits_are_computed_otherwise_is_refused(random_model):
    random_model.config.logits_scaling = 2.0  # a Qwen2 does not heed it
    with pytest.raises(BadInput, match=r"probabilities are off by 0\.14"):
        check_training(random_model)


def test_a_model_is_checked_in_float32_whatever_is_around(random_model, monkeypatch):
    def exact(*args, plain=policy_hidden):
        assert not torch.is_autocast_enabled("cpu")
        return plain(*args)

    monkeypatch.setattr("machinery.models.policy_hidden", exact)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        check_training(random_model)
        with pytest.raises(AssertionError):  # or this test would say nothing
            exact(random_model, ROWS)


@pytest.mark.parametrize("likely", [False, True])
def test_a_model_may_be_off_only_where_nothing_is_likely(
    likely, random_model, monkeypatch
):
    """In bfloat16 a pretrained model is off by .8 nats at a token that it never says.
    That is no reason to refuse it. Being off by as much at the likely token is one."""
    random_model.lm_head.weight.data *= 5.0  # now some tokens are likely, and most not

    def noisy(model, hidden, plain=to_logits):
        logits = plain(model, hidden)  # (N, V)
        token = logits.argmax(-1) if likely else logits.argmin(-1)  # (N,)
        noise = torch.full((len(logits), 1), -0.8)
        return logits.scatter_add(1, token[:, None], noise)

    monkeypatch.setattr("machinery.models.to_logits", noisy)
    if likely:
        with pytest.raises(BadInput, match="probabilities are off by"):
            check_training(random_model)
    else:
        check_training(random_model)
