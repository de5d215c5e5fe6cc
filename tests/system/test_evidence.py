"""results/: the cost that is counted, the arms, what only the ablations need, and the arithmetic
of the tables."""

import json
import random
import sys
from types import SimpleNamespace

import evidence
import mechanism
import pytest
import tables
import torch
from conftest import ROOT

import grpo
import ofsd
import train
from eval import load_questions
from ofsd import Pair, mine_pair, privileged_prompt
from rollout import Trajectory, decode, encode, rollout


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


@pytest.mark.parametrize("kind", ["ofsd", "rft"])
def test_cost_is_the_tokens_that_the_models_saw(here, quick, monkeypatch, kind):
    """Counted a second time, inside: what rollout returned, and what policy_hidden was given."""
    seen = {"sampled": 0, "forward": 0}
    sample, hidden, paused = train.rollout, evidence.policy_hidden, []
    start, by_kind, made = [None], evidence.kl_by_kind, evidence.frozen_copy

    def sampled(model, tokenizer, retriever, questions, **how):
        rows = sample(model, tokenizer, retriever, questions, **how)
        if how.get("temperature") != 0.0 and how.get("progress") != "control":
            seen["sampled"] += sum(len(t.response_ids) for t in rows)
            seen["sampled"] += sum(len(t.prompt_ids) for t in rows[:: how.get("group_size", 1)])
        return rows

    def policy_hidden(model, trajectories, prompts=None):
        if start[0] and not paused and model is not start[0]:  # before that a run begins
            read = [*(prompts or [t.prompt_ids for t in trajectories])]
            read += [t.response_ids for t in trajectories]
            seen["forward"] += (3 if torch.is_grad_enabled() else 1) * sum(map(len, read))
        return hidden(model, trajectories, prompts)

    def kl_by_kind(*args):
        paused.append(1)
        try:
            return by_kind(*args)
        finally:
            paused.pop()

    def reference_policy(model):
        start[0] = made(model)
        return start[0]

    monkeypatch.setattr(train, "rollout", sampled)
    monkeypatch.setattr(train, "frozen_copy", reference_policy)  # it serves kl, a statistic
    for module in (ofsd, grpo, evidence):
        monkeypatch.setattr(module, "policy_hidden", policy_hidden)
    monkeypatch.setattr(evidence, "kl_by_kind", kl_by_kind)
    settings = dict(ofsd_questions=12, ofsd_epochs=1, questions_per_step=8, budget=30_000)
    arm = evidence.Arm(f"grpo 1, {kind}, grpo", **settings)
    run = evidence.run_arm("x/y-7", arm, 7, "validation")
    kept, rows = rows_of(here / "evidence/x/y-7.jsonl"), rows_of(run.folder / "metrics.jsonl")
    assert kept == [row for row in rows if row["kind"] != "step"]
    assert run.cost == rows[-1]["cost"] == seen["sampled"] + seen["forward"] >= 30_000
    assert any(row["stage"] == f"{kind}-2" and row["kind"] == "step" for row in rows)
    # Where no group has variance, the one pass is for statistics, and costs nothing.
    assert all(row.get("zero_var", 0) < 1 for row in rows)


def test_a_test_leaves_no_trace_in_what_is_drawn_later(here, quick):
    arm = evidence.Arm("grpo", questions_per_step=2, budget=100)
    run = evidence.Counted(arm, "x/y-7", 7, "validation")
    before, cost = run.rng.getstate(), run.cost
    run.test("base")
    assert run.rng.getstate() == before and run.cost == cost
    assert {"em", "leak", "cost", "work_s"} <= rows_of(run.folder / "metrics.jsonl")[-1].keys()


def test_a_finished_run_is_not_run_again(here, quick, monkeypatch, capsys):
    arm = evidence.Arm("grpo", questions_per_step=2, budget=100)
    plan = [(evidence.run_arm, "x/y-7", arm, 7, "validation")]
    monkeypatch.setattr(evidence, "PARTS", {"tune": plan})
    monkeypatch.setattr(sys, "argv", ["evidence.py", "tune"])
    monkeypatch.setattr(evidence, "ROOT", here)
    evidence.main()
    assert capsys.readouterr().out.startswith("x/y-7")
    evidence.main()
    assert capsys.readouterr().out == ""


