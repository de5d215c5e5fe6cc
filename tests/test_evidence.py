"""results/: the cost that is counted, the arms, and the arithmetic of the tables."""

import json
import sys
from pathlib import Path

import evidence
import pytest
import tables

from rollout import Trajectory, encode

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs and results go to tmp_path; micro/ is where it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro").symlink_to(ROOT / "micro")
    monkeypatch.setattr(evidence, "HERE", tmp_path)
    return tmp_path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def quick(monkeypatch):
    """Four questions to test on."""
    start = evidence.Counted.__init__

    def few(self, *args):
        start(self, *args)
        self.test_set = self.test_set[:4]

    monkeypatch.setattr(evidence.Counted, "__init__", few)
    monkeypatch.setitem(evidence.WORLD, "questions", "micro/train.jsonl")  # with answers to learn from at once


@pytest.mark.parametrize("kind", ["ofsd", "rft"])
def test_cost_is_the_tokens_that_the_models_saw(here, quick, monkeypatch, kind):
    """Counted a second time, inside: what rollout returned, and what policy_hidden was given."""
    import grpo
    import ofsd
    import train

    seen = {"sampled": 0, "forward": 0}
    sample, hidden = train.rollout, evidence.policy_hidden
    paused = []

    def rollout(model, tokenizer, retriever, questions, **how):
        result = sample(model, tokenizer, retriever, questions, **how)
        size = how.get("group_size", 1)
        if how.get("temperature") != 0.0:
            seen["sampled"] += sum(len(t.response_ids) for t in result) + sum(len(t.prompt_ids) for t in result[::size])
        return result

    def policy_hidden(model, trajectories, prompts=None):
        import torch

        if not paused and model is not start[0]:
            read = [*(prompts or [t.prompt_ids for t in trajectories]), *(t.response_ids for t in trajectories)]
            seen["forward"] += (3 if torch.is_grad_enabled() else 1) * sum(map(len, read))
        return hidden(model, trajectories, prompts)

    def kl_by_kind(*args):
        paused.append(1)
        try:
            return by_kind(*args)
        finally:
            paused.pop()

    start, by_kind, made = [None], evidence.kl_by_kind, evidence.frozen_copy

    def run_start(model):
        start[0] = made(model)
        return start[0]

    monkeypatch.setattr(train, "rollout", rollout)
    monkeypatch.setattr(train, "frozen_copy", run_start)  # of the run's start: kl is a statistic
    monkeypatch.setattr(ofsd, "policy_hidden", policy_hidden)
    monkeypatch.setattr(grpo, "policy_hidden", policy_hidden)
    monkeypatch.setattr(evidence, "policy_hidden", policy_hidden)
    monkeypatch.setattr(evidence, "kl_by_kind", kl_by_kind)
    arm = evidence.Arm(f"grpo 1, {kind}, grpo", ofsd_questions=12, ofsd_epochs=1, questions_per_step=8, budget=30_000)
    run = evidence.run_arm("x/y-7", arm, 7, "validation")
    rows = rows_of(here / "evidence/x/y-7.jsonl")
    assert run.cost == rows[-1]["cost"] == seen["sampled"] + seen["forward"] >= 30_000
    assert any(row["stage"] == f"{kind}-2" and row["kind"] == "step" for row in rows)
    assert all(row.get("zero_var", 0) < 1 for row in rows)  # where no group has variance, the pass is for statistics


def test_a_finished_run_is_not_run_again(here, quick, monkeypatch, capsys):
    arm = evidence.Arm("grpo", questions_per_step=2, budget=100)
    monkeypatch.setattr(evidence, "PARTS", {"tune": [(evidence.run_arm, "x/y-7", arm, 7, "validation")]})
    monkeypatch.setattr(sys, "argv", ["evidence.py", "tune"])
    monkeypatch.setattr(evidence, "ROOT", here)
    evidence.main()
    assert capsys.readouterr().out.startswith("x/y-7")
    evidence.main()
    assert capsys.readouterr().out == ""


