"""experiments/foreign.py: references by an agent, and the form of a policy."""

import gzip
import json
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from eval import exact_match
from experiments import foreign, stages, tables
from experiments.arms import Arm
from grpo import response_logits, token_logprobs
from machinery.json_lines import read_jsonl
from machinery.models import frozen_copy
from machinery.passages import Passage
from machinery.questions import load_questions
from micro.make import CLAUSES, OTHERS, TRAINED
from ofsd import Pair, mine_pairs
from rollout import Trajectory, parse_turn, rollout


@pytest.fixture(scope="module")
def questions():
    return load_questions(str(ROOT / "micro/train.jsonl"))[:30]


def written_by(micro, index, questions, foreign_form):
    _, tokenizer = micro
    return [
        foreign.demonstrate(tokenizer, index, question, k=3, foreign=foreign_form)
        for question in questions
    ]


@pytest.fixture(scope="module")
def agent(micro, micro_index, questions):
    """The foreigner's trajectories."""
    return written_by(micro, micro_index, questions, True)


@pytest.fixture(scope="module")
def expert(micro, micro_index, questions):
    return written_by(micro, micro_index, questions, False)


def test_the_agent_is_always_right_and_searches_once_a_hop(agent, expert, questions):
    for rows in (agent, expert):
        for question, trajectory in zip(questions, rows, strict=True):
            assert exact_match(trajectory.answer, question["golden_answers"]) == 1
            assert len(trajectory.queries) == question["hops"]
            for query, word in zip(trajectory.queries, question["words"], strict=True):
                assert word in query.split()


def test_the_foreigners_turns_are_well_formed_and_in_other_words(agent, micro):
    _, tokenizer = micro
    text = tokenizer.decode(agent[0].response_ids)
    turns = text.split("<information>")
    assert parse_turn(turns[0]) == ("search", agent[0].queries[0])
    assert foreign.share_of_own_thoughts(tokenizer, agent) == 0.0
    assert foreign.share_of_foreign_queries(agent) == 1.0


def test_the_expert_writes_as_the_policy_does(expert, micro, micro_index, questions):
    """Wherever the policy is right on the straight road, to the letter."""
    model, tokenizer = micro
    texts = [question["question"] for question in questions]
    rows = rollout(model, tokenizer, micro_index, texts, seed=0)
    for trajectories in (rows, expert):
        assert foreign.share_of_own_thoughts(tokenizer, trajectories) > 0.98
        assert foreign.share_of_foreign_queries(trajectories) == 0.0
    same = 0
    for row, model_row in zip(rows, expert, strict=True):
        if row.queries == model_row.queries and row.answer == model_row.answer:
            assert row.response_ids == model_row.response_ids
            same += 1
    assert same >= 3


def test_pairs_have_the_agents_reference_and_a_sibling_to_correct(
    micro, micro_index, agent, questions
):
    model, tokenizer = micro
    texts = [question["question"] for question in questions]
    rows = rollout(model, tokenizer, micro_index, texts, group_size=3, seed=0)
    groups = stages.groups_of(rows, 3)
    pool = foreign.with_demonstrations(groups, agent)
    assert pool[0] is agent[0] and pool[4] is agent[1] and pool[1:4] == rows[:3]
    owners = [question for question in questions for _ in range(4)]
    rewards = [
        exact_match(row.answer, owner["golden_answers"])
        for owner, row in zip(owners, pool, strict=True)
    ]
    pairs, _ = mine_pairs(model, tokenizer, questions, pool, rewards, 500)
    pairs = foreign.from_demonstrations(pairs, agent)
    # The agent is right everywhere, so nearly each question has a pair.
    assert len(pairs) > 20
    for pair in pairs:
        assert any(pair.reference is trajectory for trajectory in agent)
        assert any(pair.student is row for row in rows)
        shown = tokenizer.decode(pair.prompt)
        assert pair.reference.queries[0] in shown


FACTS = {
    "question": "?",
    "golden_answers": ["C"],
    "path": ["A", "B", "C"],
    "words": ["warded", "backed"],
}
FIRST = Passage("", "A", "A is warded by B.")
SECOND = Passage("", "B", "B is backed by C.")
STRANGE = Passage("", "A", "A is helmed by D.")


def student(*observations: list[Passage]) -> Trajectory:
    """Two tokens of the policy before each observation, and two after the last."""
    trajectory = Trajectory("?", [])
    for passages in observations:
        trajectory.extend([1, 2], [0.0, 0.0])
        trajectory.extend([3])
        trajectory.passages.append(passages)
    trajectory.extend([1, 2], [0.0, 0.0])
    return trajectory


