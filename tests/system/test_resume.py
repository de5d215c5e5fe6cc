"""train.py --resume: a run that was stopped anywhere ends as the one that never was."""

import copy
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
from datetime import date, datetime
from datetime import time as clock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, line_of, read, run_main, steps_of, untimed
from safetensors.torch import load_file, save_file

import grpo
import train as train_module
from machinery.errors import BadInput
from machinery.run import Run, read_checkpoint
from machinery.settings import read_settings
from train import Config, train

PLAIN = replace(SMALL, save_every=1, ofsd_batch=2)  # several steps of either stage
LORA = replace(PLAIN, lora_rank=2, grpo_lora_rank=2, grpo_lr=1e-3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are equal to the bit only where as many threads add them up. Several have
    been seen to divide the work otherwise in another process on a busy machine."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that launch() starts
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_thread):
    """{with adapters?: the folder of a run that was never stopped}"""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        False: train(replace(PLAIN, out=str(folder / "plain"))),
        True: train(replace(LORA, out=str(folder / "adapters"))),
    }


@pytest.fixture
def settings(tmp_path):
    """The flags of a run like the undisturbed one without adapters."""
    (tmp_path / "settings.json").write_text(json.dumps(asdict(PLAIN)))
    return "--config", tmp_path / "settings.json"


def heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(*arguments, stdout=subprocess.PIPE):
    """train.py in a process of its own. It heeds Ctrl-C even if pytest does not."""
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def same(one, two):
    assert untimed(read(one, "metrics.jsonl")) == untimed(read(two, "metrics.jsonl"))
    for name in ("trajectories.jsonl", "model/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def stop_at(monkeypatch, config, wanted):
    """Train until the checkpoint is saved of which wanted(stage, step) is true."""
    plain = Run.checkpoint

    def checkpoint(run, stage, step):
        plain(run, stage, step)
        if wanted(stage, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", checkpoint)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def load(folder):
    """The checkpoint of a run, as anybody's."""
    return torch.load(folder / "checkpoints/last.pt", weights_only=False)


# ---------------------------------------------------------------- stopped, and resumed


@pytest.mark.parametrize("lora", [False, True])
def test_stopped_after_every_checkpoint_and_resumed_it_ends_the_same(
    undisturbed, tmp_path, monkeypatch, lora
):
    config = replace(LORA if lora else PLAIN, out=str(tmp_path / "run"))
    plain, stages = Run.checkpoint, []

    def checkpoint(run, stage, step):
        plain(run, stage, step)
        stages.append((stage, step))
        (run.folder / "a-users-own.jsonl").write_text("kept\n")
        for name in Run.logs:
            with open(run.folder / name, "a") as file:
                file.write('{"a line": "that the checkpoint does not know"}\n')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", checkpoint)
        with pytest.raises(KeyboardInterrupt):
            train(config)
        while stages.count(("", 0)) < 3:
            torch.rand(7), random.random()  # what another process would have drawn
            with pytest.raises(KeyboardInterrupt):
                train(config, resume=True)
    steps = len(steps_of(undisturbed[lora], "ofsd-1"))
    distilled = [("ofsd-1", step) for step in range(steps + 1)]
    assert steps > 1
    assert stages == [
        ("", 0),
        ("grpo-1", 1),
        ("grpo-1", 2),
        ("", 0),
        *distilled,
        ("", 0),
    ]
    assert train(config, resume=True) == tmp_path / "run"
    same(undisturbed[lora], tmp_path / "run")
    assert (tmp_path / "run/a-users-own.jsonl").read_text() == "kept\n"
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [
        "last.pt"
    ]


@pytest.mark.parametrize("stage", ["grpo-1", "ofsd-1"])
def test_adapters_inside_a_stage_are_resumed_to_the_bit(
    undisturbed, tmp_path, monkeypatch, stage
):
    """What the next step sees: weights, both halves of each adapter, the optimizer."""
    config = replace(LORA, out=str(tmp_path / "run"))
    stop_at(monkeypatch, config, lambda *at: at == (stage, 1))
    saved = load(tmp_path / "run")
    adapters = {name for name in saved["model"] if name.endswith((".A", ".B"))}
    assert adapters and any(
        saved["model"][name].any() for name in adapters if name[-1] == "B"
    )
    seen = []
    name = f"{stage[:4]}_step"
    plain = getattr(train_module, name)

    def step(*args, **settings):
        model = args[0]
        optimizer = next(x for x in args if isinstance(x, torch.optim.Optimizer))
        if not seen:
            seen.append(copy.deepcopy(model.state_dict()))
            seen.append(copy.deepcopy(optimizer.state_dict()["state"]))
            # The optimizer holds those that the model computes with.
            trained = {id(p) for p in optimizer.param_groups[0]["params"]}
            ours = [key for key, p in model.named_parameters() if id(p) in trained]
            assert set(ours) == adapters
            assert stage == "grpo-1" or args[1] is model  # the teacher
        return plain(*args, **settings)

    monkeypatch.setattr(train_module, name, step)
    train(config, resume=True)
    model, states = seen
    assert model.keys() == saved["model"].keys()
    assert all(torch.equal(value, saved["model"][key]) for key, value in model.items())
    before = saved["optimizer"]["state"]
    assert states.keys() == before.keys() and len(states) == len(adapters)
    for number, state in states.items():
        assert all(
            torch.equal(value, before[number][key]) for key, value in state.items()
        )
    same(undisturbed[True], tmp_path / "run")


def test_a_run_stopped_before_its_first_checkpoint_begins_at_the_beginning(
    undisturbed, tmp_path, monkeypatch
):
    config = replace(PLAIN, out=str(tmp_path / "run"))

    def checkpoint(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", checkpoint)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (tmp_path / "run/checkpoints").exists()
    assert (
        len(read(tmp_path / "run", "metrics.jsonl")) == 1
    )  # it had tested the base already
    train(config, resume=True)
    same(undisturbed[False], tmp_path / "run")


@pytest.mark.parametrize("step", [0, 1])
def test_rewards_of_numpy_and_questions_with_times_enter_a_checkpoint_that_can_be_read(
    undisturbed, tmp_path, monkeypatch, step
):
    """They come into it with the mined pairs. It may hold plain values only."""
    lines = (ROOT / "micro/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["published"] = datetime(2020, 1, 31, 12)
        row["seen"] = [{"on": date(2021, 2, 3), "at": clock(4, 5)}]

    def rewards_of(*arguments):
        return [np.float64(reward) for reward in plain(*arguments)]

    plain = train_module.rewards_of
    monkeypatch.setattr(train_module, "rewards_of", rewards_of)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **keywords: rows)
    config = replace(PLAIN, out=str(tmp_path / "run"), questions="a/set:plain:train")
    stop_at(monkeypatch, config, lambda *at: at == ("ofsd-1", step))
    mined = read_checkpoint(tmp_path / "run/checkpoints/last.pt")["mined"]
    pair = mined["batches"][0][0]
    assert pair.question["published"] == "2020-01-31T12:00:00"
    assert pair.question["seen"] == [{"on": "2021-02-03", "at": "04:05:00"}]
    assert {type(reward) for reward in pair.rewards} == {float}
    train(config, resume=True)
    same(undisturbed[False], tmp_path / "run")


def test_killed_at_random_moments_it_ends_the_same(undisturbed, tmp_path, settings):
    """SIGKILL, again and again, within a second after the run has written something."""
    out = tmp_path / "run"
    draw = random.Random(0)
    logs = [out / "metrics.jsonl", out / "trajectories.jsonl"]

    def sizes():
        return [path.exists() and path.stat().st_size for path in logs]

    kills = 0
    while kills < 40:
        flags = ("--resume", out)
        if not (out / "config.json").exists() or not (out / "config.json").read_text():
            shutil.rmtree(out, ignore_errors=True)  # it was killed before it had begun
            flags = (*settings, "--out", out)
        before = sizes()
        process = launch(*flags, stdout=subprocess.DEVNULL)
        while process.poll() is None and sizes() == before:
            time.sleep(0.001)
        wait = draw.choice([0.0, draw.uniform(0, 0.1), draw.uniform(0, 1)])
        try:
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        error = process.communicate()[1]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
    assert process.returncode == 0 and kills >= 2
    same(undisturbed[False], out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_one_line_that_says_how_to_go_on(
    undisturbed, tmp_path, settings, monkeypatch, number
):
    out = tmp_path / "run"
    process = launch(*settings, "--out", out)
    while "steps" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("train.py: stopped")
    assert error.strip().endswith(
        f"train.py --resume {out} goes on from the last checkpoint"
    )
    run_main(monkeypatch, train_module.main, "train.py", "--resume", out)
    same(undisturbed[False], out)


def test_ctrl_c_before_there_is_a_run_is_one_line_too(tmp_path, monkeypatch, capsys):
    def load_model(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("machinery.run.read_model", load_model)
    flags = "--out", tmp_path / "run"
    run_main(monkeypatch, train_module.main, "train.py", *flags, status=130)
    assert line_of(capsys) == "train.py: stopped"
    assert not (tmp_path / "run").exists()


def test_a_finished_run_prints_its_table_again(undisturbed, monkeypatch, capsys):
    before = {path: path.stat().st_mtime for path in undisturbed[False].rglob("*")}
    flags = (
        "--resume",
        undisturbed[False],
        "--seed",
        "0",
    )  # a flag may say what holds anyway
    run_main(monkeypatch, train_module.main, "train.py", *flags)
    assert "6 test questions" in capsys.readouterr().out
    assert {path.name for path in before} == {
        p.name for p in undisturbed[False].rglob("*")
    }
    assert json.loads((undisturbed[False] / "config.json").read_text())["seed"] == 0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--grpo-lr", "1"], "has grpo_lr 0.0001, and is resumed as it is"),
        (["--seed", "5"], "has seed 0, and is resumed as it is"),
        (["--no-ofsd"], "has ofsd True, and is resumed as it is"),
        (["--out", "runs/other"], "and is resumed as it is"),
        (
            ["--resume", "runs/nowhere"],
            "No such file or directory: 'runs/nowhere/config.json'",
        ),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused(
    undisturbed, monkeypatch, capsys, flags, message
):
    flags = "--resume", undisturbed[False], *flags
    run_main(monkeypatch, train_module.main, "train.py", *flags, status=2)
    assert message in line_of(capsys)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was stopped after its first step, beside all files that it read."""
    folder, patch = tmp_path_factory.mktemp("begun"), pytest.MonkeyPatch()
    for name in ("corpus", "train", "test"):
        shutil.copy(ROOT / f"micro/{name}.jsonl", folder)
    shutil.copytree(ROOT / "micro/model", folder / "model")
    config = replace(
        PLAIN,
        out=str(folder / "run"),
        corpus=str(folder / "corpus.jsonl"),
        questions=str(folder / "train.jsonl"),
        eval_questions=str(folder / "test.jsonl"),
        model=str(folder / "model"),
    )
    stop_at(patch, config, lambda *at: at == ("grpo-1", 1))
    return folder


@pytest.fixture
def changeable(begun):
    """Its files may be changed: afterwards they are what they were."""
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    yield begun
    for path, content in before.items():
        path.write_bytes(content)


def change_corpus(folder):
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"id": "new", "title": "A", "text": "one passage more"}\n')


def change_questions(folder):
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[1:]))


def change_test(folder):
    lines = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(lines[::-1]))


def change_setting(folder):
    config = json.loads((folder / "run/config.json").read_text())
    config["prompt"] = "Answer this: {question}"
    (folder / "run/config.json").write_text(json.dumps(config))


def change_weights(folder):
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})


def change_tokenizer(folder):
    file = folder / "model/tokenizer_config.json"
    file.write_text(file.read_text().replace('"{question}"', '"Q: {question}"'))


@pytest.mark.parametrize(
    "change, name",
    [
        (change_corpus, "the corpus"),
        (change_questions, "the questions"),
        (change_test, "the questions"),
        (change_setting, "the settings"),
        (change_weights, "the model"),
        (change_tokenizer, "the prompt"),
    ],
)
def test_what_changed_since_the_run_began_is_named(
    changeable, monkeypatch, capsys, change, name
):
    run = changeable / "run"
    change(changeable)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    run_main(monkeypatch, train_module.main, "train.py", "--resume", run, status=2)
    assert line_of(capsys) == f"train.py: {run}: {name} changed since this run began"
    assert {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file()
    } == before


def test_a_run_that_still_runs_is_not_run_twice(
    tmp_path, settings, monkeypatch, capsys
):
    out = tmp_path / "run"
    process = launch(*settings, "--out", out)
    while "steps" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    run_main(monkeypatch, train_module.main, "train.py", "--resume", out, status=2)
    assert "is still being run by another process" in line_of(capsys)
    process.kill()
    process.communicate()
    run_main(monkeypatch, train_module.main, "train.py", "--resume", out)


def test_what_did_not_change_is_no_hindrance(begun):
    config = read_settings(begun / "run/config.json", Config)
    run = Run(config, resume=True)
    assert (run.saved["stage"], run.saved["step"]) == ("grpo-1", 1)


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b""]
)
def test_a_checkpoint_that_is_cut_off_is_refused(undisturbed, tmp_path, damage):
    shutil.copytree(undisturbed[False], tmp_path / "run")
    file = tmp_path / "run/checkpoints/last.pt"
    file.write_bytes(damage(file.read_bytes()))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match=f"{file} is no whole checkpoint"):
        Run(replace(PLAIN, out=str(tmp_path / "run")), resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "trajectories.jsonl"])
def test_a_log_that_is_shorter_than_the_checkpoint_says_is_refused(
    undisturbed, tmp_path, name
):
    """As a power cut may leave it. It would go on behind a torn line, unreadable."""
    shutil.copytree(undisturbed[False], tmp_path / "run")
    log = tmp_path / "run" / name
    log.write_bytes(log.read_bytes()[:-10])
    before = log.read_bytes()
    with pytest.raises(BadInput, match=f"{log} is shorter than the last checkpoint"):
        Run(replace(PLAIN, out=str(tmp_path / "run")), resume=True)
    assert log.read_bytes() == before


def test_a_file_that_was_being_written_is_not_read(undisturbed, tmp_path):
    """As SIGKILL leaves it: the last checkpoint is whole, beside half of a new one."""
    shutil.copytree(undisturbed[False], tmp_path / "run")
    (tmp_path / "run/checkpoints/new.pt").write_bytes(b"half of it")
    run = Run(replace(PLAIN, out=str(tmp_path / "run")), resume=True)
    assert [row["stage"] for row in run.evaluations] == ["base", "grpo-1", "ofsd-1"]


def test_a_malicious_checkpoint_runs_no_code(
    undisturbed, tmp_path, monkeypatch, capsys
):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/pwned",)

    shutil.copytree(undisturbed[False], tmp_path / "run")
    file = tmp_path / "run/checkpoints/last.pt"
    for write in (
        lambda: file.write_bytes(pickle.dumps(Evil())),
        lambda: torch.save({"stage": Evil()}, file),
    ):
        write()
        flags = "--resume", tmp_path / "run"
        run_main(monkeypatch, train_module.main, "train.py", *flags, status=2)
        assert "is no whole checkpoint" in line_of(capsys)
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------ what goes wrong meanwhile


# The model, or a checkpoint, finds no room.
@pytest.mark.parametrize("megabytes", [8, 24])
def test_a_full_disk_ends_with_one_line_and_the_run_goes_on_later(
    undisturbed, tmp_path, settings, monkeypatch, capsys, megabytes
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        flags = *settings, "--out", disk / "run"
        run_main(monkeypatch, train_module.main, "train.py", *flags, status=2)
        told = line_of(capsys)
        assert f"--resume {disk / 'run'} goes on" in told and "No space left" in told
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        run_main(monkeypatch, train_module.main, "train.py", "--resume", disk / "run")
        same(undisturbed[False], disk / "run")
    finally:
        subprocess.run(["umount", disk])


@pytest.mark.parametrize("wanted", [("", 0), ("ofsd-1", 1)])
def test_no_room_for_a_checkpoint_is_one_line_and_the_last_one_stays(
    undisturbed, tmp_path, settings, monkeypatch, capsys, wanted
):
    """As above where no tmpfs can be mounted: the new file leads to /dev/full."""
    plain, out = Run.checkpoint, tmp_path / "run"

    def checkpoint(run, stage, step):
        if (stage, step) == wanted:
            (out / "checkpoints").mkdir(exist_ok=True)
            (out / "checkpoints/new.pt").symlink_to("/dev/full")
        plain(run, stage, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", checkpoint)
        flags = *settings, "--out", out
        run_main(monkeypatch, train_module.main, "train.py", *flags, status=2)
    told = line_of(capsys)
    assert f"--resume {out} goes on" in told and "No space left" in told
    assert (out / "checkpoints/last.pt").exists() == (wanted != ("", 0))
    (out / "checkpoints/new.pt").unlink()
    run_main(monkeypatch, train_module.main, "train.py", "--resume", out)
    same(undisturbed[False], out)


def test_updates_without_a_finite_gradient_are_skipped_and_told(tmp_path, monkeypatch):
    plain = grpo.token_logprobs
    bad = {2, 4, 5, 6}
    steps = []
    out = tmp_path / "run"

    def step(*args, **settings):
        steps.append(1)
        return grpo.grpo_step(*args, **settings)

    def logprobs(logits, ids):
        factor = float("nan") if len(steps) in bad else 1
        return plain(logits, ids) * factor

    monkeypatch.setattr(train_module, "grpo_step", step)
    monkeypatch.setattr(grpo, "token_logprobs", logprobs)
    train(replace(PLAIN, grpo_steps=7, ofsd=False, out=str(out)))
    rows = steps_of(out, "grpo-1")
    assert [row["no_update"] for row in rows] == [step in bad for step in range(1, 8)]
    # JSON knows no NaN.
    assert rows[1]["grad_norm"] is None and rows[2]["grad_norm"] > 0
    saved = load(out)
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_an_infinite_loss_with_a_finite_gradient_is_an_update():
    """Where the student excludes a token of the teacher's the divergence is infinite,
    and its gradient is not."""
    logged = []

    def log(kind, stage, **row):
        logged.append(row)

    run = SimpleNamespace(config=SMALL, log=log)
    Run.end_step(run, "ofsd-1", 1, {"loss": float("inf"), "grad_norm": 1.0})
    assert logged[0]["no_update"] is False and logged[0]["step"] == 1


def test_a_server_that_fails_stops_training_and_the_run_goes_on_later(
    undisturbed, tmp_path, monkeypatch, capsys, settings, micro_index
):
    out, calls = tmp_path / "run", []

    class Flaky:
        def search(self, queries, k):
            calls.append(queries)
            if len(calls) == 12:
                raise BadInput("no answer from http://here in 4 attempts")
            return micro_index.search(queries, k)

    monkeypatch.setattr("machinery.run.open_index", lambda corpus: Flaky())
    flags = *settings, "--out", out
    run_main(monkeypatch, train_module.main, "train.py", *flags, status=2)
    assert line_of(capsys) == (
        "train.py: no answer from http://here in 4 attempts. "
        f"train.py --resume {out} goes on from the last checkpoint"
    )
    run_main(monkeypatch, train_module.main, "train.py", "--resume", out)
    same(undisturbed[False], out)


def test_the_settings_of_a_run_are_kept_as_they_were_given(undisturbed):
    kept = json.loads((undisturbed[False] / "config.json").read_text())
    assert kept["date"]  # the day on which it began; it may be resumed on another one
    assert Config(**kept) == replace(
        PLAIN, out=str(undisturbed[False]), date=kept["date"]
    )
