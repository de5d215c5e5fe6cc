"""tools/start.py: what the demonstrations for a real model are, and that it learns from them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import run_here

from ofsd import privileged_prompt
from rollout import decode, load_model, rollout
from tools import start

MICRO = (
    "--model", "micro/model", "--questions", "micro/train.jsonl", "--corpus", "micro/corpus.jsonl"
)  # fmt: skip
QUESTION = {
    "question": "Whose engine, Lovelace?", "golden_answers": ["Ada Byron", "Charles Babbage"],
    "supporting_titles": ["Ada Lovelace", "London", "Charles Babbage"],
}  # fmt: skip


def test_a_question_is_searched_until_a_passage_holds_an_answer(three):
    steps = start.demonstrate(three, QUESTION, k=1)
    assert [type(step) for step in steps] == [str, list, str]
    assert "<search> Whose engine, Lovelace? </search>" in steps[0]
    assert steps[-1].endswith("<answer> Charles Babbage </answer>")  # the alias that was read
    golden = QUESTION | {"golden_answers": ["the Thames"]}
    steps = start.demonstrate(three, golden, k=1)
    queries = [step.split("<search> ")[1].split(" </search>")[0] for step in steps[:-1:2]]
    assert queries == ["Whose engine, Lovelace?", "London"]  # Ada was found already
    assert start.demonstrate(three, golden, k=1, max_searches=1) is None
    assert start.demonstrate(three, QUESTION | {"golden_answers": ["a bus driver"]}) is None


def test_a_demonstration_is_written_as_a_rollout_is(tokenizer, three):
    """Its passages are those of its observations: a privileged prompt writes them anew."""
    steps = start.demonstrate(three, QUESTION, k=1)
    made = start.write_out(tokenizer, "Who?", steps, budget=20)
    assert made.passages == [step for step in steps if isinstance(step, list)]
    sizes = {len(made.response_ids), len(made.loss_mask), len(made.logprobs)}
    assert len(sizes) == 1 and made.loss_mask.count(0) <= 20
    assert made.response_ids[-1] == tokenizer.eos_token_id and made.loss_mask[-1] == 1


def test_a_demonstration_may_show_itself_in_the_prompt(micro, three):
    """As OFSD's teacher sees a reference. What is to be said stays the same."""
    model, tokenizer = micro
    made = start.write_out(tokenizer, "Who?", start.demonstrate(three, QUESTION, k=1), budget=100)
    shown = start.show_reference(model, tokenizer, made)
    assert shown.prompt_ids == privileged_prompt(tokenizer, "Who?", made, 10**6)
    assert replace(shown, prompt_ids=made.prompt_ids) == made
    made.response_ids *= 1000  # no prompt leaves room for such a response
    assert start.show_reference(model, tokenizer, made).prompt_ids == made.prompt_ids


def test_what_is_shown_becomes_likelier_and_what_the_retriever_wrote_has_no_loss(
    tokenizer, three, random_model
):
    steps = start.demonstrate(three, QUESTION, k=1)
    made = start.write_out(tokenizer, "Who?", steps, budget=100)
    start.imitate(random_model, [made] * 60, lr=3e-3, batch=2)
    (said,) = rollout(random_model, tokenizer, three, ["Who?"], temperature=0.0, k=1,
                      max_observation_tokens=100)  # fmt: skip
    assert said.answer == "Charles Babbage"
    assert said.response_ids == made.response_ids[:-1]  # a rollout ends with its answer
    ids = torch.tensor([made.prompt_ids + made.response_ids])
    logprobs = random_model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    written = ~torch.tensor(made.loss_mask, dtype=bool)
    theirs = logprobs[len(made.prompt_ids) - 1 :][written].mean()
    assert theirs < -math.log(len(tokenizer)) / 2  # it did not learn the passages


def test_a_model_is_given_its_start(tmp_path, monkeypatch, capsys, micro):
    """The command end to end, on micro/model, with a prompt of one's own."""
    how = [*MICRO, "--count", "6", "--out", tmp_path / "started", "--prompt", "Well, {question}"]
    how += ["--privileged", "2"]
    taught, imitate = [], start.imitate
    keep = lambda model, rows, **how: taught.extend(rows) or imitate(model, rows, **how)  # noqa: E731
    monkeypatch.setattr(start, "imitate", keep)
    status, out, _ = run_here(monkeypatch, capsys, start.main, "start.py", *how)
    assert status == 0 and "6 demonstrations from 1080 questions" in out
    started, tokenizer = load_model(str(tmp_path / "started"))
    assert tokenizer.init_kwargs["search_prompt"] == "Well, {question}"
    assert sum("An expert" in decode(tokenizer, t.prompt_ids) for t in taught) == 2 < len(taught)
    assert not torch.equal(next(started.parameters()), next(micro[0].parameters()))
    status, _, error = run_here(monkeypatch, capsys, start.main, "start.py", *how)
    assert status == 2 and "exists already" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("flags, message", [
    ((), "required"),
    ((*MICRO, "--out", "runs/never", "--count", "0"), "at least 1"),
    ((*MICRO, "--out", "runs/never", "--count", "4", "--privileged", "5"), "a part of --count"),
    ((*MICRO, "--out", "runs/never", "--prompt", "no place"), "{question}"),
    ((*MICRO[:2], "--questions", "nowhere", *MICRO[4:], "--out", "runs/never"), "nowhere"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(flags, message, monkeypatch, capsys):
    status, _, error = run_here(monkeypatch, capsys, start.main, "start.py", *flags)
    assert status == 2 and message in error and len(error.strip().splitlines()) == 1


def test_no_answer_to_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    row = {"question": "Who is it?", "golden_answers": ["nobody at all"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    how = "--questions", tmp_path / "q.jsonl", "--out", tmp_path / "never"
    flags = *MICRO[:2], *MICRO[4:], *how
    status, _, error = run_here(monkeypatch, capsys, start.main, "start.py", *flags)
    assert status == 2 and "BM25 finds" in error and not (tmp_path / "never").exists()
