"""machinery/run.py: what a run samples and writes, piece by piece. Whole runs are in
test_train.py and system/, and how they go on in system/test_resume.py."""

import json
import math
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

from machinery import ranks
from machinery import run as run_module
from machinery.errors import BadInput
from machinery.run import Run, checksum, step_heading, step_line
from rollout import Trajectory


@pytest.fixture
def sampled(monkeypatch):
    """sampled(number, count, questions, ...): what rollout() is asked by the process of
    this number, of so many, in the calls of Run.sample that are named last."""

    def sample(number, count, questions, *calls):
        asked = []

        def rollout(model, tokenizer, retriever, questions, **keywords):
            asked.append({"questions": questions, **keywords})
            return [Trajectory(question, [1]) for question in questions]

        monkeypatch.setattr(run_module, "rollout", rollout)
        monkeypatch.setattr(run_module, "rank", lambda: number)
        monkeypatch.setattr(run_module, "rank_count", lambda: count)
        monkeypatch.setattr(run_module, "gather", lambda value: [value] * count)
        run = SimpleNamespace(
            config=SMALL,
            model=None,
            tokenizer=None,
            retriever=None,
            rng=random.Random(0),
            tokens_sampled=0,
        )
        rows = [{"question": question} for question in questions]
        for keywords in calls:
            trajectories = Run.sample(run, rows, **keywords)
            share = [t.question for t in trajectories[: len(asked[-1]["questions"])]]
            assert share == asked[-1]["questions"]
        return asked

    return sample


def test_each_device_draws_by_a_seed_of_its_own(sampled):
    """Else two devices would sample the same trajectories of the same question. And the
    seed is another one at each call."""
    seeds = []
    for number in range(3):
        seeds += [call["seed"] for call in sampled(number, 3, "abc", {}, {})]
    assert len(set(seeds)) == 6
    again = [call["seed"] for call in sampled(0, 3, "abc", {}, {})]
    assert again == seeds[:2]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_devices_share_the_questions_in_their_order(sampled, count):
    questions = list("abcdef")[:5]
    prompts = [[number] for number in range(5)]
    seen = []
    for number in range(count):
        (call,) = sampled(number, count, questions, {"prompts": prompts})
        seen += zip(call["questions"], call["prompts"], strict=True)
    assert seen == list(zip(questions, prompts, strict=True))


def test_sampling_obeys_the_settings(sampled):
    plain, test = sampled(0, 1, "ab", {"group_size": 3}, {"temperature": 0.0})
    assert (plain["group_size"], plain["temperature"]) == (3, 1.0)
    assert (test["group_size"], test["temperature"]) == (1, 0.0)
    assert plain["prompts"] is None
    for name in run_module.LIMITS:
        assert plain[name] == getattr(SMALL, name)
    assert plain["batch_size"] == SMALL.rollout_batch


def test_a_line_of_metrics_counts_the_tokens_sampled_since_the_line_before(
    tmp_path, monkeypatch
):
    """Those of the policy: what the environment wrote is none of them."""
    rows = [Trajectory("a", [1], [5, 6, 7], [1, 0, 1]), Trajectory("b", [1], [5], [1])]
    monkeypatch.setattr(run_module, "rollout", lambda *_, **__: rows)
    run = SimpleNamespace(
        config=SMALL,
        model=None,
        tokenizer=None,
        retriever=None,
        rng=random.Random(0),
        tokens_sampled=0,
        folder=tmp_path,
        began=0.0,
    )
    run.append = partial(Run.append, run)
    counts = []
    for samplings in (1, 0, 2):
        for _ in range(samplings):
            Run.sample(run, [{"question": "a"}, {"question": "b"}])
        counts.append(Run.log(run, "step", "grpo-1")["tokens_sampled"])
    assert counts == [3, 0, 6]