@pytest.mark.parametrize(
    ("observations", "right"),
    [
        ([], 2),
        ([[FIRST], [SECOND]], 6),
        ([[STRANGE, FIRST], [SECOND, STRANGE]], 6),
        ([[FIRST], [FIRST], [SECOND]], 8),  # again the same
        ([[STRANGE], [FIRST]], 2),  # from the first wrong search on
        ([[SECOND], [FIRST]], 2),  # in the wrong order
        ([[FIRST], [STRANGE], [SECOND]], 4),
    ],
)
def test_a_prefix_is_right_until_a_search_shows_nothing_of_the_path(
    observations, right
):
    trajectory = student(*observations)
    written = sum(trajectory.loss_mask)
    assert foreign.right_tokens(FACTS, trajectory) == (right, written)
    pair = Pair(FACTS, trajectory, trajectory, [], [])
    assert foreign.right_share([pair, pair]) == right / written


def test_the_form_counts_samples_and_measures_how_far_the_policy_moved(
    micro, micro_index, questions
):
    model, tokenizer = micro
    texts = [question["question"] for question in questions[:2]]
    rows = rollout(
        model, tokenizer, micro_index, texts, group_size=foreign.SAMPLES, seed=0
    )
    for row in rows:
        row.answer = None
    rows[7].answer = questions[1]["golden_answers"][0]
    other = frozen_copy(model)
    for parameter in other.parameters():
        parameter.mul_(0.98)
    form = foreign.form_of(model, other, tokenizer, questions[:2], rows)
    assert (form.em_sampled, form.em_best, form.answered) == (0.1, 0.5, 0.1)
    assert foreign.divergence(model, model, rows) == 0.0
    differences = []
    for row in rows:
        mask = torch.tensor(row.loss_mask) == 1
        ids = torch.tensor(row.response_ids)
        with torch.no_grad():
            ours = token_logprobs(response_logits(model, row), ids)[mask]
            theirs = token_logprobs(response_logits(other, row), ids)[mask]
        differences += (ours - theirs).tolist()
    expected = sum(differences) / len(differences)
    assert expected > 0.0
    found = foreign.divergence(model, other, rows)
    assert found == pytest.approx(expected, rel=1e-3)
    one_each = [rows[0], rows[foreign.SAMPLES]]
    assert form.kl_to_start == foreign.divergence(model, other, one_each) != found


def test_em_by_half_and_the_halves():
    assert set(TRAINED) | set(OTHERS) == set(CLAUSES)
    assert len(TRAINED) == len(OTHERS) == 10
    rows = [
        {"chain": TRAINED[:2], "golden_answers": ["x"]},
        {"chain": OTHERS[:1], "golden_answers": ["x"]},
        {"chain": TRAINED[:1], "golden_answers": ["y"]},
    ]
    answers = [Trajectory("?", [], answer="x") for _ in rows]
    expected = {"trained": 0.5, "others": 1.0}
    assert foreign.em_by_half(rows, answers) == expected


@pytest.mark.parametrize("kind", ["ofsd", "rft"])
def test_a_stage_with_foreign_references_counts_their_price_apart(
    kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro").symlink_to(ROOT / "micro")
    monkeypatch.setattr(stages, "SHOWN", 4)
    start = stages.CountedRun.__init__

    def start_with_few(self, *arguments):
        start(self, *arguments)
        self.test_set = self.test_set[:4]

    monkeypatch.setattr(stages.CountedRun, "__init__", start_with_few)
    arm = Arm(
        f"{kind}, grpo",
        ofsd_questions=6,
        ofsd_epochs=1,
        budget=2_000,
        references="foreign",
        questions="evidence-retention-train",
    )
    run = stages.run_arm("foreign/x-1", arm, 1, "retention")
    rows = list(read_jsonl(stages.result_of("foreign/x-1")))
    (mined,) = [row for row in rows if row["kind"] == "mining"]
    assert mined["price"] > 0 and mined["pairs"] > 0
    if kind == "rft":
        assert mined["cost"] == 0  # no pool was sampled
        assert mined["pairs"] == 6
    else:
        assert 0 < mined["right_share"] <= 1
        assert mined["own_reference"] >= 0
    forms = [row for row in rows if row["kind"] == "form"]
    assert forms[-1]["cost"] == run.cost
    tests = [row for row in rows if row["kind"] == "eval"]
    assert tests[-1]["em_by_half"].keys() == {"trained", "others"}
    allowed = set(TRAINED)
    assert all(set(row["chain"]) <= allowed for row in run.train_set)


def test_looking_at_the_form_leaves_no_trace(micro, micro_index, questions):
    model, tokenizer = micro
    run = SimpleNamespace(
        model=model,
        start=model,
        tokenizer=tokenizer,
        cost=7,
        rng=random.Random(0),
        idle_s=0.0,
        test_set=questions[:2],
    )
    logged = []

    def sample(questions, group_size):
        run.cost += 100
        run.rng.random()
        texts = [question["question"] for question in questions]
        return rollout(
            model, tokenizer, micro_index, texts, group_size=group_size, seed=0
        )

    run.sample = sample
    run.aside = partial(stages.CountedRun.aside, run)
    run.log = lambda kind, stage, **values: logged.append((kind, stage, values))
    stages.CountedRun.look_at_form(run, "grpo-2")
    assert run.cost == 7 and run.rng.random() == random.Random(0).random()
    assert logged[0][:2] == ("form", "grpo-2")
    assert logged[0][2].keys() == set(foreign.Form._fields)


# ---------------------------------------------------------------- tables and verdicts


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.10, 0.12, 0.11], "yes"),
        ([-0.10, -0.12, -0.11], "no"),
        ([0.001, -0.002, 0.001], "no"),  # within .03 of 0
        ([0.3, -0.3, 0.1], "open"),
        ([0.02, 0.02, 0.021], "yes"),  # within .03, but surely above 0
    ],
)
def test_a_verdict_is_yes_no_or_open(values, verdict):
    assert tables.verdict_of_change(values) == verdict
    assert tables.verdict_of_area(values, [0.0, 0.0, 0.0]) == verdict


