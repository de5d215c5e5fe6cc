"""train.py on more than one device: two processes are as good as one."""

import json

import pytest
import torch
from conftest import ROOT

from rollout import load_model

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_two_ranks_reach_the_parameters_of_one(command, tmp_path, lora_rank):
    results = []
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        done = command(*launcher, "tests/ranks.py", tmp_path / name, lora_rank)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(tmp_path / name, weights_only=True))
    one, two = results
    base = list(load_model(str(ROOT / "micro/model"))[0].parameters())
    assert max((a - b).abs().max() for a, b in zip(one["weights"], two["weights"])) < 1e-5
    assert max((a - b).abs().max() for a, b in zip(one["weights"], base)) > 1e-4
    for a, b in zip(one["stats"], two["stats"]):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


def test_a_whole_run_on_two_ranks_completes_and_is_written_once(command, tmp_path):
    small = "--rounds 1 --grpo-steps 2 --questions-per-step 3 --group-size 3 --ofsd-questions 9 --ofsd-epochs 1 --eval-limit 5 --force-ofsd"
    done = command(*TORCHRUN, "train.py", "--out", tmp_path / "run", *small.split())
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if row["kind"] == "eval"] == ["base", "grpo-1", "ofsd-1"]
    assert [row["step"] for row in rows if row["kind"] == "step" and row["stage"] == "grpo-1"] == [1, 2]
    assert all(row["logprob_gap"] < 1e-3 for row in rows if row["stage"] == "grpo-1" and row["kind"] == "step")
    answers = [json.loads(line) for line in (tmp_path / "run/trajectories.jsonl").read_text().splitlines()]
    tested = [json.loads(line)["question"] for line in (ROOT / "micro/test.jsonl").read_text().splitlines()[:5]]
    assert [row["question"] for row in answers if row["kind"] == "eval" and row["stage"] == "ofsd-1"] == tested
    assert done.stdout.count("test questions, greedy") == 1
    load_model(str(tmp_path / "run/model"))
    # Resumed on as many ranks it ends the same; on another number it is refused.
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("trajectories.jsonl", "model/model.safetensors")}
    sorted((tmp_path / "run/checkpoints").glob("*.pt"))[-1].unlink()
    alone = command("train.py", "--resume", tmp_path / "run")
    assert alone.returncode == 2 and "the number of processes is another" in alone.stderr
    again = command(*TORCHRUN, "train.py", "--resume", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}