def trajectory(answer, searches, name=""):
    return Trajectory(name, [1], queries=[f"{name} {i}" for i in range(searches)], answer=answer)


def test_random_reference_and_random_student_are_drawn_from_all_that_there_are(here):
    import random
    from types import SimpleNamespace

    from ofsd import mine_pair

    question = {"id": "q", "question": "?", "golden_answers": ["yes"]}
    group = [trajectory("yes", 1, "a"), trajectory("yes", 2, "b"), trajectory("no", 1, "c"), trajectory("no", 3, "d"), trajectory("yes", 3, "e")]
    config = SimpleNamespace(group_size=5)
    found = {"reference": set(), "student": set()}
    for seed in range(40):
        run = SimpleNamespace(config=config, rng=random.Random(seed))
        for what, place in (("reference", 0), ("student", 1)):
            pool = evidence.altered(run, [question], group, {what: "random"})
            rewards = evidence.rewards_of([question], pool)
            found[what].add(mine_pair(pool, rewards)[place].question)
    assert found == {"reference": {"a", "b", "e"}, "student": {"b", "c", "d", "e"}}
    assert evidence.altered(SimpleNamespace(config=config), [question], group, {}) == group
    assert [t.question for t in evidence.references([question], group, 5)] == ["a"]


def test_kinds_of_tokens(tokenizer):
    ids = encode(tokenizer, "<think> I need</think>\n<search> it</search>")
    made = Trajectory("q", [1])
    made.extend(ids, [0.0] * len(ids))
    made.extend(encode(tokenizer, "<information> a <answer> b"))
    ids = encode(tokenizer, "<answer> b</answer>")
    made.extend(ids, [0.0] * len(ids))
    names = [kind for kind in evidence.token_kinds(tokenizer, made)]
    assert names.count("tag") == 7 and names[0] == "tag" and names[1] == "think" and "search" in names
    assert names[-3:] == ["tag", "answer", "tag"] and len(names) == sum(made.loss_mask)


def run_of(points, budget=100):
    arm = {"budget": budget}
    return [{"kind": "run", "arm": arm, "seed": 0}] + [{"kind": "eval", "cost": c, "em": e} for c, e in points]


def test_area_levels_and_final_of_a_curve():
    rows = run_of([(0, 0.2), (50, 0.6), (50, 0.8), (120, 0.8)])
    assert tables.area(rows) == pytest.approx(0.5 * 0.4 + 0.5 * 0.8, abs=1e-3)
    assert tables.cost_of(rows, 0.5) == pytest.approx(37.5, abs=0.1) and tables.cost_of(rows, 0.9) == float("inf")
    assert tables.final(rows) == pytest.approx(0.8)


def test_the_interval_is_students():
    """Mean 2, standard deviation 1, n 3: 4.303 / sqrt(3) = 2.484."""
    assert tables.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484, abs=1e-3))


def test_every_ablation_runs_and_starts_from_the_same_policy(here, quick, monkeypatch):
    small = evidence.Arm("grpo 1, ofsd", ofsd_questions=12, ofsd_epochs=1, questions_per_step=2, budget=10**9)
    monkeypatch.setattr(evidence, "ABLATED", small)
    evidence.ablations("ablations/7", 7, "validation")
    rows = rows_of(here / "evidence/ablations/7.jsonl")
    first = {}  # the loss of the first batch of each variant, before any update
    for row in rows:
        if row["kind"] == "step" and row["step"] == 1:
            first[row["stage"]] = row["loss"]
    del first["grpo-1"]
    assert first.keys() == evidence.ABLATIONS.keys() == {row["stage"] for row in rows if row["kind"] == "eval"} - {"grpo-1"}
    same = {"search-e1", "random reference", "random student", "three students"}  # may see the same batch
    assert all(first[name] != first["search-e1"] for name in first.keys() - same)
    costs = {row["stage"]: row["cost"] for row in rows if row["kind"] == "mining"}
    assert max(costs.values()) < 2 * min(costs.values())  # none pays for those before it
