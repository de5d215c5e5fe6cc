"""train.py: a short run end to end, one update at a time, and the input it refuses."""

import json
import os
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

import make
import ofsd as ofsd_module
import train as train_module
from eval import evaluate, load_questions
from grpo import frozen_copy, group_advantages, grpo_step, knows_output_layer, policy_hidden
from make import response_logits
from ofsd import ofsd_step
from retriever import BadInput, open_index
from rollout import Trajectory, load_model, rollout, spans
from train import Config, train

DATA = Path(__file__).resolve().parent.parent.parent / "shared/data"
SMALL = Config(
    rounds=1, grpo_steps=2, questions_per_step=4, group_size=3, ofsd_questions=12, ofsd_epochs=1, ofsd_batch=4,
    eval_limit=6, grpo_lr=1e-4, force_ofsd=True,
)  # fmt: skip


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def untimed(rows):
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert train(replace(SMALL, out=str(folder))) == folder
    return folder


def test_a_short_run_writes_what_it_promises(small_run, capsys):
    rows = read(small_run, "metrics.jsonl")
    assert [(row["kind"], row["stage"]) for row in rows if row["kind"] != "step"] == [
        ("eval", "base"), ("eval", "grpo-1"), ("mining", "ofsd-1"), ("eval", "ofsd-1")
    ]  # fmt: skip
    steps = [row for row in rows if row["kind"] == "step" and row["stage"] == "grpo-1"]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert {*train_module.COLUMNS, "loss", "rollout_s", "step_s"} <= row.keys()
        assert 0 <= row["zero_var"] <= 1 and row["entropy"] > 0 and row["logprob_gap"] < 1e-3
        assert row["clip_frac"] == 0  # one update a batch: the ratio is 1
    assert steps[0]["kl"] < 1e-6 < steps[1]["kl"]  # the policy is the start policy, and then no longer
    mining = next(row for row in rows if row["kind"] == "mining")
    assert mining["pairs"] + mining["no_correct"] + mining["no_contrast"] + mining["too_long"] == 12
    distilled = [row for row in rows if row["kind"] == "step" and row["stage"] == "ofsd-1"]
    assert len(distilled) == -(-mining["pairs"] // 4) and all(row["loss"] > 0 for row in distilled)
    evals = [row for row in rows if row["kind"] == "eval"]
    assert all({"em", "f1", "searches", "answered", "n", "em_by"} <= row.keys() and row["n"] == 6 for row in evals)
    assert evals[-1]["edge_supported"] == mining["edge_supported"]
    told = read(small_run, "trajectories.jsonl")
    assert sum(row["kind"] == "eval" for row in told) == 18 and sum(row["kind"] == "pair" for row in told) == mining["pairs"]
    assert json.loads((small_run / "config.json").read_text())["grpo_steps"] == 2


def test_the_parameters_moved_and_the_model_folder_loads(small_run, micro):
    trained = AutoModelForCausalLM.from_pretrained(small_run / "model")
    moved = [not torch.equal(one, two) for one, two in zip(trained.parameters(), micro[0].parameters())]
    assert all(moved)
    model, tokenizer = load_model(str(small_run / "model"))
    assert tokenizer.init_kwargs["search_prompt"] == "{question}"  # the prompt travels with the model


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(small_run, tmp_path):
    train(replace(SMALL, out=str(tmp_path / "again")))
    train(replace(SMALL, out=str(tmp_path / "other"), seed=1))
    first, again, other = (untimed(read(f, "metrics.jsonl")) for f in (small_run, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert first != other and first[0] == other[0]  # a run starts from the base, whatever ran before


def test_an_existing_folder_is_refused_and_left_alone(small_run):
    before = (small_run / "metrics.jsonl").read_text()
    with pytest.raises(BadInput, match="exists already"):
        train(replace(SMALL, out=str(small_run)))
    assert (small_run / "metrics.jsonl").read_text() == before


# ---------------------------------------------------------------- single updates


class Spy:
    """An optimizer that keeps the gradients instead of using them."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{"params": list(model.parameters())}]

    def step(self):
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def zero_grad(self):
        self.model.zero_grad()


@pytest.fixture(scope="module")
def batch(micro, micro_index):
    """Trajectories of 4 questions x 3, and rewards of which the second group's are all equal."""
    questions = [json.loads(line)["question"] for line in open("micro/train.jsonl", encoding="utf-8")][:4]
    rows = rollout(*micro, micro_index, questions, group_size=3, seed=0)
    return rows, torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]])


