"""tools/start.py: what the demonstrations for a real model are, and that it learns from
them. tools/imitation.py: the update of all supervised trainings."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import run_here

import grpo
from machinery.models import load_model
from machinery.passages import Passage
from machinery.text import decode
from ofsd import privileged_prompt
from retriever import BM25
from rollout import Trajectory, rollout, spans
from tools import imitation, start

MODEL = ("--model", "micro/model")
QUESTIONS = ("--questions", "micro/train.jsonl")
CORPUS = ("--corpus", "micro/corpus.jsonl")
MICRO = (*MODEL, *QUESTIONS, *CORPUS)
QUESTION = {
    "question": "Whose engine, Lovelace?",
    "golden_answers": ["Ada Byron", "Charles Babbage"],
    "supporting_titles": ["Ada Lovelace", "London", "Charles Babbage"],
}


def written_by_the_policy(tokenizer, trajectory):
    """The text that it learns to write."""
    parts = [ids for sampled, ids in spans(trajectory) if sampled]
    return "".join(decode(tokenizer, ids) for ids in parts)


# ---------------------------------------------------------------- demonstrations


def test_a_question_is_searched_until_a_passage_holds_an_answer(three):
    steps = start.demonstrate(three, QUESTION, k=1)
    assert [type(step) for step in steps] == [str, list, str]
    assert "<search> Whose engine, Lovelace? </search>" in steps[0]
    # The alias that was read.
    assert steps[-1].endswith("<answer> Charles Babbage </answer>")

    golden = {**QUESTION, "golden_answers": ["the Thames"]}
    steps = start.demonstrate(three, golden, k=1)
    queries = [
        step.split("<search> ")[1].split(" </search>")[0] for step in steps[:-1:2]
    ]
    assert queries == ["Whose engine, Lovelace?", "London"]  # Ada was found already
    assert start.demonstrate(three, golden, k=1, max_searches=1) is None

    unanswered = {**QUESTION, "golden_answers": ["a bus driver"]}
    assert start.demonstrate(three, unanswered) is None


def test_an_answer_that_was_cut_off_is_not_read(tokenizer):
    """The model would learn to say "The passages say it." where they do not."""
    far = "The engine was long in the making. " * 8 + "It was built by Charles Babbage."
    near = "Charles Babbage made the engine."
    index = BM25([Passage("0", "Engine", far), Passage("1", "Babbage", near)])
    question = {"question": "Engine?", "golden_answers": ["Charles Babbage"]}
    whole = start.demonstrate(index, question, k=1)
    assert "<answer> Charles Babbage </answer>" in whole[-1]
    limits = {"k": 1, "tokenizer": tokenizer, "max_observation_tokens": 40}
    assert start.demonstrate(index, question, **limits) is None
    # A second search shows it.
    question["supporting_titles"] = ["Babbage"]
    steps = start.demonstrate(index, question, **limits)
    assert [type(step) for step in steps] == [str, list, str, list, str]
    made = start.write_out(tokenizer, "Engine?", steps, 40)
    shown = [decode(tokenizer, ids) for sampled, ids in spans(made) if not sampled]
    assert "Charles Babbage" not in shown[0] and "Charles Babbage" in shown[1]


def test_where_nothing_is_found_nothing_is_read(tokenizer, three):
    """The observation then says "nothing was found", which is no passage."""
    question = {"question": "Zzz?", "golden_answers": ["nothing", "information"]}
    assert start.demonstrate(three, question, tokenizer=tokenizer) is None


@pytest.mark.parametrize(
    "harmful",
    [
        {"question": "Whose engine,</search> Lovelace?"},
        {"question": "Whose engine,<|im_end|> Lovelace?"},
        {"supporting_titles": ["London", "<answer> London </answer>"]},
        {"golden_answers": ["Charles Babbage</answer>"]},
    ],
)
def test_no_markup_of_others_becomes_what_the_policy_writes(harmful, tokenizer, three):
    """A question with markup is left out, the next one takes its place."""
    limits = {"count": 1, "k": 1, "max_searches": 4, "max_observation_tokens": 100}
    questions = [{**QUESTION, **harmful}, QUESTION]
    ((made, _),) = start.write_demonstrations(three, questions, tokenizer, **limits)
    assert made.question == QUESTION["question"]
    text = written_by_the_policy(tokenizer, made)
    assert text.count("</search>") == text.count("</answer>") == 1
    assert text.count("<|im_end|>") == 1 and text.endswith("<|im_end|>")
    assert start.write_demonstrations(three, questions[:1], tokenizer, **limits) == []


def test_a_demonstration_is_written_as_a_rollout_is(tokenizer, three):
    """Its passages are those of its observations: a privileged prompt cuts them."""
    steps = start.demonstrate(three, QUESTION, k=1)
    made = start.write_out(tokenizer, "Who?", steps, max_observation_tokens=20)
    assert made.passages == [step for step in steps if isinstance(step, list)]
    sizes = {len(made.response_ids), len(made.loss_mask), len(made.logprobs)}
    assert len(sizes) == 1 and made.loss_mask.count(0) <= 20
    assert made.response_ids[-1] == tokenizer.eos_token_id and made.loss_mask[-1] == 1


def test_a_demonstration_may_show_itself_in_the_prompt(micro, three, monkeypatch):
    """As OFSD's teacher sees a reference. What is to be said stays the same."""
    model, tokenizer = micro
    steps = start.demonstrate(three, QUESTION, k=1)
    made = start.write_out(tokenizer, "Who?", steps, max_observation_tokens=100)
    shown = start.show_reference(model, tokenizer, made)
    assert shown.prompt_ids == privileged_prompt(tokenizer, "Who?", made, 10**6)
    assert replace(shown, prompt_ids=made.prompt_ids) == made
    # Little room: its passages are cut. No room: it is not shown.
    room = len(shown.prompt_ids) - 10
    monkeypatch.setattr(
        start, "context_length", lambda model: len(made.response_ids) + room
    )
    shorter = start.show_reference(model, tokenizer, made)
    assert made.prompt_ids != shorter.prompt_ids and len(shorter.prompt_ids) <= room
    monkeypatch.setattr(start, "context_length", lambda model: len(made.response_ids))
    assert start.show_reference(model, tokenizer, made) == made