def test_a_stage_keeps_one_group_of_its_first_step(tmp_path, random_model, tokenizer):
    run = SimpleNamespace(model=random_model, tokenizer=tokenizer, folder=tmp_path)
    run.as_json = partial(Run.as_json, run)
    run.append = partial(Run.append, run)
    questions = [{"golden_answers": ["x"]}, {"golden_answers": ["y"]}]
    group = []
    for answer in "abcd":
        row = Trajectory(answer, [3], [5], [1], [-1.0], answer=answer)
        group.append(row)
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.5]])
    for step in (1, 2, 3):
        Run.log_group(run, "grpo-1", step, questions, group, rewards)
    (line,) = (tmp_path / "trajectories.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["kind"] == "group" and line["rewards"] == [0.0, 0.5]
    assert line["golden_answers"] == ["y"]
    assert [row["answer"] for row in line["trajectories"]] == ["c", "d"]


def test_questions_come_in_passes_each_in_an_order_of_its_own():
    train_set = [{"id": number} for number in range(7)]
    run = SimpleNamespace(train_set=train_set, rng=random.Random(0), waiting=[])
    numbers = []
    for count in (3, 3, 3, 3, 3, 6):
        questions = Run.next_questions(run, count)
        assert len(questions) == count
        numbers += [question["id"] for question in questions]
    passes = [numbers[:7], numbers[7:14], numbers[14:]]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len({tuple(order) for order in [*passes, range(7)]}) == 4
    # More than there are: then some come twice.
    assert len(Run.next_questions(run, 20)) == 20


def test_a_line_of_a_log_is_json_also_where_a_number_is_none(tmp_path):
    run = SimpleNamespace(folder=tmp_path)
    for number in range(2):
        metrics = {"loss": math.nan, "norm": math.inf, "n": number, "text": "é \ud800"}
        metrics["pair"] = {"divergence": [["a", math.inf], ["b", 0.5]]}
        line = Run.append(run, "metrics.jsonl", "step", "grpo-1", **metrics)
        assert line["kind"] == "step" and math.isnan(line["loss"])
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "kind": "step",
            "stage": "grpo-1",
            "loss": None,
            "norm": None,
            "n": number,
            "text": "é \ud800",
            "pair": {"divergence": [["a", None], ["b", 0.5]]},
        }
        for number in range(2)
    ]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "rank", lambda: 1)
    run = SimpleNamespace(folder=tmp_path)
    line = Run.append(run, "metrics.jsonl", "step", "grpo-1", loss=1.0)
    assert line == {"kind": "step", "stage": "grpo-1", "loss": 1.0}
    Run.checkpoint(run, "grpo-1", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save_every", [1, 2, 3, 7])
def test_a_checkpoint_is_due_after_so_many_steps(save_every):
    """And a step is logged before it, so that the log is never behind."""
    happened = []
    run = SimpleNamespace(
        config=replace(SMALL, save_every=save_every),
        log=lambda kind, stage, **metrics: happened.append(metrics),
        checkpoint=lambda stage, step: happened.append((stage, step)),
    )
    for step in range(1, 7):
        Run.end_step(run, "grpo-1", step, {"grad_norm": math.inf if step == 2 else 0.0})
    saved = [item for item in happened if isinstance(item, tuple)]
    assert saved == [("grpo-1", n) for n in range(save_every, 7, save_every)]
    steps = [item for item in happened if isinstance(item, dict)]
    assert [item["step"] for item in steps if item["no_update"]] == [2]
    for item in saved:
        assert happened[happened.index(item) - 1]["step"] == item[1]


def test_logs_are_cut_to_what_the_checkpoint_knows(tmp_path):
    run = SimpleNamespace(folder=tmp_path, logs=Run.logs)
    metrics = tmp_path / "metrics.jsonl"
    later = tmp_path / "trajectories.jsonl"
    a_users_own = tmp_path / "notes.jsonl"
    metrics.write_text("known\nunknown\n")
    later.write_text("unknown\n")
    a_users_own.write_text("mine\n")
    Run.shorten_logs(run, {"metrics.jsonl": 6})
    assert (metrics.read_text(), later.read_text()) == ("known\n", "")
    assert a_users_own.read_text() == "mine\n"
    for sizes in ({"metrics.jsonl": 7}, {"metrics.jsonl": 6, "gone.jsonl": 1}):
        with pytest.raises(BadInput, match="is shorter than the last checkpoint says"):
            Run.shorten_logs(run, sizes)
    assert metrics.read_text() == "known\n"


class Counter:
    """Something with a state, as an optimizer has."""

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize(
    ("saved", "done"),
    [
        ({}, 0),
        ({"stage": "grpo-1", "step": 4}, 0),
        ({"stage": "ofsd-1", "step": 0}, 0),
        ({"stage": "ofsd-1", "step": 4}, 4),
    ],
)
def test_a_stage_gets_back_what_was_saved_within_it(saved, done):
    """Once: the stages after it begin at their beginning."""
    model = Counter()
    optimizer = Counter()
    saved = {**saved, "model": "weights", "optimizer": "moments"}
    run = SimpleNamespace(model=model, saved=saved, evaluations=[])
    assert Run.begin_stage(run, "ofsd-1", optimizer=optimizer) == done
    assert run.stage_objects == {"optimizer": optimizer}
    assert getattr(model, "state", None) == ("weights" if done else None)
    assert getattr(optimizer, "state", None) == ("moments" if done else None)
    assert Run.begin_stage(run, "ofsd-1", optimizer=optimizer) == 0


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_stage_begins_with_the_table_of_the_tests_so_far(count, capsys):
    """One test is no table: its line has just been printed."""
    tests = []
    for number in range(count):
        test = {"stage": f"grpo-{number}", "em": 0.5, "f1": 0.5, "em_by": {}}
        tests.append({**test, "searches": 1.0, "answered": 1.0, "time_s": 60.0})
    run = SimpleNamespace(saved={}, evaluations=tests)
    Run.begin_stage(run, "ofsd-1")
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "grpo-" in line]
    assert len(rows) == (count if count > 1 else 0)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_each_item_of_an_update_is_the_work_of_one_device(monkeypatch, count):
    monkeypatch.setattr(ranks, "rank_count", lambda: count)
    items = []
    for number in range(count):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        share = ranks.my_share(list("abcdefg"))
        assert 7 // count <= len(share) <= -(-7 // count)
        items += share
    assert sorted(items) == list("abcdefg")


def test_a_stage_is_tested_if_there_is_a_test_of_it():
    run = SimpleNamespace(evaluations=[{"stage": "base"}, {"stage": "grpo-1"}])
    assert Run.tested(run, "grpo-1") and not Run.tested(run, "ofsd-1")


def test_any_weight_and_its_name_count_in_the_checksum():
    model = torch.nn.Linear(3, 2)
    before = checksum(model)
    assert checksum(model) == before
    with torch.no_grad():
        model.bias[1] += 1e-6
    assert checksum(model) != before
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    assert checksum(other) == checksum(model)
    other.scale = torch.nn.Parameter(other.bias.detach().clone())
    del other.bias
    assert checksum(other) != checksum(model)


def test_the_numbers_of_a_step_stand_under_their_names():
    columns = ["loss", "a_rather_long_name", "kl"]
    statistics = {"loss": 0.12345, "a_rather_long_name": 1234567.0, "kl": math.nan}
    heading = step_heading(columns)
    line = step_line(7, statistics, columns, 1.25)
    assert line.split() == ["7", "0.123", "1.23e+06", "nan", "1.2"]
    assert len(line) == len(heading)
    ends = [heading.index(name) + len(name) for name in ("step", *columns)]
    assert all(line[end - 1] != " " and line[end] == " " for end in ends)
