"""train.py: whole runs, each with settings of its own. What a run writes is tested in
../test_train.py, and what an update does in ../test_grpo_step.py and its neighbour."""

import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from conftest import SMALL, read, run_main, steps_of, untimed

import train as train_module
from grpo import response_logits
from machinery.adapters import adapters_off
from machinery.models import load_model
from rollout import Trajectory
from train import train

PROBE = Trajectory("", [5, 6], [7, 8])  # any tokens, to see what a model makes of them


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(
    small_run, tmp_path
):
    # What was drawn before must not matter.
    torch.manual_seed(11)
    random.seed(11)
    again = train(replace(SMALL, out=str(tmp_path / "again")))
    other = train(replace(SMALL, out=str(tmp_path / "other"), seed=1))
    first = untimed(read(small_run, "metrics.jsonl"))
    again = untimed(read(again, "metrics.jsonl"))
    other = untimed(read(other, "metrics.jsonl"))
    assert first == again
    assert first != other and first[0] == other[0]  # the base is tested greedily


def test_a_file_gives_the_run_that_its_flags_give(small_run, tmp_path, monkeypatch):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(asdict(SMALL)))
    flags = "--config", file, "--out", tmp_path / "run"
    run_main(monkeypatch, train_module.main, "train.py", *flags)
    by_file = untimed(read(tmp_path / "run", "metrics.jsonl"))
    assert by_file == untimed(read(small_run, "metrics.jsonl"))


def test_a_run_neither_uses_nor_moves_the_global_random_states(tmp_path):
    torch_state = torch.get_rng_state()
    state = random.getstate()
    train(replace(SMALL, out=str(tmp_path / "run"), lora_rank=2, grpo_lora_rank=2))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == state


def test_without_ofsd_there_are_only_stages_of_grpo(tmp_path, capsys):
    config = replace(
        SMALL, rounds=2, grpo_steps=1, out=str(tmp_path / "run"), ofsd=False
    )
    folder = train(config)
    rows = read(folder, "metrics.jsonl")
    assert [(row["kind"], row["stage"]) for row in rows] == [
        ("eval", "base"),
        ("step", "grpo-1"),
        ("eval", "grpo-1"),
        ("step", "grpo-2"),
        ("eval", "grpo-2"),
    ]
    kinds = [row["kind"] for row in read(folder, "trajectories.jsonl")]
    assert kinds.count("group") == 2 and "pair" not in kinds
    assert "ofsd-1" not in capsys.readouterr().out


def test_a_step_of_several_updates_tells_the_gap_before_and_the_clip_after_them(
    tmp_path,
):
    out = str(tmp_path / "run")
    folder = train(replace(SMALL, out=out, updates=3, grpo_lr=3e-3, ofsd=False))
    rows = steps_of(folder, "grpo-1")
    assert all(row["logprob_gap"] < 1e-3 for row in rows)
    assert any(row["clip_frac"] > 0 for row in rows)


def probe(model):
    return response_logits(model, PROBE).detach()


def test_with_adapters_the_teacher_is_the_policy_after_grpo_and_they_are_merged(
    tmp_path, monkeypatch
):
    seen = {}
    plain_edge = train_module.teacher_edge
    plain_step = train_module.ofsd_step

    def edge(run, pairs):
        seen["start"] = probe(run.ref_model)
        seen["after grpo"] = probe(run.model)
        seen["run"] = run
        return plain_edge(run, pairs)

    def step(model, teacher, *args, **settings):
        assert teacher is model
        with adapters_off(teacher):
            seen["teacher"] = probe(teacher)
        stats = plain_step(model, teacher, *args, **settings)
        seen["adapted"] = probe(model)
        return stats

    monkeypatch.setattr(train_module, "teacher_edge", edge)
    monkeypatch.setattr(train_module, "ofsd_step", step)
    out = str(tmp_path / "run")
    folder = train(replace(SMALL, out=out, lora_rank=4, ofsd_lr=1e-2, kl_coef=1e-3))
    assert torch.equal(seen["teacher"], seen["after grpo"])  # at the last step, too
    assert not torch.equal(seen["teacher"], seen["start"])
    merged = probe(seen["run"].model)
    assert torch.allclose(merged, seen["adapted"], atol=1e-4)
    assert not torch.allclose(merged, seen["teacher"], atol=1e-2)
    assert torch.equal(probe(load_model(str(folder / "model"))[0]), merged)


def test_grpo_in_adapters_trains_them_and_merges_them(tmp_path, monkeypatch):
    seen = {}
    plain_step = train_module.grpo_step

    def step(model, optimizer, *args, **settings):
        adapters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = [p for p in model.parameters() if id(p) not in adapters]
        before = [p.clone() for p in own]
        stats = plain_step(model, optimizer, *args, **settings)
        assert adapters and own  # until they are merged the model's own weights stay
        for old, new in zip(before, own, strict=True):
            assert torch.equal(old, new)
        seen["adapted"] = probe(model)
        return stats

    monkeypatch.setattr(train_module, "grpo_step", step)
    out = str(tmp_path / "run")
    config = replace(SMALL, out=out, grpo_lora_rank=4, grpo_lr=1e-2, ofsd_epochs=0)
    folder = train(config)
    trained = probe(load_model(str(folder / "model"))[0])
    base = probe(load_model("micro/model")[0])
    assert torch.allclose(trained, seen["adapted"], atol=1e-4)
    assert not torch.allclose(base, seen["adapted"], atol=1e-2)


def test_a_run_whose_rewards_are_all_zero_says_so_and_completes(tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        '{"question": "Who?", "golden_answers": ["nobody at all"]}\n' * 6
    )
    folder = train(replace(SMALL, out=str(tmp_path / "run"), questions=str(questions)))
    assert "no pair to learn from" in capsys.readouterr().out
    rows = read(folder, "metrics.jsonl")
    assert [r["no_correct"] for r in rows if r["kind"] == "mining"] == [6]
    for row in rows:
        if row["kind"] == "step":
            assert row["zero_var"] == 1 and row["reward"] == 0
    assert rows[-1]["stage"] == "ofsd-1"


@pytest.mark.parametrize("norm", ["grpo", "dr_grpo"])
def test_the_other_norms_train(tmp_path, norm):
    """At a constant learning rate SGD would show the scale; AdamW does not."""
    out = str(tmp_path / "run")
    folder = train(replace(SMALL, out=out, norm=norm, ofsd=False))
    steps = steps_of(folder, "grpo-1")
    assert all(not row["no_update"] for row in steps if row["zero_var"] < 1)


def test_kl_is_a_column_and_a_statistic_where_there_is_a_penalty(tmp_path, capsys):
    out = str(tmp_path / "run")
    folder = train(replace(SMALL, out=out, kl_coef=1e-3, ofsd=False))
    first, second = steps_of(folder, "grpo-1")
    assert first["kl"] < 1e-6 < second["kl"]  # at first the policy is the one it was
    assert " kl " in capsys.readouterr().out


def test_three_students_give_more_pairs_than_one(tmp_path):
    pairs = []
    for students in (1, 3):
        out = str(tmp_path / f"{students}")
        folder = train(replace(SMALL, out=out, students=students, grpo_steps=0))
        rows = read(folder, "metrics.jsonl")
        pairs += [row["pairs"] for row in rows if row["kind"] == "mining"]
    assert pairs[0] < pairs[1] <= 2 * pairs[0]  # a group of three has two students