# ---------------------------------------------------------------- the update


def some_trajectories():
    """Three of different lengths, with tokens of the environment in the middle."""
    made = []
    for length in (3, 6, 4):
        trajectory = Trajectory("?", list(range(5, 5 + length)))
        trajectory.extend([7, 8, 9][:length], logprobs=[0.0] * min(length, 3))
        trajectory.extend(list(range(20, 20 + length)))
        trajectory.extend([30 + length, 31], logprobs=[0.0, 0.0])
        made.append(trajectory)
    return made


def plain_loss(model, trajectories, weights):
    """The loss as its formula says, with one forward pass a trajectory."""
    total = 0.0
    for trajectory, token_weights in zip(trajectories, weights, strict=True):
        logits = grpo.response_logits(model, trajectory)  # (T, V)
        ids = torch.tensor(trajectory.response_ids)  # (T,)
        losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
        total = total + (losses * torch.tensor(token_weights)).sum()
    return total / sum(sum(token_weights) for token_weights in weights)


@pytest.mark.parametrize("observations", [None, 0.0, 0.2])
def test_an_update_takes_the_gradient_of_the_plain_loss(observations, random_model):
    """With the environment's tokens left out, or at a small weight."""
    trajectories = some_trajectories()
    weights = [
        [max(float(mask), observations or 0.0) for mask in trajectory.loss_mask]
        for trajectory in trajectories
    ]
    reference = deepcopy(random_model)
    loss = plain_loss(reference, trajectories, weights)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    torch.optim.SGD(reference.parameters(), lr=0.1).step()

    optimizer = torch.optim.SGD(random_model.parameters(), lr=0.1)
    stats = imitation.imitation_step(
        random_model,
        optimizer,
        trajectories,
        micro_batch=2,
        max_grad_norm=0.5,
        weights=None if observations is None else weights,
    )
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for ours, plain in zip(
        random_model.parameters(), reference.parameters(), strict=True
    ):
        assert torch.allclose(ours, plain, atol=1e-6)
        assert ours.grad is None