def gradient(micro, batch, **settings):
    model = frozen_copy(micro[0]).requires_grad_(True)
    spy = Spy(model)
    stats = grpo_step(model, micro[0], spy, *batch, replace(SMALL, max_grad_norm=1e9, **settings))
    return spy.gradient, stats


def test_grpo_step_gives_the_same_gradient_for_any_micro_batch_size(micro, batch):
    whole, stats = gradient(micro, batch, micro_batch=100)
    for size in (1, 5):
        parts, other = gradient(micro, batch, micro_batch=size)
        assert torch.allclose(whole, parts, atol=1e-5 * whole.abs().max().item())
        assert other == pytest.approx(stats, rel=1e-3, abs=1e-5)


def test_gradient_checkpointing_changes_no_gradient_and_keeps_the_cache_for_sampling(micro, micro_index, batch):
    plain, stats = gradient(micro, batch)
    model = frozen_copy(micro[0])
    model.activation_checkpointing_enable()
    again, other = gradient((model, micro[1]), batch)
    assert torch.allclose(plain, again, atol=1e-6 * plain.abs().max().item())
    assert other == pytest.approx(stats, rel=1e-3, abs=1e-6)
    how = dict(seed=0, group_size=2)
    one, two = (rollout(m, micro[1], micro_index, [batch[0][0].question], **how) for m in (model, micro[0]))
    assert [t.response_ids for t in one] == [t.response_ids for t in two]


def test_gradient_checkpointing_needs_less_memory():
    """Bytes kept for the backward pass, counted by torch's own hooks."""
    kept = []
    for on in (False, True):
        model, sizes = frozen_copy(load_model("micro/model")[0]).requires_grad_(True), []
        if on:
            model.activation_checkpointing_enable()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            policy_hidden(model, [Trajectory("", [5] * 20, [6] * 200, [1] * 200)] * 4)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_skipping_groups_without_variance_changes_nothing(micro, batch):
    skipped, _ = gradient(micro, batch)
    # With beta = 0 but nothing skipped: the plain formula over all trajectories.
    model = frozen_copy(micro[0]).requires_grad_(True)
    rows, rewards = batch
    advantages, tokens = group_advantages(rewards).flatten(), sum(sum(r.loss_mask) for r in rows)
    from grpo import grpo_loss, token_logprobs

    for row, advantage in zip(rows, advantages):
        logits = response_logits(model, [row.prompt_ids], [row.response_ids])
        logprobs = token_logprobs(logits, torch.tensor([row.response_ids]))
        loss, _ = grpo_loss(
            logprobs, torch.tensor([row.logprobs]), advantage[None], torch.tensor([row.loss_mask]), num_tokens=tokens
        )
        loss.backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(plain, skipped, atol=1e-5 * plain.abs().max().item())


def test_without_any_variance_the_gradient_is_zero_and_the_statistics_are_there(micro, batch):
    found, stats = gradient(micro, (batch[0], torch.zeros(4, 3)))
    assert found.eq(0).all() and stats["grad_norm"] == 0 and stats["entropy"] > 0


def test_prompts_too_long_for_the_model_give_no_answer_and_no_error(micro, micro_index):
    rows = rollout(*micro, micro_index, ["word " * 2000, "Who?"], group_size=2, seed=0)
    assert [row.finish_reason for row in rows[:2]] == ["context"] * 2 and not rows[0].response_ids
    for rewards in (torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0]])):
        found, stats = gradient(micro, (rows, rewards))
        assert found.isfinite().all() and stats["entropy"] > 0
    model = frozen_copy(micro[0]).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = grpo_step(model, micro[0], optimizer, rows[:2], torch.zeros(1, 2), SMALL)
    assert stats["grad_norm"] == 0 and all(torch.equal(p, q) for p, q in zip(model.parameters(), micro[0].parameters()))


def test_one_update_makes_the_good_likelier_and_the_bad_less_likely(micro, batch):
    model = frozen_copy(micro[0]).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    first = grpo_step(model, micro[0], optimizer, *batch, SMALL)
    second = grpo_step(model, micro[0], optimizer, *batch, replace(SMALL, clip_eps=100.0))
    assert first["loss"] == pytest.approx(0, abs=0.2) and first["grad_norm"] > 0
    assert second["loss"] < first["loss"] and second["logprob_gap"] > first["logprob_gap"]


def test_several_updates_bring_the_clip_to_work(micro, batch):
    model = frozen_copy(micro[0]).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stats = grpo_step(model, micro[0], optimizer, *batch, replace(SMALL, updates=4))
    assert stats["clip_frac"] > 0 and stats["logprob_gap"] < 1e-3  # the gap is taken before any update