def trajectory(answer, searches, name=""):
    return Trajectory(name, [1], queries=[f"{name} {i}" for i in range(searches)], answer=answer)


QUESTION = {"id": "q", "question": "?", "golden_answers": ["yes"]}


def test_random_reference_and_random_student_are_drawn_from_all_that_there_are():
    said = [("yes", 1, "a"), ("yes", 2, "b"), ("no", 1, "c"), ("no", 3, "d"), ("yes", 3, "e")]
    group, found = [trajectory(*how) for how in said], {"reference": set(), "student": set()}
    config = SimpleNamespace(group_size=5)
    for seed in range(40):
        run = SimpleNamespace(config=config, rng=random.Random(seed))
        for what, place in (("reference", 0), ("student", 1)):
            pool = evidence.altered(run, [QUESTION], group, {what: "random"})
            rewards = evidence.rewards_of([QUESTION], pool)
            found[what].add(mine_pair(pool, rewards)[place].question)
    assert found == {"reference": {"a", "b", "e"}, "student": {"b", "c", "d", "e"}}
    assert evidence.altered(SimpleNamespace(config=config), [QUESTION], group, {}) == group
    assert [t.question for t in evidence.references([QUESTION], group, 5)] == ["a"]


def test_the_reference_here_is_that_of_mine_pair():
    draw, mined = random.Random(0), 0
    for _ in range(200):
        group = [trajectory("yes", draw.randrange(4), str(i)) for i in range(5)]
        rewards = [float(draw.random() < 0.4) for _ in group]
        best = evidence.reference_index(group, rewards)
        if pair := mine_pair(group, rewards):
            mined += 1
            assert group[best] is pair[0]
        assert (best is None) == (not any(rewards))
    assert mined > 100


def test_more_students_of_a_question_are_all_different_and_its_reference_is_one(micro, micro_index):
    model, tokenizer = micro
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:6]
    pool = rollout(*micro, micro_index, [q["question"] for q in questions], group_size=5, seed=0)
    config = SimpleNamespace(group_size=5, max_privileged_tokens=500)
    found = {}
    for students in (1, 3):
        arm = SimpleNamespace(students=students)
        run = SimpleNamespace(config=config, arm=arm, model=model, tokenizer=tokenizer)
        found[students], counts = evidence.mine_more(run, questions, pool)
        assert counts["pairs"] == len(found[students])
    one, three = found[1], found[3]
    assert three[: len(one)] == one and len(one) < len(three) <= 3 * len(one)
    for pair in one:
        of_question = [other for other in three if other.question is pair.question]
        assert {id(other.reference) for other in of_question} == {id(pair.reference)}
        assert len({id(other.student) for other in of_question}) == len(of_question) <= 3
        assert all(other.student is not pair.reference for other in of_question)
    by_id = lambda pairs: sorted(pairs, key=lambda pair: pair.question["id"])  # noqa: E731
    assert by_id(evidence.one_each(three)) == by_id(one)


def test_the_query_mask_holds_the_queries_and_nothing_else(micro, micro_index):
    model, tokenizer = micro
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:6]
    rows = rollout(*micro, micro_index, [q["question"] for q in questions], seed=0)
    assert sum(len(row.queries) for row in rows) > 6
    for row in rows:
        mask = evidence.query_mask(tokenizer, row)
        assert len(mask) == len(row.loss_mask)
        assert all(m <= sampled for m, sampled in zip(mask, row.loss_mask))
        kept = decode(tokenizer, [token for token, m in zip(row.response_ids, mask) if m])
        assert kept.split() == " ".join(row.queries).split()


@pytest.fixture
def reference(micro, micro_index):
    """A trajectory of micro/model that searched twice and answered."""
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:20]
    rows = rollout(*micro, micro_index, [q["question"] for q in questions], seed=0)
    return next(row for row in rows if row.answer and len(row.queries) == 2)


