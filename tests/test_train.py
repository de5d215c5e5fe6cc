"""train.py: what a short run writes, one update at a time, the stages, and the input it refuses.
(Whole runs with other settings are tested in system/test_runs.py.)"""

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, line_of, read, run_main, steps_of
from transformers import AutoModelForCausalLM

import make
import ofsd as ofsd_module
import train as train_module
from eval import evaluate, load_questions
from grpo import (
    frozen_copy, group_advantages, grpo_loss, grpo_step, policy_hidden, response_logits,
    token_logprobs,
)  # fmt: skip
from ofsd import Pair, ofsd_step, privileged_prompt, spans
from retriever import BadInput, Passage, open_index
from rollout import Trajectory, decode, encode, load_model, rollout
from tools import start
from train import Config, train

DATA = Path(__file__).resolve().parent.parent.parent / "shared/data"


def test_a_short_run_writes_what_it_promises(small_run):
    rows = read(small_run, "metrics.jsonl")
    assert [(row["kind"], row["stage"]) for row in rows if row["kind"] != "step"] == [
        ("eval", "base"), ("eval", "grpo-1"), ("mining", "ofsd-1"), ("eval", "ofsd-1")
    ]  # fmt: skip
    steps = steps_of(small_run, "grpo-1")
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert {*train_module.COLUMNS, "loss", "rollout_s", "step_s", "no_update"} <= row.keys()
        assert 0 <= row["zero_var"] <= 1 and row["entropy"] > 0 and row["logprob_gap"] < 1e-3
        assert row["clip_frac"] == 0  # one update a batch: the ratio is 1
    assert steps[0]["kl"] < 1e-6 < steps[1]["kl"]  # at first the policy is the one it began as
    mining = next(row for row in rows if row["kind"] == "mining")
    assert sum(mining[name] for name in ("pairs", "no_correct", "no_contrast", "too_long")) == 12
    distilled = steps_of(small_run, "ofsd-1")
    assert len(distilled) == -(-mining["pairs"] // 4) and all(row["loss"] > 0 for row in distilled)
    evals = [row for row in rows if row["kind"] == "eval"]
    for row in evals:
        assert {"em", "f1", "searches", "answered", "n", "em_by"} <= row.keys() and row["n"] == 6
    for name in ("edge", "edge_supported", "edge_control"):
        assert evals[-1][name] == mining[name]
    told = [row["kind"] for row in read(small_run, "trajectories.jsonl")]
    assert told.count("eval") == 18 and told.count("pair") == mining["pairs"]
    assert json.loads((small_run / "config.json").read_text())["grpo_steps"] == 2


def test_a_logged_em_is_exact_match_whatever_the_reward_is(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "rewards_of", lambda questions, those: [0.5] * len(those))
    settings = json.loads((small_run / "config.json").read_text())
    folder = train(Config(**settings | {"out": str(tmp_path / "run"), "rounds": 0}))
    (test,) = [row["em"] for row in read(folder, "metrics.jsonl")]
    ems = [row["em"] for row in read(folder, "trajectories.jsonl")]
    assert {*ems} <= {0.0, 1.0} and sum(ems) / len(ems) == pytest.approx(test)


def test_the_parameters_moved_and_the_model_folder_loads(small_run, micro):
    trained = AutoModelForCausalLM.from_pretrained(small_run / "model")
    pairs = zip(trained.parameters(), micro[0].parameters())
    assert all(not torch.equal(one, two) for one, two in pairs)
    model, tokenizer = load_model(str(small_run / "model"))
    assert tokenizer.init_kwargs["search_prompt"] == "{question}"  # the prompt travels along


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
        self.stepped = False

    def step(self):
        self.stepped = True

    def zero_grad(self):
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradient = torch.cat([gradient.flatten() for gradient in gradients])
        self.model.zero_grad()


@pytest.fixture(scope="module")
def batch(micro, micro_index):
    """Trajectories of 4 questions x 3, and rewards of which the second group's are all equal."""
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:4]
    asked = [question["question"] for question in questions]
    rows = rollout(*micro, micro_index, asked, group_size=3, seed=0)
    return rows, torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]])