def test_ofsd_step_reads_one_response_twice_and_leaves_the_teacher_alone(micro, batch, monkeypatch):
    rows, _ = batch
    teacher, model = frozen_copy(micro[0]), frozen_copy(micro[0]).requires_grad_(True)
    pairs = [(rows[i], rows[0].prompt_ids + rows[i].prompt_ids) for i in (1, 2)]
    read_by = []
    plain = ofsd_module.policy_hidden
    monkeypatch.setattr(ofsd_module, "policy_hidden", lambda m, rows, prompts=None: read_by.append((m, prompts, rows)) or plain(m, rows, prompts))
    before = [p.clone() for p in teacher.parameters()]
    stats = ofsd_step(model, teacher, torch.optim.SGD(model.parameters(), lr=0.1), pairs, SMALL)
    (one, privileged, taught), (two, standard, learnt) = read_by
    assert one is teacher and two is model and taught == learnt and standard is None
    assert sorted(privileged) == sorted(prompt for _, prompt in pairs) != sorted(t.prompt_ids for t in learnt)
    assert stats["loss"] > 0
    assert all(torch.equal(b, p) and p.grad is None for b, p in zip(before, teacher.parameters()))
    # Under one and the same prompt the student is its own teacher: nothing to learn.
    same = [(rows[1], rows[1].prompt_ids)]
    assert ofsd_step(teacher.requires_grad_(True), frozen_copy(teacher), Spy(teacher), same, SMALL)["loss"] < 1e-6


def test_the_gradient_is_that_of_finite_differences(micro, batch):
    """From rollouts to the loss, end to end: along its gradient g the loss falls by |g|^2 a unit."""
    rows = [replace(row, logprobs=[value - 0.05 * mask for value, mask in zip(row.logprobs, row.loss_mask)]) for row in batch[0]]
    pairs = [(rows[i], rows[0].prompt_ids + rows[i].prompt_ids) for i in (1, 2)]
    teacher = frozen_copy(micro[0])

    def grpo(model, config=replace(SMALL, max_grad_norm=1e9, kl_coef=0.1)):
        return grpo_step(model, teacher, Spy(model), rows, batch[1], config)["loss"]

    def ofsd(model, config=replace(SMALL, max_grad_norm=1e9)):
        return ofsd_step(model, teacher, Spy(model), pairs, config)["loss"]

    for step in (grpo, ofsd):
        model = frozen_copy(micro[0]).requires_grad_(True)
        spies = []
        train_spy = Spy.step
        Spy.step = lambda self: (train_spy(self), spies.append(self.gradient))
        try:
            step(model)
        finally:
            Spy.step = train_spy
        gradient, norm = spies[0], spies[0].norm()
        start, values = torch.nn.utils.parameters_to_vector(model.parameters()).detach(), []
        for epsilon in (0.003, -0.003):
            torch.nn.utils.vector_to_parameters(start + epsilon * gradient / norm, model.parameters())
            values.append(step(model))
        assert (values[0] - values[1]) / 0.006 == pytest.approx(norm.item(), rel=0.01)


def test_with_adapters_the_teacher_is_the_policy_after_grpo_and_they_are_merged(tmp_path, monkeypatch):
    seen, probe = {}, ([[5, 6]], [[7, 8]])
    logits = lambda model: response_logits(model, *probe).detach()  # noqa: E731
    plain_edge, plain_step = train_module.teacher_edge, train_module.ofsd_step

    def edge(run, pairs):
        seen["start"], seen["after grpo"], seen["run"] = logits(run.start), logits(run.model), run
        return plain_edge(run, pairs)

    def step(model, teacher, optimizer, pairs, config, adapters):
        assert teacher is model
        with adapters.off():
            seen["teacher"] = logits(teacher)
        stats = plain_step(model, teacher, optimizer, pairs, config, adapters)
        seen["adapted"] = logits(model)
        return stats

    monkeypatch.setattr(train_module, "teacher_edge", edge)
    monkeypatch.setattr(train_module, "ofsd_step", step)
    folder = train(replace(SMALL, out=str(tmp_path / "run"), lora_rank=4, ofsd_lr=1e-2))
    assert torch.equal(seen["teacher"], seen["after grpo"])  # at the last step, too
    assert not torch.equal(seen["teacher"], seen["start"])
    merged = logits(seen["run"].model)
    assert torch.allclose(merged, seen["adapted"], atol=1e-4) and not torch.allclose(merged, seen["teacher"], atol=1e-2)
    assert torch.equal(logits(load_model(str(folder / "model"))[0]), merged)


