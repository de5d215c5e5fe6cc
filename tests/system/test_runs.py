"""train.py: whole runs, each with settings of its own. (What a run writes, and what each update
does, is tested in ../test_train.py.)"""

import json
import random
from dataclasses import asdict, replace

import torch
from conftest import SMALL, read, run_main, steps_of, untimed

import train as train_module
from grpo import response_logits
from ofsd import LoRA
from rollout import Trajectory, load_model
from train import train

PROBE = Trajectory("", [5, 6], [7, 8])  # any tokens, to see what a model makes of them


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(small_run, tmp_path):
    torch.manual_seed(11), random.seed(11)  # what was drawn before must not matter
    again = train(replace(SMALL, out=str(tmp_path / "again")))
    other = train(replace(SMALL, out=str(tmp_path / "other"), seed=1))
    first, again, other = (untimed(read(f, "metrics.jsonl")) for f in (small_run, again, other))
    assert first == again
    assert first != other and first[0] == other[0]  # the base is tested greedily


def test_a_file_gives_the_run_that_its_flags_give(small_run, tmp_path, monkeypatch):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(asdict(SMALL)))
    flags = "--config", file, "--out", tmp_path / "run"
    run_main(monkeypatch, train_module.main, "train.py", *flags)
    one, two = (untimed(read(f, "metrics.jsonl")) for f in (small_run, tmp_path / "run"))
    assert one == two


def test_a_run_neither_uses_nor_moves_the_global_random_states(tmp_path):
    before = torch.get_rng_state(), random.getstate()
    train(replace(SMALL, out=str(tmp_path / "run"), lora_rank=2, grpo_lora_rank=2))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_without_ofsd_there_are_only_stages_of_grpo(tmp_path, capsys):
    config = replace(SMALL, rounds=2, grpo_steps=1, out=str(tmp_path / "run"), ofsd=False)
    folder = train(config)
    rows = read(folder, "metrics.jsonl")
    assert [(row["kind"], row["stage"]) for row in rows] == [
        ("eval", "base"), ("step", "grpo-1"), ("eval", "grpo-1"), ("step", "grpo-2"),
        ("eval", "grpo-2"),
    ]  # fmt: skip
    assert all(row["kind"] == "eval" for row in read(folder, "trajectories.jsonl"))
    assert "ofsd-1" not in capsys.readouterr().out


def test_a_step_of_several_updates_tells_the_gap_before_and_the_clip_after_them(tmp_path):
    settings = dict(updates=3, grpo_lr=3e-3, ofsd=False)
    folder = train(replace(SMALL, out=str(tmp_path / "run"), **settings))
    rows = steps_of(folder, "grpo-1")
    assert all(row["logprob_gap"] < 1e-3 for row in rows)
    assert any(row["clip_frac"] > 0 for row in rows)


def probe(model):
    return response_logits(model, PROBE).detach()


def test_with_adapters_the_teacher_is_the_policy_after_grpo_and_they_are_merged(
    tmp_path, monkeypatch
):
    seen, plain_edge, plain_step = {}, train_module.teacher_edge, train_module.ofsd_step

    def edge(run, pairs):
        seen["start"], seen["after grpo"], seen["run"] = probe(run.ref_model), probe(run.model), run
        return plain_edge(run, pairs)

    def step(model, teacher, optimizer, pairs, config):
        assert teacher is model
        monkeypatch.setattr(LoRA, "on", False)
        seen["teacher"] = probe(teacher)
        monkeypatch.setattr(LoRA, "on", True)
        stats = plain_step(model, teacher, optimizer, pairs, config)
        seen["adapted"] = probe(model)
        return stats

    monkeypatch.setattr(train_module, "teacher_edge", edge)
    monkeypatch.setattr(train_module, "ofsd_step", step)
    folder = train(replace(SMALL, out=str(tmp_path / "run"), lora_rank=4, ofsd_lr=1e-2))
    assert torch.equal(seen["teacher"], seen["after grpo"])  # at the last step, too
    assert not torch.equal(seen["teacher"], seen["start"])
    merged = probe(seen["run"].model)
    assert torch.allclose(merged, seen["adapted"], atol=1e-4)
    assert not torch.allclose(merged, seen["teacher"], atol=1e-2)
    assert torch.equal(probe(load_model(str(folder / "model"))[0]), merged)


def test_grpo_in_adapters_trains_them_and_merges_them(tmp_path, monkeypatch):
    seen, plain_step = {}, train_module.grpo_step

    def step(model, ref_model, optimizer, *args):
        adapters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = [p for p in model.parameters() if id(p) not in adapters]
        before = [p.clone() for p in own]
        stats = plain_step(model, ref_model, optimizer, *args)
        assert adapters and own  # until they are merged the model's own weights stay
        assert all(torch.equal(a, b) for a, b in zip(before, own))
        seen["adapted"] = probe(model)
        return stats

    monkeypatch.setattr(train_module, "grpo_step", step)
    settings = dict(grpo_lora_rank=4, grpo_lr=1e-2, ofsd_epochs=0)
    folder = train(replace(SMALL, out=str(tmp_path / "run"), **settings))
    trained, base = (probe(load_model(str(p))[0]) for p in (folder / "model", "micro/model"))
    assert torch.allclose(trained, seen["adapted"], atol=1e-4)
    assert not torch.allclose(base, seen["adapted"], atol=1e-2)


def test_a_run_whose_rewards_are_all_zero_says_so_and_completes(tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "Who?", "golden_answers": ["nobody at all"]}\n' * 6)
    folder = train(replace(SMALL, out=str(tmp_path / "run"), questions=str(questions)))
    assert "no pair to learn from" in capsys.readouterr().out
    rows = read(folder, "metrics.jsonl")
    assert [r["no_correct"] for r in rows if r["kind"] == "mining"] == [6]
    assert all(r["zero_var"] == 1 and r["reward"] == 0 for r in rows if r["kind"] == "step")
    assert rows[-1]["stage"] == "ofsd-1"