def test_a_larger_area_is_no_yes_where_final_em_is_surely_smaller():
    areas = [0.10, 0.12, 0.11]
    assert tables.verdict_of_area(areas, [-0.1, -0.11, -0.12]) == "open"


def run_rows(
    seed: int, stage: str, ems: list[tuple[float, float]], price: int = 0
) -> list[dict]:
    """A run's result: at the base, after its offline stage, and at the end; each time
    EM on the trained relations and on the others."""
    rows = [{"kind": "run", "arm": {"budget": 100}, "seed": seed, "cost": 0}]
    moments = [("base", 0), (stage, 40), ("grpo-2", 100)]
    for number, ((name, cost), (trained, others)) in enumerate(
        zip(moments, ems, strict=True)
    ):
        if number == 1:
            rows.append({"kind": "mining", "stage": stage, "cost": 20, "price": price})
        test = {"kind": "eval", "stage": name, "cost": cost, "searches": 2.0}
        halves = {"trained": trained, "others": others}
        test |= {"em": (trained + others) / 2, "em_by_half": halves, "leak": 0.0}
        rows.append(test | {"work_s": 1.0})
        if number > 0:
            form = {"em_sampled": 0.5, "em_best": 0.75, "answered": 1.0}
            form |= {"own_thoughts": 1 / number, "foreign_queries": 0.0}
            form |= {"kl_to_start": 0.1, "work_s": 1.0}
            rows.append({"kind": "form", "stage": name, "cost": cost, **form})
    return rows


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two seeds of the five arms, in a part of the name x."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    folder = tmp_path / "evidence/x"
    folder.mkdir(parents=True)
    ends = {
        "grpo": 0.5,
        "search-e1": 0.6,
        "rft": 0.7,
        "search-e1-foreign": 0.8,
        "rft-foreign": 0.4,
    }
    for arm, end in ends.items():
        for seed in (1, 2):
            # One begins with GRPO, so its offline stage is the second.
            stage = "rft-2" if "rft" in arm else "ofsd-1"
            stage = "grpo-1" if arm == "grpo" else stage
            ems = [(0.4, 0.4), (0.5, end), (0.6, end + 0.01 * seed)]
            rows = run_rows(seed, stage, ems, price=10 if "foreign" in arm else 0)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            path = folder / f"{arm}-{seed}.jsonl.gz"
            path.write_bytes(gzip.compress(text.encode()))
    return folder


def test_writing_foreign_references_can_be_charged(results):
    run = tables.read_part("x")["rft-foreign"][1]
    priced = tables.with_price(run)
    assert [row["cost"] for row in priced] == [0, 0, 30, 50, 50, 110, 110]
    assert tables.final_em(priced) < tables.final_em(run)
    own = tables.read_part("x")["rft"][1]
    assert tables.with_price(own) == own
    assert "rft-foreign" in tables.priced_comparison("x")


def test_the_tables_of_the_two_questions(results):
    verdicts = tables.agent_verdicts("x")
    assert "| search-e1-foreign to rft-foreign | +0." in verdicts
    assert verdicts.count("yes") >= 2
    assert "expert" not in verdicts  # these arms have not run
    forms = tables.forms("x")
    assert forms.count("after the stage") == 4 and forms.count("| end |") == 5
    retention = tables.retention("x")
    assert "| grpo | others | 0.400 |  | +0.115" in retention
    assert "| search-e1-foreign | others | 0.400 | +0.400" in retention
    assert "search-e1 to rft, change on the others, stage: -0.100" in retention
    changes = "search-e1-foreign to rft-foreign, change on the others"
    assert f"{changes}, end: +0.400 ± 0.000: yes" in retention


def test_the_figure_of_retention_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    tables.draw_retention("x")
    assert (tmp_path / "evidence-x.png").read_bytes().startswith(b"\x89PNG")