def test_the_teacher_may_read_only_queries_and_answer(tokenizer, reference):
    whole = decode(tokenizer, privileged_prompt(tokenizer, "Who?", reference, 1000))
    shown = evidence.queries_only(tokenizer, reference)
    short = decode(tokenizer, privileged_prompt(tokenizer, "Who?", shown, 1000))
    assert "<information>" in whole and "<think>" in whole
    assert "<information>" not in short and "<think>" not in short
    for query in reference.queries:
        assert f"<search> {query} </search>" in short
    assert f"<answer> {reference.answer} </answer>" in short and short.startswith(whole[:20])
    assert privileged_prompt(tokenizer, "Who?", shown, 10) is None  # nothing in it can be cut


def test_a_condition_changes_what_it_names_and_nothing_else(tokenizer, reference):
    """From one pair: the prompt of another's reference, of the queries, or a narrower mask."""
    names = "Who is Ada?", "Who is Bob?", "Who is Cy?"
    others = [Trajectory(name, [1], answer=name) for name in names]
    for other in others:
        ids = encode(tokenizer, f"<answer> {other.answer} </answer>")
        other.extend(ids, [0.0] * len(ids))
    whole = privileged_prompt(tokenizer, "Who?", reference, 1000)
    pair = Pair({"id": "q", "question": "Who?"}, reference, reference, whole, [1.0])
    pairs = [pair] + [Pair({"id": t.question}, t, t, [], [1.0]) for t in others]
    config = SimpleNamespace(max_privileged_tokens=1000)
    run = SimpleNamespace(config=config, tokenizer=tokenizer, rng=random.Random(0))
    same = lambda a, b: all(x == y for x, y in zip(a, b))  # noqa: E731
    assert evidence.conditioned(run, pair, {"clip": "entry"}, pairs) == pair
    drawn = set()
    for _ in range(30):
        shuffled = evidence.conditioned(run, pair, {"reference": "shuffled"}, pairs)
        assert same(shuffled._replace(prompt=whole), pair)
        drawn.add(tuple(shuffled.prompt))
    assert drawn == {tuple(privileged_prompt(tokenizer, "Who?", t, 1000)) for t in others}
    reads = evidence.conditioned(run, pair, {"reads": "queries"}, pairs)
    shown = evidence.queries_only(tokenizer, reference)
    assert reads.prompt == privileged_prompt(tokenizer, "Who?", shown, 1000) != whole
    assert same(reads._replace(prompt=whole), pair)
    nothing = evidence.conditioned(run, pair, {"reference": "none"}, pairs)
    assert nothing.prompt == pair.student.prompt_ids and same(nothing._replace(prompt=whole), pair)
    narrow = evidence.conditioned(run, pair, {"tokens": "queries"}, pairs)
    assert narrow.student.loss_mask == evidence.query_mask(tokenizer, reference)
    assert narrow.prompt == whole and narrow.reference is reference
    assert sum(reference.loss_mask) > sum(narrow.student.loss_mask) > 0  # the pair's own is whole


