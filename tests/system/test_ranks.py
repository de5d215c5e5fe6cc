"""train.py on more than one device: two processes are as good as one."""

import json

import pytest
import torch
from conftest import ROOT, line_of, read, run_main, untimed

import train
from machinery.models import load_model

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
SMALL = {
    "rounds": 1,
    "grpo_steps": 2,
    "questions_per_step": 3,
    "group_size": 3,
    "ofsd_questions": 9,
    "ofsd_epochs": 1,
    "ofsd_batch": 4,
    "eval_limit": 5,
    "force_ofsd": True,
    "save_every": 1,
}


def farthest(weights, others):
    gaps = [(x - y).abs().max() for x, y in zip(weights, others, strict=True)]
    return max(gaps)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_two_ranks_reach_the_parameters_of_one(command, tmp_path, lora_rank):
    results = []
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        done = command(
            *launcher, "-m", "tests.system.ranks", "steps", tmp_path / name, lora_rank
        )
        assert done.returncode == 0, done.stderr
        results.append(torch.load(tmp_path / name, weights_only=True))
    one, two = results
    base = list(load_model(str(ROOT / "micro/model"))[0].parameters())
    assert farthest(one["weights"], two["weights"]) < 1e-5
    assert farthest(one["weights"], base) > 1e-4
    for a, b in zip(one["stats"], two["stats"], strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


def test_a_whole_run_on_two_ranks_is_written_once_and_can_be_resumed(
    command, tmp_path, monkeypatch, capsys
):
    settings, run = tmp_path / "settings.json", tmp_path / "run"
    settings.write_text(json.dumps(SMALL))
    done = command(*TORCHRUN, "train.py", "--config", settings, "--out", run)
    assert done.returncode == 0, done.stderr
    rows = read(run, "metrics.jsonl")
    assert [row["stage"] for row in rows if row["kind"] == "eval"] == [
        "base",
        "grpo-1",
        "ofsd-1",
    ]
    steps = [row for row in rows if row["kind"] == "step" and row["stage"] == "grpo-1"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["logprob_gap"] < 1e-3 for row in steps)
    told = [row for row in read(run, "trajectories.jsonl") if row["kind"] == "eval"]
    lines = (ROOT / "micro/test.jsonl").read_text().splitlines()[:5]
    tested = [json.loads(line)["question"] for line in lines]
    assert [row["question"] for row in told if row["stage"] == "ofsd-1"] == tested
    assert done.stdout.count("5 test questions") == 1
    load_model(str(run / "model"))

    # Stopped inside a stage and resumed on as many ranks it ends the same. On another
    # number of them it is refused.
    other = tmp_path / "other"
    flags = "--config", settings, "--out", other
    assert command(*TORCHRUN, "-m", "tests.system.ranks", "stop", 2, *flags).returncode
    assert len(read(other, "metrics.jsonl")) == 2  # the test of the base, and one step
    run_main(monkeypatch, train.main, "train.py", "--resume", other, status=2)
    assert "the number of devices changed" in line_of(capsys)
    again = command(*TORCHRUN, "train.py", "--resume", other)
    assert again.returncode == 0, again.stderr
    assert untimed(read(other, "metrics.jsonl")) == untimed(rows)
    for name in ("trajectories.jsonl", "model/model.safetensors"):
        assert (other / name).read_bytes() == (run / name).read_bytes()
