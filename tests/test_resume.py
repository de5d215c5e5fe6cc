"""train.py --resume: a run that was stopped anywhere ends as the one that never was."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train import SMALL, read, untimed

import grpo
import train as train_module
from retriever import BadInput, SearchFailed, checksum
from train import Config, Run, Stopped, load_checkpoint, loop, save_checkpoint, train

LORA = replace(SMALL, lora_rank=2, grpo_lora_rank=2, grpo_lr=1e-3)
FLAGS = [part for name in ("rounds", "grpo_steps", "questions_per_step", "group_size", "ofsd_questions", "ofsd_epochs", "ofsd_batch", "eval_limit", "grpo_lr")
         for part in (f"--{name.replace('_', '-')}", str(getattr(SMALL, name)))] + ["--force-ofsd", "--save-every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """{with adapters?: the folder of a run that was never stopped}"""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {lora: train(replace(LORA if lora else SMALL, save_every=1, out=str(folder / f"{lora}"))) for lora in (False, True)}


def same(one, two):
    assert untimed(read(one, "metrics.jsonl")) == untimed(read(two, "metrics.jsonl"))
    assert (one / "trajectories.jsonl").read_bytes() == (two / "trajectories.jsonl").read_bytes()
    a, b = (load_file(folder / "model/model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lora", [False, True])
def test_stopped_after_every_checkpoint_and_resumed_it_ends_the_same(undisturbed, tmp_path, monkeypatch, lora):
    config, plain = replace(LORA if lora else SMALL, save_every=1, out=str(tmp_path / "run")), Run.checkpoint
    stages = []

    def checkpoint(run, stage, step, **more):
        plain(run, stage, step, **more)
        stages.append((stage, step))
        run.append("metrics.jsonl", {"a line": "that the checkpoint does not know"})
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", checkpoint)
        with pytest.raises(Stopped):
            train(config)
        while stages[-1][0] != "end":
            torch.rand(7), random.random()  # what another process would have drawn
            with pytest.raises(Stopped):
                loop(Run(config, resume=True))
    steps = len([row for row in read(undisturbed[lora], "metrics.jsonl") if row["stage"] == "ofsd-1" and row["kind"] == "step"])
    assert stages == [("base", 0), ("grpo-1", 0), ("grpo-1", 1), ("grpo-1", 2), ("ofsd-1", 0), ("ofsd-1", 0),
                      *(("ofsd-1", i + 1) for i in range(steps)), ("end", 0)]  # fmt: skip
    assert loop(Run(config, resume=True)) == tmp_path / "run"
    same(undisturbed[lora], tmp_path / "run")
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


def test_killed_at_random_moments_it_ends_the_same(undisturbed, tmp_path):
    """SIGKILL, again and again, the later the longer the run lasts."""
    out, draw = tmp_path / "run", random.Random(0)
    for kill in range(40):
        how = ["--resume", out] if (out / "checkpoints").exists() and list((out / "checkpoints").glob("*.pt")) else ["--out", out, *FLAGS]
        if how[0] == "--out":
            shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen([sys.executable, "train.py", *how], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(timeout=draw.uniform(3, 6) + 0.5 * kill)
        except subprocess.TimeoutExpired:
            process.kill()
        error = process.communicate()[1].decode()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
    assert process.returncode == 0 and kill >= 2
    same(undisturbed[False], out)


def test_a_signal_finishes_the_step_and_says_how_to_go_on(undisturbed, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "train.py", "--out", out, *FLAGS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "steps" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert error.strip().splitlines()[-1] == f"stopped: train.py --resume {out} goes on from here"
    done = subprocess.run([sys.executable, "train.py", "--resume", out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(undisturbed[False], out)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:999] + b"?" + data[1000:], lambda data: b""])
def test_a_damaged_checkpoint_is_left_out_with_a_word(tmp_path, capsys, damage):
    for number in (1, 2):
        save_checkpoint(tmp_path, {"step": number, "weights": torch.arange(1000)})
    first, second = sorted(tmp_path.glob("*.pt"))
    second.write_bytes(damage(second.read_bytes()))
    assert load_checkpoint(tmp_path)["step"] == 1
    assert f"{second} is left out: it is cut off or changed" in capsys.readouterr().err
    save_checkpoint(tmp_path, {"step": 3})
    assert load_checkpoint(tmp_path)["step"] == 3 and first.exists()  # the good one before was not thrown away


def test_a_malicious_checkpoint_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/pwned",)

    for write in (lambda path: path.write_bytes(pickle.dumps(Evil())), lambda path: torch.save({"stage": Evil()}, path)):
        write(tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / f"000009-{checksum(tmp_path / 'new'):08x}.pt")
        assert load_checkpoint(tmp_path) is None
        assert "is left out" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("megabytes", [8, 24])  # the model, or the second checkpoint, finds no room
def test_a_full_disk_ends_with_one_line_and_a_whole_checkpoint(tmp_path, megabytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", disk], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        done = subprocess.run([sys.executable, "train.py", "--out", disk / "run", *FLAGS], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert f"--resume {disk / 'run'} goes on" in done.stderr and "No space left" in done.stderr
        assert load_checkpoint(disk / "run/checkpoints") is not None
    finally:
        subprocess.run(["umount", disk])


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """As above where no tmpfs can be mounted: every write fails after some bytes."""
    save_checkpoint(tmp_path, {"step": 1})

    def full(state, file):
        file.write(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(grpo.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, {"step": 2})
    assert load_checkpoint(tmp_path)["step"] == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--grpo-lr", "1"], "--grpo-lr 1.0: the run has 0.0001"),
        (["--seed", "5"], "--seed 5: the run has 0"),
        (["--resume", "runs/nowhere"], "holds no run to resume"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused(undisturbed, refused, flags, message):
    assert message in refused("train.py", "--resume", undisturbed[False], *flags)


def test_a_finished_run_prints_its_table_again(undisturbed, command):
    done = command("train.py", "--resume", undisturbed[False], "--seed", "0")
    assert done.returncode == 0 and "6 test questions, greedy" in done.stdout


def test_other_questions_than_before_are_refused(undisturbed, tmp_path):
    shutil.copytree(undisturbed[False], tmp_path / "run")
    config = Config(**json.loads((tmp_path / "run/config.json").read_text()))
    with pytest.raises(BadInput, match="is another than when it began"):
        Run(replace(config, out=str(tmp_path / "run"), questions="micro/validation.jsonl"), resume=True)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(BadInput, match="no whole checkpoint"):
        Run(replace(config, out=str(tmp_path / "run")), resume=True)
    assert asdict(config)["save_every"] == 1


def test_updates_without_a_finite_gradient_are_skipped_counted_and_end_the_run(tmp_path, monkeypatch, micro):
    plain, bad = grpo.token_logprobs, {2, 4, 5, 6}
    monkeypatch.setattr(train_module, "grpo_step", lambda *args: steps.append(1) or grpo.grpo_step(*args))
    monkeypatch.setattr(grpo, "token_logprobs", lambda logits, ids: plain(logits, ids) * (float("nan") if len(steps) in bad else 1))
    steps, out = [], tmp_path / "run"
    with pytest.raises(BadInput, match="grpo-1, step 6: the 3 last updates had no finite gradient"):
        train(replace(SMALL, grpo_steps=9, save_every=1, out=str(out)))
    rows = [row for row in read(out, "metrics.jsonl") if row["kind"] == "step"]
    assert [row["no_update"] for row in rows] == [step in bad for step in range(1, 7)]
    assert rows[1]["grad_norm"] is None and rows[2]["grad_norm"] > 0
    saved = load_checkpoint(out / "checkpoints")
    assert saved["step"] == 5 and all(x.isfinite().all() for x in saved["model"].values())


def test_an_infinite_loss_with_a_finite_gradient_is_an_update():
    """Where the student excludes a word of the teacher's the divergence is infinite, its gradient is not."""
    logged = []
    run = SimpleNamespace(config=SMALL, bad_updates=2, stopping=0, gather=lambda value: [value], log=lambda *_, **row: logged.append(row))
    Run.end_step(run, "ofsd-1", 1, 5, {"loss": float("inf"), "grad_norm": 1.0})
    assert run.bad_updates == 0 and logged[0]["no_update"] is False


def test_a_server_that_fails_stops_training_and_the_run_goes_on_later(undisturbed, tmp_path, monkeypatch, micro_index):
    out, calls = tmp_path / "run", []

    class Flaky:
        def search(self, queries, k):
            calls.append(time.time())
            if len(calls) == 12:
                raise SearchFailed("http://here does not answer")
            return micro_index.search(queries, k)

    monkeypatch.setattr(train_module, "open_index", lambda corpus: Flaky())
    config = replace(SMALL, save_every=1, out=str(out))
    with pytest.raises(BadInput, match="http://here does not answer. The last checkpoint is whole: train.py --resume"):
        train(config)
    loop(Run(config, resume=True))
    same(undisturbed[False], out)