def test_fine_tuning_is_the_cross_entropy_of_the_references(micro, micro_index):
    """Its loss and its gradient, by the plain formula, for any size of the micro-batch."""
    model, tokenizer = micro
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:4]
    batch = rollout(*micro, micro_index, [q["question"] for q in questions], seed=0)
    tuned, losses = grpo.frozen_copy(model).requires_grad_(True), 0.0
    for row in batch:
        logits = grpo.response_logits(tuned, row)  # (T, V)
        logprobs = torch.log_softmax(logits, dim=-1)[range(len(logits)), row.response_ids]  # (T,)
        losses = losses - (logprobs * torch.tensor(row.loss_mask)).sum()
    loss = losses / sum(sum(row.loss_mask) for row in batch)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in tuned.parameters()])
    for size in (1, 3, 100):
        model = grpo.frozen_copy(micro[0]).requires_grad_(True)
        start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        config = SimpleNamespace(micro_batch=size, max_grad_norm=1e9)
        stats = evidence.rft_step(model, torch.optim.SGD(model.parameters(), lr=1.0), batch, config)
        moved = start - torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        assert stats["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
        assert (moved - expected).norm() < 1e-3 * expected.norm()


def test_kinds_of_tokens(tokenizer):
    ids = encode(tokenizer, "<think> I need</think>\n<search> it</search>")
    made = Trajectory("q", [1])
    made.extend(ids, [0.0] * len(ids))
    made.extend(encode(tokenizer, "<information> a <answer> b"))
    ids = encode(tokenizer, "<answer> b</answer>")
    made.extend(ids, [0.0] * len(ids))
    names = evidence.token_kinds(tokenizer, made)
    assert names.count("tag") == 7 and "search" in names
    assert names[:2] == ["tag", "think"]
    assert names[-3:] == ["tag", "answer", "tag"] and len(names) == sum(made.loss_mask)


def test_kinds_of_a_pairs_tokens():
    """As a run logs them: the policy's have a divergence, the environment's have none."""
    text = "<think>| It| is| Bevor| Bridge|.|</think>|\n|<search>| Bevor| Bridge| mayor| warded"
    text += "|</search>|\n<information>| Bevor| Bridge|<answer>| Kegon| Sawyer|</answer>"
    tokens = text.split("|")
    written = tokens.index("\n<information>")
    values = [None if written <= i < written + 3 else 0.5 for i in range(len(tokens))]
    kinds = mechanism.kinds_of({"divergence": [*zip(tokens, values)]}, {"Bevor", "Bridge"})
    thought = ["tag", "thought", "thought", *["name in a thought"] * 2, "thought", "tag", "tag"]
    query = ["tag", *["name in a query"] * 2, "relation in a query", "word searched with", "tag"]
    assert kinds == [*thought, *query, "", "", "", "tag", "answer", "answer", "tag"]
    assert {*kinds} - {""} == {*mechanism.KINDS}


def run_of(points, budget=100):
    arm = {"budget": budget}
    head = [{"kind": "run", "arm": arm, "seed": 0}]
    return head + [{"kind": "eval", "cost": cost, "em": em} for cost, em in points]


def test_area_levels_and_final_of_a_curve():
    rows = run_of([(0, 0.2), (50, 0.6), (50, 0.8), (120, 0.8)])
    assert tables.area(rows) == pytest.approx(0.5 * 0.4 + 0.5 * 0.8, abs=1e-3)
    assert tables.cost_of(rows, 0.5) == pytest.approx(37.5, abs=0.1)
    assert tables.cost_of(rows, 0.9) == float("inf")
    assert tables.final(rows) == pytest.approx(0.8)


def test_the_interval_is_students():
    """Mean 2, standard deviation 1, n 3: 4.303 / sqrt(3) = 2.484."""
    assert tables.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484, abs=1e-3))


def test_every_ablation_runs_and_starts_from_the_same_policy(here, quick, monkeypatch):
    settings = dict(ofsd_questions=12, ofsd_epochs=1, questions_per_step=2, budget=10**9)
    small = evidence.Arm("grpo 1, ofsd", **settings)
    monkeypatch.setattr(evidence, "ABLATED", small)
    evidence.ablations("ablations/7", 7, "validation")
    rows = rows_of(here / "runs/evidence/ablations/7/metrics.jsonl")
    first = {}  # the loss of the first batch of each variant, before any update
    for row in rows:
        if row["kind"] == "step" and row["step"] == 1:
            first[row["stage"]] = row["loss"]
    del first["grpo-1"]
    assert abs(first["no reference"]) < 1e-6  # the teacher reads what the student reads
    tested = {row["stage"] for row in rows if row["kind"] == "eval"}
    assert first.keys() == evidence.ABLATIONS.keys() == tested - {"grpo-1"}
    # These may see the same batch.
    same = {"search-e1", "random reference", "random student", "three students"}
    assert all(first[name] != first["search-e1"] for name in first.keys() - same)
    costs = {row["stage"]: row["cost"] for row in rows if row["kind"] == "mining"}
    assert max(costs.values()) < 2 * min(costs.values())  # none pays for those before it


def test_the_committed_tables_are_those_of_the_committed_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "HERE", tmp_path)
    (tmp_path / "evidence").symlink_to(ROOT / "results/evidence")
    monkeypatch.setattr(tables, "figure", lambda part, title: None)
    tables.main()
    written = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert written == (ROOT / "results/evidence.md").read_text(encoding="utf-8")
    assert written.strip() == capsys.readouterr().out.strip()