@pytest.fixture(scope="module")
def pairs(batch):
    """Two pairs whose privileged prompt is longer than the student's own."""
    return pairs_of(batch[0], (1, 2))


def pairs_of(rows, students):
    shown = rows[0].prompt_ids
    return [Pair({}, rows[0], rows[i], shown + rows[i].prompt_ids, [1.0]) for i in students]


def gradient(micro, batch, **settings):
    model = frozen_copy(micro[0]).requires_grad_(True)
    spy = Spy(model)
    config = replace(SMALL, max_grad_norm=1e9, **settings)
    stats = grpo_step(model, micro[0], spy, *batch, config)
    return spy.gradient, stats


def test_grpo_step_gives_the_same_gradient_for_any_micro_batch_size(micro, batch):
    whole, stats = gradient(micro, batch, micro_batch=100)
    for size in (1, 5):
        parts, other = gradient(micro, batch, micro_batch=size)
        assert torch.allclose(whole, parts, atol=1e-5 * whole.abs().max().item())
        assert other == pytest.approx(stats, rel=1e-3, abs=1e-5)


def test_gradient_checkpointing_changes_no_gradient_and_no_sample(micro, micro_index, batch):
    plain, stats = gradient(micro, batch)
    model = frozen_copy(micro[0])
    model.activation_checkpointing_enable()
    again, other = gradient((model, micro[1]), batch)
    assert torch.allclose(plain, again, atol=1e-6 * plain.abs().max().item())
    assert other == pytest.approx(stats, rel=1e-3, abs=1e-6)
    assert not any(module.training for module in model.modules())  # sampling keeps its cache
    asked, how = [batch[0][0].question], dict(seed=0, group_size=2)
    one, two = (rollout(m, micro[1], micro_index, asked, **how) for m in (model, micro[0]))
    assert [t.response_ids for t in one] == [t.response_ids for t in two]


def test_gradient_checkpointing_needs_less_memory():
    """Bytes kept for the backward pass, counted by torch's own hooks."""
    kept = []
    for on in (False, True):
        model, sizes = frozen_copy(load_model("micro/model")[0]).requires_grad_(True), []
        if on:
            model.activation_checkpointing_enable()
        count = lambda x: sizes.append(x.numel()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            policy_hidden(model, [Trajectory("", [5] * 20, [6] * 200, [1] * 200)] * 4)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_skipping_groups_without_variance_changes_nothing(micro, batch):
    skipped, _ = gradient(micro, batch)
    # With beta = 0 but nothing skipped: the plain formula over all trajectories.
    model = frozen_copy(micro[0]).requires_grad_(True)
    rows, rewards = batch
    advantages, tokens = group_advantages(rewards).flatten(), sum(sum(r.loss_mask) for r in rows)
    for row, advantage in zip(rows, advantages):
        logprobs = token_logprobs(response_logits(model, row), torch.tensor(row.response_ids))
        old, mask = torch.tensor([row.logprobs]), torch.tensor([row.loss_mask])
        loss, _ = grpo_loss(logprobs[None], old, advantage[None], mask, num_tokens=tokens)
        loss.backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(plain, skipped, atol=1e-5 * plain.abs().max().item())


def test_without_any_variance_nothing_moves_and_the_statistics_are_there(micro, batch):
    found, stats = gradient(micro, (batch[0], torch.zeros(4, 3)))
    assert found.eq(0).all() and stats["grad_norm"] == 0 and stats["entropy"] > 0
    # Not even by the momentum of the updates before.
    model = frozen_copy(micro[0]).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grpo_step(model, micro[0], optimizer, *batch, SMALL)
    before = [p.clone() for p in model.parameters()]
    grpo_step(model, micro[0], optimizer, batch[0], torch.zeros(4, 3), SMALL)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_prompts_too_long_for_the_model_give_no_answer_and_no_error(micro, micro_index):
    rows = rollout(*micro, micro_index, ["word " * 2000, "Who?"], group_size=2, seed=0)
    assert [row.finish_reason for row in rows[:2]] == ["context"] * 2 and not rows[0].response_ids
    for rewards in (torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0]])):
        found, stats = gradient(micro, (rows, rewards))
        assert found.isfinite().all() and stats["entropy"] > 0
    model = frozen_copy(micro[0]).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = grpo_step(model, micro[0], optimizer, rows[:2], torch.zeros(1, 2), SMALL)
    assert stats["grad_norm"] == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), micro[0].parameters()))


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
    updates = [grpo_step(model, micro[0], optimizer, *batch, SMALL) for _ in range(4)]
    assert updates[0]["clip_frac"] == 0 < updates[-1]["clip_frac"]