def test_grpo_in_adapters_trains_them_and_merges_them(tmp_path, monkeypatch):
    seen, probe, plain_step = {}, ([[5, 6]], [[7, 8]]), train_module.grpo_step

    def step(model, start, optimizer, *args):
        before = [p.clone() for p in model.parameters()]
        stats = plain_step(model, start, optimizer, *args)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))  # until they are merged
        seen["adapted"] = response_logits(model, *probe).detach()
        return stats

    monkeypatch.setattr(train_module, "grpo_step", step)
    folder = train(replace(SMALL, out=str(tmp_path / "run"), grpo_lora_rank=4, grpo_lr=1e-2, ofsd_epochs=0))
    model = load_model(str(folder / "model"))[0]
    assert torch.allclose(response_logits(model, *probe), seen["adapted"], atol=1e-4)
    assert not torch.allclose(response_logits(load_model("micro/model")[0], *probe), seen["adapted"], atol=1e-2)


def test_a_model_whose_output_layer_does_more_is_refused(micro, monkeypatch, tmp_path):
    model = frozen_copy(micro[0])
    assert knows_output_layer(model)
    model.config.logits_scaling = 2.0  # a Qwen2 does not heed it
    assert not knows_output_layer(model)
    monkeypatch.setattr(train_module, "load_model", lambda name: (model, micro[1]))
    with pytest.raises(BadInput, match="its logits are more than a product"):
        train(replace(SMALL, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_ofsd_step_gives_the_same_gradient_for_any_micro_batch_size(micro, batch):
    rows, teacher = batch[0], frozen_copy(micro[0])
    pairs = [(rows[i], rows[0].prompt_ids + rows[i].prompt_ids) for i in (1, 2, 4, 7)]
    assert len({sum(student.loss_mask) for student, _ in pairs}) > 1
    results = []
    for size in (1, 3, 100):
        model = frozen_copy(micro[0]).requires_grad_(True)
        spy = Spy(model)
        stats = ofsd_step(model, teacher, spy, pairs, replace(SMALL, max_grad_norm=1e9, micro_batch=size))
        results.append((spy.gradient, stats))
    for gradient, stats in results[1:]:
        assert (gradient - results[0][0]).norm() < 1e-4 * gradient.norm()
        assert stats == pytest.approx(results[0][1], rel=1e-4)


def test_a_stage_without_supported_edge_says_so_and_is_skipped(tmp_path, monkeypatch, capsys):
    scores = iter([{"em": 0.5, "em_supported": 0.2}, {"em": 0.3, "em_supported": 0.2}])
    score = train_module.score
    mined = lambda questions: questions[0]["id"].startswith("train")  # noqa: E731
    monkeypatch.setattr(train_module, "score", lambda qs, ts: next(scores) if mined(qs) else score(qs, ts))
    folder = train(replace(SMALL, out=str(tmp_path / "run"), force_ofsd=False))
    assert "no supported edge" in capsys.readouterr().out
    rows = read(folder, "metrics.jsonl")
    mining = next(row for row in rows if row["kind"] == "mining")
    assert mining["skipped"] and mining["edge"] == pytest.approx(0.2) and mining["edge_supported"] == 0
    assert not [row for row in rows if row["kind"] == "step" and row["stage"] == "ofsd-1"]


def test_a_run_whose_rewards_are_all_zero_says_so_and_completes(tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "Who?", "golden_answers": ["nobody at all"]}\n' * 6)
    folder = train(replace(SMALL, out=str(tmp_path / "run"), questions=str(questions)))
    assert "no pair to learn from" in capsys.readouterr().out
    rows = read(folder, "metrics.jsonl")
    assert [r["no_correct"] for r in rows if r["kind"] == "mining"] == [6]
    assert all(r["zero_var"] == 1 and r["reward"] == 0 for r in rows if r["kind"] == "step")
    assert rows[-1]["stage"] == "ofsd-1"


# ---------------------------------------------------------------- the command


def test_every_setting_is_a_flag_with_help(command):
    shown = command("train.py", "--help").stdout
    for item in fields(Config):
        assert "--" + item.name.replace("_", "-") in shown and item.metadata["help"].split()[0] in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frobnicate", "1"], "--frobnicate"),
        (["--questions", "nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["--corpus", "BROKEN"], "broken.jsonl:2"),
        (["--corpus", "EMPTY"], "the corpus is empty"),
        (["--questions", "BROKEN"], "broken.jsonl:1"),
        (["--questions", "micro/train.jsonl,BROKEN"], "broken.jsonl:1"),
        (["--questions", "micro/train.jsonl,LEAK"], "leak.jsonl: 1 training questions are test questions"),
        (["--eval-questions", "micro/train.jsonl"], "training questions are test questions"),
        (["--model", "tests"], "not a model folder"),
        (["--model", "no/such-model"], "cannot load"),
        (["--model", "micro/modle"], "no such model folder"),
        (["--grpo-steps", "many"], "--grpo-steps"),
        (["--divergence", "kl"], "divergence"),
        (["--group-size", "0"], "group_size"),
        (["--grpo-lr", "nan"], "grpo_lr"),
        (["--prompt", "no place for it"], "{question}"),
        (["--out", "README.md/run"], "cannot make the run's folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(refused, tmp_path, flags, message):
    (tmp_path / "broken.jsonl").write_text('{"id": "0", "title": "a", "text": "b"}\n{oops\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "leak.jsonl").write_text(json.dumps({**json.loads(open("micro/test.jsonl").readline()), "id": "new"}) + "\n")
    out = tmp_path / "run"
    for name in ("BROKEN", "EMPTY", "LEAK"):
        flags = [flag.replace(name, str(tmp_path / f"{name.lower()}.jsonl")) for flag in flags]
    assert message in refused("train.py", "--out", out, *flags)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.skipif("SMOLLM2_DIR" not in os.environ, reason="SMOLLM2_DIR names no folder of SmolLM2-135M")
@pytest.mark.skipif(not (DATA / "hotpotqa").is_dir(), reason="the real questions are not there")
def test_smollm2_is_started_and_then_learns_by_both_losses_from_real_questions(tmp_path):
    """As it comes it writes no tag. Shown eight questions five times each it searches and answers, some of
    them rightly, and GRPO and OFSD go on from there."""
    corpus = str(DATA / "hotpotqa/corpus.jsonl.gz")
    index, rows = open_index(corpus), load_questions(str(DATA / "hotpotqa/questions.jsonl.gz"))
    shown = [row for row in rows[:100] if make.demonstrate_real(index, row)][:8]
    for name, part in (("shown", shown * 5), ("train", shown), ("test", rows[-4:])):
        make.write_jsonl(tmp_path / f"{name}.jsonl", part)
    model, tokenizer = load_model(os.environ["SMOLLM2_DIR"])
    as_it_comes = evaluate(model, tokenizer, index, shown[:2], max_turn_tokens=96)
    assert as_it_comes["answered"] == as_it_comes["searches"] == 0
    set_seed(0)
    make.start_real(os.environ["SMOLLM2_DIR"], str(tmp_path / "shown.jsonl"), corpus, tmp_path / "started", 40, random.Random(0))
    folder = train(Config(
        model=str(tmp_path / "started"), questions=str(tmp_path / "train.jsonl"), eval_questions=str(tmp_path / "test.jsonl"),
        corpus=corpus, out=str(tmp_path / "run"), rounds=1, grpo_steps=2, questions_per_step=4, group_size=4, grpo_lr=5e-6,
        ofsd_questions=8, ofsd_epochs=1, ofsd_batch=4, ofsd_lr=5e-6, force_ofsd=True, micro_batch=2, max_turn_tokens=96,
        max_observation_tokens=300, max_privileged_tokens=1200,
    ))  # fmt: skip
    rows = read(folder, "metrics.jsonl")
    evals, (first, _) = [row for row in rows if row["kind"] == "eval"], [row for row in rows if row["stage"] == "grpo-1" and row["kind"] == "step"]
    assert [row["stage"] for row in evals] == ["base", "grpo-1", "ofsd-1"]
    assert evals[0]["answered"] > 0.5 and evals[0]["searches"] > 0.5
    assert first["reward"] > 0 and first["logprob_gap"] < 1e-3
    distilled = [row for row in rows if row["stage"] == "ofsd-1" and row["kind"] == "step"]
    assert distilled and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in distilled)


def test_a_trajectory_in_json_keeps_who_wrote_what(small_run, micro, batch):
    row = read(small_run, "trajectories.jsonl")[0]
    assert {"question", "answer", "queries", "finish_reason", "text", "golden_answers", "em"} <= row.keys()
    assert all(who in (0, 1) for who, _ in row["text"]) and row["text"][0][0] == 1
    assert len(list(spans(batch[0][0]))) >= 1