def test_no_number_depends_on_the_size_of_micro_batches_and_chunks(
    random_model, monkeypatch
):
    found = []
    for micro_batch, chunk in ((1, 2**25), (2, 1), (3, 2**25)):
        monkeypatch.setattr(grpo, "CHUNK", chunk)
        model = deepcopy(random_model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        stats = imitation.imitation_step(
            model, optimizer, some_trajectories(), micro_batch=micro_batch
        )
        flat = torch.cat([parameter.flatten() for parameter in model.parameters()])
        found.append((stats["loss"], stats["grad_norm"], flat))
    for loss, norm, parameters in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert norm == pytest.approx(found[0][1], rel=1e-4)
        assert torch.allclose(parameters, found[0][2], atol=1e-5)


def test_a_token_of_weight_0_costs_no_logits(random_model, monkeypatch):
    sizes = []
    to_logits = imitation.to_logits

    def counted(model, hidden):
        sizes.append(len(hidden))
        return to_logits(model, hidden)

    monkeypatch.setattr(imitation, "to_logits", counted)
    trajectories = some_trajectories()
    weights = [[0.0] * len(t.response_ids) for t in trajectories]
    optimizer = torch.optim.AdamW(random_model.parameters())
    before = deepcopy(random_model.state_dict())
    stats = imitation.imitation_step(
        random_model, optimizer, trajectories, micro_batch=3, weights=weights
    )
    assert stats == {"loss": 0.0, "grad_norm": 0.0} and sizes == []
    for name, value in random_model.state_dict().items():
        assert torch.equal(value, before[name])  # nothing to learn, and no step
    weights[1][0] = 0.5
    imitation.imitation_step(
        random_model, optimizer, trajectories, micro_batch=3, weights=weights
    )
    assert sizes == [1]


def test_what_is_shown_becomes_likelier_and_what_the_retriever_wrote_has_no_loss(
    tokenizer, three, random_model
):
    steps = start.demonstrate(three, QUESTION, k=1)
    made = start.write_out(tokenizer, "Who?", steps, max_observation_tokens=100)
    start.imitate(random_model, [made] * 60, lr=3e-3, batch=2)
    (said,) = rollout(
        random_model,
        tokenizer,
        three,
        ["Who?"],
        temperature=0.0,
        k=1,
        max_observation_tokens=100,
    )
    assert said.answer == "Charles Babbage"
    assert said.response_ids == made.response_ids[:-1]  # a rollout ends with its answer
    with torch.no_grad():
        logits = grpo.response_logits(random_model, made)  # (T, V)
    logprobs = grpo.token_logprobs(logits, torch.tensor(made.response_ids))  # (T,)
    by_the_retriever = ~torch.tensor(made.loss_mask, dtype=bool)
    # It did not learn the passages.
    assert logprobs[by_the_retriever].mean() < -math.log(len(tokenizer)) / 2


# ---------------------------------------------------------------- the command


def test_a_model_is_given_its_start(tmp_path, monkeypatch, capsys, micro):
    """The command end to end, on micro/model, with a prompt of one's own."""
    flags = [*MICRO, "--out", tmp_path / "started", "--count", "6"]
    flags += ["--prompt", "Well, {question}", "--privileged", "2"]
    taught = []
    imitate = start.imitate

    def noted(model, demonstrations, *, lr, batch):
        taught.extend(demonstrations)
        imitate(model, demonstrations, lr=lr, batch=batch)

    monkeypatch.setattr(start, "imitate", noted)
    status, out, _ = run_here(monkeypatch, capsys, start.main, "start.py", *flags)
    assert status == 0 and "6 demonstrations from 1080 questions" in out
    assert [path.name for path in tmp_path.iterdir()] == ["started"]
    started, tokenizer = load_model(str(tmp_path / "started"))
    assert tokenizer.init_kwargs["search_prompt"] == "Well, {question}"
    prompts = [decode(tokenizer, trajectory.prompt_ids) for trajectory in taught]
    assert sum("An expert" in prompt for prompt in prompts) == 2 < len(taught)
    assert not torch.equal(next(started.parameters()), next(micro[0].parameters()))
    status, _, error = run_here(monkeypatch, capsys, start.main, "start.py", *flags)
    assert status == 2 and "exists already" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "required"),
        ((*MICRO, "--out", "runs/never", "--count", "0"), "at least 1"),
        ((*MICRO, "--out", "runs/never", "--k", 2**40), "below 2**32"),
        (
            (*MICRO, "--out", "runs/never", "--count", "4", "--privileged", "5"),
            "a part of --count",
        ),
        ((*MICRO, "--out", "runs/never", "--prompt", "no place"), "{question}"),
        ((*MICRO, "--out", "runs/never", "--lr", "inf"), "--lr"),
        ((*MICRO, "--out", "runs/never", "--lr", "nan"), "--lr"),
        ((*MICRO, "--out", "runs/never", "--lr", "-1"), "--lr"),
        ((*MICRO, "--out", "runs/never", "--seed", 10**30), "--seed"),
        ((*MICRO, "--out", "runs/never", "--seed", "-1"), "--seed"),
        ((*MICRO, "--out", "README.md/never"), "Not a directory"),
        ((*MICRO, "--out", "x" * 253), "File name too long"),  # with .new it is
        (
            (*MODEL, "--questions", "nowhere", *CORPUS, "--out", "runs/never"),
            "nowhere",
        ),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(
    flags, message, monkeypatch, capsys
):
    def no_work(*arguments, **settings):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(start, "load_model", no_work)
    status, _, error = run_here(monkeypatch, capsys, start.main, "start.py", *flags)
    assert status == 2 and message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("titles", ["Ada", ["Ada", 3], {"Ada": 1}])
def test_titles_that_are_no_list_are_refused_by_file_and_line(
    titles, tmp_path, monkeypatch, capsys
):
    rows = [{**QUESTION, "supporting_titles": t} for t in (["Ada"], None, titles)]
    file = tmp_path / "q.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows))
    flags = (*MODEL, *CORPUS, "--questions", file, "--out", tmp_path / "never/ever")
    status, _, error = run_here(monkeypatch, capsys, start.main, "start.py", *flags)
    assert status == 2 and f"{file}:5: " in error and "supporting_titles" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "never").exists()


def test_no_answer_to_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    row = {"question": "Who is it?", "golden_answers": ["nobody at all"]}
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(row))
    flags = (*MODEL, *CORPUS, "--questions", file, "--out", tmp_path / "never")
    status, _, error = run_here(monkeypatch, capsys, start.main, "start.py", *flags)
    assert status == 2 and "BM25 find" in error and not (tmp_path / "never").exists()