def test_ofsd_step_reads_one_response_twice_and_leaves_the_teacher_alone(
    micro, pairs, monkeypatch
):
    teacher, model = frozen_copy(micro[0]), frozen_copy(micro[0]).requires_grad_(True)
    read_by, plain = [], ofsd_module.policy_hidden

    def noted(model, rows, prompts=None):
        read_by.append((model, prompts, rows))
        return plain(model, rows, prompts)

    monkeypatch.setattr(ofsd_module, "policy_hidden", noted)
    before = [p.clone() for p in teacher.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stats = ofsd_step(model, teacher, optimizer, pairs, SMALL)
    (one, privileged, taught), (two, standard, learnt) = read_by
    assert one is teacher and two is model and taught == learnt and standard is None
    assert sorted(privileged) == sorted(pair.prompt for pair in pairs)
    assert sorted(privileged) != sorted(t.prompt_ids for t in learnt)
    assert stats["loss"] > 0
    for old, new in zip(before, teacher.parameters()):
        assert torch.equal(old, new) and new.grad is None
    # Under one and the same prompt the student is its own teacher: nothing to learn.
    same = [pair._replace(prompt=pair.student.prompt_ids) for pair in pairs[:1]]
    stats = ofsd_step(teacher.requires_grad_(True), frozen_copy(teacher), Spy(teacher), same, SMALL)
    assert stats["loss"] < 1e-6


def test_the_gradient_is_that_of_finite_differences(micro, batch):
    """From rollouts to the loss, end to end: along its gradient g the loss falls by |g|^2 a
    unit."""
    rows = []
    for row in batch[0]:  # as if an older policy had sampled them
        older = [value - 0.05 * mask for value, mask in zip(row.logprobs, row.loss_mask)]
        rows.append(replace(row, logprobs=older))
    teacher, config = frozen_copy(micro[0]), replace(SMALL, max_grad_norm=1e9, kl_coef=0.1)
    pairs = pairs_of(rows, (1, 2))
    grpo = lambda m, spy: grpo_step(m, teacher, spy, rows, batch[1], config)  # noqa: E731
    ofsd = lambda m, spy: ofsd_step(m, teacher, spy, pairs, config)  # noqa: E731
    for step in (grpo, ofsd):
        model = frozen_copy(micro[0]).requires_grad_(True)
        spy, values = Spy(model), []
        step(model, spy)
        gradient, norm = spy.gradient, spy.gradient.norm()
        start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        for epsilon in (0.003, -0.003):
            moved = start + epsilon * gradient / norm
            torch.nn.utils.vector_to_parameters(moved, model.parameters())
            values.append(step(model, Spy(model))["loss"])
        assert (values[0] - values[1]) / 0.006 == pytest.approx(norm.item(), rel=0.01)


def test_ofsd_step_gives_the_same_gradient_for_any_micro_batch_size(micro, batch):
    teacher, pairs = frozen_copy(micro[0]), pairs_of(batch[0], (1, 2, 4, 7))
    assert len({sum(pair.student.loss_mask) for pair in pairs}) > 1
    results = []
    for size in (1, 3, 100):
        model = frozen_copy(micro[0]).requires_grad_(True)
        spy, config = Spy(model), replace(SMALL, max_grad_norm=1e9, micro_batch=size)
        results.append((ofsd_step(model, teacher, spy, pairs, config), spy.gradient))
    first, whole = results[0]
    for stats, parts in results[1:]:
        assert (parts - whole).norm() < 1e-4 * whole.norm()
        assert stats == pytest.approx(first, rel=1e-4)


def test_a_stage_without_supported_edge_says_so_and_is_skipped(tmp_path, monkeypatch, capsys):
    edge = {"edge": 0.2, "edge_supported": 0.0, "edge_control": 0.1}
    monkeypatch.setattr(train_module, "teacher_edge", lambda run, pairs: edge)
    folder = train(replace(SMALL, out=str(tmp_path / "run"), force_ofsd=False))
    printed = capsys.readouterr().out
    assert "no supported edge" in printed and "edge_control +0.100" in printed
    rows = read(folder, "metrics.jsonl")
    mining = next(row for row in rows if row["kind"] == "mining")
    assert mining["skipped"] and edge.items() <= mining.items()
    assert not steps_of(folder, "ofsd-1")


def test_the_edge_is_the_teachers_and_its_control_reads_the_next_pairs_reference(tokenizer):
    """Answers of a policy that is right under some prompts: the teacher's for all of four
    questions, one of them without support; the control's for one; the student's for two."""
    pairs, right = [], {"student": {1, 2}, "teacher": {0, 1, 2, 3}, "control": {3}}
    for number in range(4):
        reference = Trajectory("", [1], queries=["it"], passages=[[]])
        ids = encode(tokenizer, f"<answer> {number}{'0' * 40 * (number == 1)}")
        reference.extend(ids, [0.0] * len(ids))
        question = {"id": str(number), "question": f"Who is {number}?", "golden_answers": ["a b"]}
        prompt = privileged_prompt(tokenizer, question["question"], reference, 1000)
        pairs.append(Pair(question, reference, reference, prompt, []))
    seen, found = {}, [[Passage("p", "", "a b")]]

    def sample(questions, *, prompts, progress):
        seen[progress] = prompts
        assert questions == [pair.question for pair in pairs]
        answers = ["a b" if i in right[progress] else "" for i in range(4)]
        shown = [found if i else [] for i in range(4)]
        return [Trajectory("", [1], answer=a, passages=p) for a, p in zip(answers, shown)]

    room = len(pairs[2].prompt) + 5  # the second pair's reference is too long
    run = SimpleNamespace(tokenizer=tokenizer, sample=sample)
    run.config = SimpleNamespace(max_privileged_tokens=room)
    edge = train_module.teacher_edge(run, pairs)
    assert edge == {"edge": 0.5, "edge_supported": 0.25, "edge_control": -0.25}
    assert seen["student"] is None and seen["teacher"] == [pair.prompt for pair in pairs]
    expected = [
        privileged_prompt(tokenizer, pairs[i].question["question"], pairs[j].reference, room)
        for i, j in ((0, 1), (1, 2), (2, 3), (3, 0))
    ]  # fmt: skip
    assert expected[0] is None and None not in expected[1:]
    assert seen["control"] == [pairs[0].prompt, *expected[1:]]
    decoded = decode(tokenizer, seen["control"][3])
    assert "Who is 3?" in decoded and "<answer> 0" in decoded


# ---------------------------------------------------------------- the command


@pytest.fixture
def started(monkeypatch):
    """started(*arguments): the Config with which train.py would begin, and whether it resumes."""

    def start(*arguments):
        seen = []
        monkeypatch.setattr(train_module, "train", lambda *given: seen.append(given))
        run_main(monkeypatch, train_module.main, "train.py", *arguments)
        return seen[0]

    return start


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(*arguments): the line with which train.py refuses them."""

    def refuse(*arguments):
        run_main(monkeypatch, train_module.main, "train.py", *arguments, status=2)
        return line_of(capsys)

    return refuse


def test_every_setting_is_a_flag_with_help(monkeypatch, capsys):
    run_main(monkeypatch, train_module.main, "train.py", "--help")
    shown = capsys.readouterr().out
    for item in fields(Config):
        assert "--" + item.name.replace("_", "-") in shown
        assert item.metadata["help"].split()[0] in shown
    assert "--config" in shown and "--resume" in shown


def test_without_flags_the_settings_are_the_defaults(started):
    assert started() == (Config(), False)
    assert started("--no-ofsd") == (Config(ofsd=False), False)
    assert started("--seed", 3, "--grpo-lr", "1e-5", "--force-ofsd") == (
        Config(seed=3, grpo_lr=1e-5, force_ofsd=True), False
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frobnicate", "1"], "--frobnicate"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: [Errno 2] No such file or directory"),
        (["--corpus", "nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
        (["--corpus", "BROKEN"], "broken.jsonl:2"),
        (["--corpus", "EMPTY"], "empty.jsonl: there is nothing in it"),
        (["--questions", "EMPTY"], "empty.jsonl: there is nothing in it"),
        (["--questions", "BROKEN"], "broken.jsonl:1"),
        (["--questions", "micro/train.jsonl,BROKEN"], "broken.jsonl:1"),
        (["--questions", "micro/train.jsonl,LEAK"], "leak.jsonl: 1 training questions are test"),
        (["--eval-questions", "micro/train.jsonl"], "training questions are test questions"),
        (["--model", "tests"], "train.py: cannot use tests: "),
        (["--model", "no/such-model"], "cannot use no/such-model: "),
        (["--model", "micro/modle"], "cannot use micro/modle: "),
        (["--grpo-steps", "many"], "--grpo-steps"),
        (["--grpo-steps", "-1"], "grpo_steps must be int, at least 0 and below 2**32, not -1"),
        (["--divergence", "kl"], "divergence"),
        (["--group-size", "0"], "group_size must be int, above 0 and below 2**32, not 0"),
        (["--grpo-lr", "nan"], "grpo_lr"),
        (["--prompt", "no place for it"], "{question}"),
        (["--retriever-url", "here"], "a retriever's URL is http:// or https://"),
        (["--config", "a", "--resume", "b"], "not allowed with"),
        (["--out", "README.md/run"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(refused, tmp_path, flags, message):
    leak = {**json.loads(open("micro/test.jsonl").readline()), "id": "new"}
    (tmp_path / "broken.jsonl").write_text('{"id": "0", "title": "a", "text": "b"}\n{oops\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "leak.jsonl").write_text(json.dumps(leak) + "\n")
    out = tmp_path / "run"
    for name in ("BROKEN", "EMPTY", "LEAK"):
        flags = [flag.replace(name, str(tmp_path / f"{name.lower()}.jsonl")) for flag in flags]
    assert message in refused("--out", out, *flags)
    assert not out.exists()


def test_settings_come_from_a_file_and_flags_win(started, small_run, tmp_path):
    """The form is that of a run's config.json."""
    day = json.loads((small_run / "config.json").read_text())["date"]  # of the run
    config = replace(SMALL, out=str(small_run), date=day)
    assert started("--config", small_run / "config.json") == (config, False)
    flags = "--seed", 7, "--out", tmp_path / "run"
    config = replace(config, seed=7, out=str(tmp_path / "run"))
    assert started("--config", small_run / "config.json", *flags) == (config, False)
    few = tmp_path / "few.json"
    few.write_text('\ufeff{"rounds": 5, "grpo_lr": 1, "ofsd": false}', encoding="utf-8")
    assert started("--config", few) == (Config(rounds=5, grpo_lr=1, ofsd=False), False)
    assert started("--config", few, "--rounds", 1)[0].rounds == 1


def test_the_files_in_configs_are_settings(started):
    files = [*(ROOT / "configs").glob("*.json")]
    for file in files:
        started("--config", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"frobnicate": 1}', "unexpected keyword argument 'frobnicate'"),
        ('{"rounds": "2"}', "rounds must be int, at least 0 and below 2**32, not '2'"),
        ('{"rounds": 2.0}', "rounds must be int, at least 0 and below 2**32, not 2.0"),
        ('{"rounds": true}', "rounds must be int, at least 0 and below 2**32, not True"),
        ('{"rounds": null}', "rounds must be int, at least 0 and below 2**32, not None"),
        ('{"ofsd": 1}', "ofsd must be bool, any, not 1"),
        ('{"model": 7}', "model must be"),
        ('{"clip": ["none"]}', "clip must be"),
        ('{"grpo_lr": NaN}', "grpo_lr must be float, above 0 and below 2**32, not nan"),
        ('{"group_size": 0}', "group_size must be int, above 0 and below 2**32, not 0"),
        ('{"prompt": "no place"}', "{question}"),
        ("[1]", "settings.json"),
        ("7", "settings.json"),
        ("{oops", "settings.json: Expecting property name"),
        ("", "settings.json: Expecting value"),
        (b"\xff\xfe", "settings.json"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_holds_no_settings_is_one_line(refused, tmp_path, text, message):
    file = tmp_path / "settings.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    told = refused("--config", file, "--out", tmp_path / "run")
    assert message in told and "settings.json" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif("SMOLLM2_DIR" not in os.environ, reason="SMOLLM2_DIR names no folder")
@pytest.mark.skipif(not (DATA / "hotpotqa").is_dir(), reason="the real questions are not there")
def test_smollm2_is_started_and_then_learns_by_both_losses_from_real_questions(
    tmp_path, monkeypatch
):
    """As it comes it writes no tag. Shown eight questions five times each it searches and answers,
    some of them rightly, and GRPO and OFSD go on from there."""
    corpus, base = str(DATA / "hotpotqa/corpus.jsonl.gz"), os.environ["SMOLLM2_DIR"]
    index, rows = open_index(corpus), load_questions(str(DATA / "hotpotqa/questions.jsonl.gz"))
    shown = [row for row in rows[:100] if start.demonstrate(index, row)][:8]
    for name, part in (("shown", shown * 5), ("train", shown), ("test", rows[-4:])):
        make.write_jsonl(tmp_path / f"{name}.jsonl", part)
    model, tokenizer = load_model(base)
    as_it_comes = evaluate(model, tokenizer, index, shown[:2], max_turn_tokens=96)
    assert as_it_comes["answered"] == as_it_comes["searches"] == 0
    out = tmp_path / "started"
    how = "--questions", tmp_path / "shown.jsonl", "--corpus", corpus, "--batch", 2, "--count", 40
    run_main(monkeypatch, start.main, "start.py", "--model", base, "--out", out, *how)
    folder = train(Config(
        model=str(out), questions=str(tmp_path / "train.jsonl"),
        eval_questions=str(tmp_path / "test.jsonl"), corpus=corpus, out=str(tmp_path / "run"),
        rounds=1, grpo_steps=2, questions_per_step=4, group_size=4, grpo_lr=5e-6,
        ofsd_questions=8, ofsd_epochs=1, ofsd_batch=4, ofsd_lr=5e-6, force_ofsd=True,
        micro_batch=2, max_turn_tokens=96, max_observation_tokens=300, max_privileged_tokens=1200,
    ))  # fmt: skip
    evals = [row for row in read(folder, "metrics.jsonl") if row["kind"] == "eval"]
    assert [row["stage"] for row in evals] == ["base", "grpo-1", "ofsd-1"]
    assert evals[0]["answered"] > 0.5 and evals[0]["searches"] > 0.5
    first, _ = steps_of(folder, "grpo-1")
    assert first["reward"] > 0 and first["logprob_gap"] < 1e-3
    distilled = steps_of(folder, "ofsd-1")
    assert distilled and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in distilled)


def test_a_trajectory_in_json_keeps_who_wrote_what(small_run, batch):
    row = read(small_run, "trajectories.jsonl")[0]
    names = {"question", "answer", "queries", "finish_reason", "text", "golden_answers", "em"}
    assert names <= row.keys()
    assert all(who in (0, 1) for who, _ in row["text"]) and row["text"][0][0] == 1
    assert len(list(spans(batch[0][0]))) >= 1


def test_a_pair_in_json_has_a_divergence_for_each_token_of_the_policy(small_run):
    rows = [row for row in read(small_run, "trajectories.jsonl") if row["kind"] == "pair"]
    assert rows
    for row in rows:
        assert len(row["rewards"]) == SMALL.group_size
        for who, text in row["student"]["text"]:
            told = ""
            while told != text:
                token, nats = row["divergence"].pop(0)
                told += token
                assert (nats is None) == (not who) and (nats is None or nats > -1e-5)
        assert not row["divergence"]
