"""train.py: what a short run writes, the stages, and the input that is refused. Whole
runs with other settings are tested in system/test_runs.py."""

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, line_of, read, run_main, steps_of
from transformers import AutoModelForCausalLM

import train as train_module
from machinery.errors import BadInput
from machinery.models import load_model
from machinery.passages import Passage
from machinery.text import decode, encode
from ofsd import Pair, privileged_prompt
from rollout import Trajectory
from train import Config, train


def test_a_short_run_writes_what_it_promises(small_run):
    rows = read(small_run, "metrics.jsonl")
    assert [(row["kind"], row["stage"]) for row in rows if row["kind"] != "step"] == [
        ("eval", "base"),
        ("eval", "grpo-1"),
        ("mining", "ofsd-1"),
        ("eval", "ofsd-1"),
    ]
    steps = steps_of(small_run, "grpo-1")
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        promised = [*train_module.COLUMNS, "loss", "rollout_s", "step_s", "no_update"]
        assert set(promised) <= row.keys()
        assert 0 <= row["zero_var"] <= 1
        assert row["logprob_gap"] < 1e-3
        assert "kl" not in row  # there is no penalty, and no reference policy
    mining = next(row for row in rows if row["kind"] == "mining")
    counts = [mining[name] for name in ("pairs", "no_correct", "no_contrast")]
    assert sum(counts) + mining["too_long"] == 12
    distilled = steps_of(small_run, "ofsd-1")
    assert len(distilled) == -(-mining["pairs"] // 4)
    assert all({"loss", "grad_norm"} <= row.keys() for row in distilled)
    evals = [row for row in rows if row["kind"] == "eval"]
    for row in evals:
        assert {"em", "f1", "searches", "answered", "n", "em_by"} <= row.keys()
        assert row["n"] == 6
    for name in ("edge", "edge_supported", "edge_control"):
        assert evals[-1][name] == mining[name]
    kinds = [row["kind"] for row in read(small_run, "trajectories.jsonl")]
    assert kinds.count("eval") == 18 and kinds.count("pair") == mining["pairs"]
    assert kinds.count("group") == 1
    assert json.loads((small_run / "config.json").read_text())["grpo_steps"] == 2


@pytest.mark.parametrize("kind", [int, bool, np.float64, torch.tensor])
def test_a_reward_is_any_number_and_em_and_mining_stay_exact_match(
    tmp_path, monkeypatch, kind
):
    """Here every trajectory gets the same reward. GRPO has nothing to learn then, and
    mining goes on as ever."""
    monkeypatch.setattr(
        train_module, "rewards_of", lambda questions, those: [kind(1)] * len(those)
    )
    folder = train(replace(SMALL, out=str(tmp_path / "run"), grpo_steps=1))
    for step in steps_of(folder, "grpo-1"):
        assert step["reward"] == 1.0 and step["zero_var"] == 1.0
    rows = read(folder, "trajectories.jsonl")
    for stage in ("base", "grpo-1"):
        answers = [row for row in rows if row["kind"] == "eval"]
        ems = [row["em"] for row in answers if row["stage"] == stage]
        tests = [row for row in read(folder, "metrics.jsonl") if row["kind"] == "eval"]
        logged = next(row["em"] for row in tests if row["stage"] == stage)
        assert {*ems} <= {0.0, 1.0} and sum(ems) / len(ems) == pytest.approx(logged)
    pairs = [row for row in rows if row["kind"] == "pair"]
    assert pairs and all(row["reference"]["em"] == 1.0 for row in pairs)
    assert {row["student"]["em"] for row in pairs} == {0.0}
    assert all(row["rewards"] == [1.0, 1.0, 1.0] for row in pairs)


def test_the_parameters_moved_and_the_model_folder_loads(small_run, micro):
    trained = AutoModelForCausalLM.from_pretrained(small_run / "model")
    for new, old in zip(trained.parameters(), micro[0].parameters(), strict=True):
        assert not torch.equal(new, old)
    _, tokenizer = load_model(str(small_run / "model"))
    # The prompt travels along.
    assert tokenizer.init_kwargs["search_prompt"] == "{question}"


def test_the_model_of_each_stage_is_kept_where_that_is_asked(tmp_path):
    config = replace(SMALL, out=str(tmp_path / "run"), keep_stages=True, rounds=0)
    folder = train(config)
    assert (folder / "stages/base/model.safetensors").exists()
    load_model(str(folder / "stages/base"))


def test_an_existing_folder_is_refused_and_left_alone(small_run):
    before = (small_run / "metrics.jsonl").read_text()
    with pytest.raises(BadInput, match="exists already"):
        train(replace(SMALL, out=str(small_run)))
    assert (small_run / "metrics.jsonl").read_text() == before


# ------------------------------------------------------------------ the stages


def test_a_stage_without_supported_edge_says_so_and_is_skipped(
    tmp_path, monkeypatch, capsys
):
    edge = {"edge": 0.2, "edge_supported": 0.0, "edge_control": 0.1}
    monkeypatch.setattr(train_module, "teacher_edge", lambda run, pairs: edge)
    folder = train(replace(SMALL, out=str(tmp_path / "run"), force_ofsd=False))
    printed = capsys.readouterr().out
    assert "no supported edge" in printed and "edge_control +0.100" in printed
    rows = read(folder, "metrics.jsonl")
    mining = next(row for row in rows if row["kind"] == "mining")
    assert mining["skipped"] and edge.items() <= mining.items()
    assert not steps_of(folder, "ofsd-1")


def test_the_edge_is_the_teachers_and_its_control_reads_the_next_pairs_reference(
    tokenizer,
):
    """Answers of a policy that is right under some prompts: the teacher's for all of
    four questions, one of them without support; the control's for one; the student's
    for two."""
    pairs = []
    right = {"student": {1, 2}, "teacher": {0, 1, 2, 3}, "control": {3}}
    for number in range(4):
        reference = Trajectory("", [1], queries=["it"], passages=[[]])
        ids = encode(tokenizer, f"<answer> {number}{'0' * 40 * (number == 1)}")
        reference.extend(ids, [0.0] * len(ids))
        question = {
            "id": str(number),
            "question": f"Who is {number}?",
            "golden_answers": ["a b"],
        }
        prompt = privileged_prompt(tokenizer, question["question"], reference, 1000)
        pairs.append(Pair(question, reference, reference, prompt, []))
    seen = {}
    found = [[Passage("p", "", "a b")]]

    def sample(questions, *, prompts, progress):
        seen[progress] = prompts
        assert questions == [pair.question for pair in pairs]
        trajectories = []
        for number in range(4):
            answer = "a b" if number in right[progress] else ""
            passages = found if number > 0 else []
            trajectory = Trajectory("", [1], answer=answer, passages=passages)
            trajectories.append(trajectory)
        return trajectories

    room = len(pairs[2].prompt) + 5  # the second pair's reference is too long
    run = SimpleNamespace(tokenizer=tokenizer, sample=sample)
    run.config = SimpleNamespace(max_privileged_tokens=room)
    edge = train_module.teacher_edge(run, pairs)
    assert edge == {"edge": 0.5, "edge_supported": 0.25, "edge_control": -0.25}
    assert seen["student"] is None and seen["teacher"] == [
        pair.prompt for pair in pairs
    ]
    expected = [
        privileged_prompt(
            tokenizer, pairs[i].question["question"], pairs[j].reference, room
        )
        for i, j in ((0, 1), (1, 2), (2, 3), (3, 0))
    ]
    assert expected[0] is None and None not in expected[1:]
    assert seen["control"] == [pairs[0].prompt, *expected[1:]]
    decoded = decode(tokenizer, seen["control"][3])
    assert "Who is 3?" in decoded and "<answer> 0" in decoded


# ---------------------------------------------------------------- the command


@pytest.fixture
def started(monkeypatch):
    """started(*arguments): the Config that train.py would begin with, and whether it
    resumes."""

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
        Config(seed=3, grpo_lr=1e-5, force_ofsd=True),
        False,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frobnicate", "1"], "--frobnicate"),
        (
            ["--questions", "nowhere.jsonl"],
            "nowhere.jsonl: [Errno 2] No such file or directory",
        ),
        (["--corpus", "nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
        (["--corpus", "BROKEN"], "broken.jsonl:2"),
        (["--corpus", "EMPTY"], "empty.jsonl: there is nothing in it"),
        (["--questions", "EMPTY"], "empty.jsonl: there is nothing in it"),
        (["--questions", "BROKEN"], "broken.jsonl:1"),
        (["--questions", "micro/train.jsonl,BROKEN"], "broken.jsonl:1"),
        (
            ["--questions", "micro/train.jsonl,LEAK"],
            "leak.jsonl: 1 training questions are test",
        ),
        (
            ["--eval-questions", "micro/train.jsonl"],
            "training questions are test questions",
        ),
        (["--model", "tests"], "train.py: cannot use tests: "),
        (["--model", "no/such-model"], "cannot use no/such-model: "),
        (["--model", "micro/modle"], "cannot use micro/modle: "),
        (["--grpo-steps", "many"], "--grpo-steps"),
        (
            ["--grpo-steps", "-1"],
            "grpo_steps must be int, at least 0 and below 2**32, not -1",
        ),
        (["--divergence", "kl"], "divergence"),
        (
            ["--group-size", "0"],
            "group_size must be int, above 0 and below 2**32, not 0",
        ),
        (["--grpo-lr", "nan"], "grpo_lr"),
        (["--prompt", "no place for it"], "{question}"),
        (["--retriever-url", "here"], "a retriever's URL is http:// or https://"),
        (["--config", "a", "--resume", "b"], "not allowed with"),
        (["--out", "README.md/run"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    refused, tmp_path, flags, message
):
    leak = {
        **json.loads(Path("micro/test.jsonl").read_text().splitlines()[0]),
        "id": "new",
    }
    (tmp_path / "broken.jsonl").write_text(
        '{"id": "0", "title": "a", "text": "b"}\n{oops\n'
    )
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "leak.jsonl").write_text(json.dumps(leak) + "\n")
    out = tmp_path / "run"
    for name in ("BROKEN", "EMPTY", "LEAK"):
        flags = [
            flag.replace(name, str(tmp_path / f"{name.lower()}.jsonl"))
            for flag in flags
        ]
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
        (
            '{"rounds": true}',
            "rounds must be int, at least 0 and below 2**32, not True",
        ),
        (
            '{"rounds": null}',
            "rounds must be int, at least 0 and below 2**32, not None",
        ),
        ('{"ofsd": 1}', "ofsd must be bool, not 1"),
        ('{"model": 7}', "model must be"),
        ('{"clip": ["none"]}', "clip must be"),
        ('{"grpo_lr": NaN}', "grpo_lr must be float, above 0 and below 2**32, not nan"),
        ('{"group_size": 0}', "group_size must be int, above 0 and below 2**32, not 0"),
        ('{"prompt": "no place"}', "{question}"),
        ('{"out": "a\\u0000b"}', "out must be str, without NUL"),
        ('{"corpus": "\\ud800"}', "corpus must be str, without NUL"),
        ('{"model": "a/\\udfff"}', "model must be str, without NUL"),
        ('{"questions": "a,\\u0000"}', "questions must be str, without NUL"),
        ('{"prompt": "{question}\\udbff"}', "prompt must be str, without NUL"),
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


def test_a_trajectory_in_json_keeps_who_wrote_what(small_run):
    row = read(small_run, "trajectories.jsonl")[0]
    names = {
        "question",
        "answer",
        "queries",
        "finish_reason",
        "text",
        "golden_answers",
        "em",
    }
    assert names <= row.keys()
    assert all(who in (0, 1) for who, _ in row["text"]) and row["text"][0][0] == 1


def test_a_pair_in_json_has_a_divergence_for_each_token_of_the_policy(small_run):
    rows = [
        row for row in read(small_run, "trajectories.jsonl") if row["kind"] == "pair"
    ]
    assert rows
    for row in rows:
        assert len(row["rewards"]) == SMALL.group_size
        for who, text in row["student"]["text"]:
            so_far = ""
            while so_far != text:
                token, nats = row["divergence"].pop(0)
                so_far += token
                assert (nats is None) == (not who) and (nats is None or nats > -1e-5)
        assert not row["divergence"]
