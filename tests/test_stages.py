"""train.py, stage by stage, with stand-ins for the run and for the updates: which
learning rate, which questions, which pairs in which order. Real stages are in
test_train.py."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

import train as train_module
from grpo import response_logits
from ofsd import Pair
from rollout import Trajectory

QUESTION = {"id": "0", "question": "Who?", "golden_answers": ["a b"]}


@pytest.fixture
def grpo_steps_of(monkeypatch, random_model):
    """grpo_steps_of(config, round_number, done): play a stage of GRPO of which so many
    steps are done, with updates that train nothing. Returns the learning rate of each
    update, what was logged of each step, and the settings of each update."""

    def play(config, round_number, done=0):
        rates = []
        logged = []
        used = []

        def sample(questions, *, group_size, progress):
            return [Trajectory("Who?", [1])] * (len(questions) * group_size)

        def update(model, optimizer, trajectories, rewards, **settings):
            assert rewards.shape == (config.questions_per_step, config.group_size)
            rates.append(optimizer.param_groups[0]["lr"])
            used.append(settings)
            statistics = dict.fromkeys([*train_module.COLUMNS, "kl"], 0.0)
            statistics["logprob_gap"] = statistics["grad_norm"] = float(len(rates))
            return statistics

        monkeypatch.setattr(train_module, "grpo_step", update)
        run = SimpleNamespace(
            config=config,
            model=random_model,
            ref_model="pi_ref",
            begin_stage=lambda stage, **objects: done,
            next_questions=lambda count: [QUESTION] * count,
            sample=sample,
            log_group=lambda stage, step, *group: None,
            end_step=lambda *step: logged.append(step),
        )
        train_module.grpo_stage(run, round_number)
        return rates, logged, used

    return play


def test_grpos_learning_rate_falls_from_step_to_step_and_the_last_one_still_trains(
    grpo_steps_of,
):
    """Six steps in two rounds: the first has all of the rate, the last a sixth."""
    config = replace(SMALL, rounds=2, grpo_steps=3, grpo_lr=6e-3)
    first, *_ = grpo_steps_of(config, round_number=1)
    second, *_ = grpo_steps_of(config, round_number=2)
    assert first + second == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])
    # A run that is resumed goes on where it was.
    rest, logged, _ = grpo_steps_of(config, round_number=2, done=2)
    assert rest == pytest.approx([1e-3])
    assert [step[:2] for step in logged] == [("grpo-2", 3)]


def test_a_step_of_several_updates_logs_the_first_gap_and_the_mean_norm(grpo_steps_of):
    """All its updates have the same learning rate."""
    config = replace(SMALL, grpo_steps=2, updates=3)
    rates, logged, _ = grpo_steps_of(config, round_number=1)
    assert rates == pytest.approx([1e-4] * 3 + [5e-5] * 3)
    statistics = [step[2] for step in logged]
    assert [row["logprob_gap"] for row in statistics] == [1.0, 4.0]
    assert [row["grad_norm"] for row in statistics] == [2.0, 5.0]


def test_an_update_of_grpo_obeys_the_settings(grpo_steps_of):
    settings = {
        "clip_eps": 0.3,
        "kl_coef": 0.01,
        "norm": "dr_grpo",
        "micro_batch": 7,
        "max_grad_norm": 2.5,
    }
    config = replace(SMALL, **settings, max_tokens=99, grpo_steps=1)
    _, _, used = grpo_steps_of(config, round_number=1)
    assert used == [{**settings, "max_len": 99, "ref_model": "pi_ref"}]


def test_an_optimizer_takes_what_is_trained_and_lets_no_weight_decay(random_model):
    parameters = list(random_model.parameters())
    parameters[0].requires_grad_(False)
    optimizer = train_module.new_optimizer(random_model, 0.25)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in parameters[1:]]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0)


def test_the_teacher_stays_the_policy_that_ofsd_began_with(monkeypatch, random_model):
    """The student moves in each update, and the settings are those of the run."""
    before = probe_of(random_model)
    taught = []
    ended = []

    def update(model, teacher, optimizer, pairs, **settings):
        taught.append((pairs, settings))
        assert torch.equal(probe_of(teacher), before)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
        assert optimizer.param_groups[0]["lr"] == 0.02
        return {"loss": 0.0, "grad_norm": 1.0}

    monkeypatch.setattr(train_module, "ofsd_step", update)
    settings = {
        "clip": "entry",
        "tau": 0.3,
        "micro_batch": 7,
        "max_grad_norm": 2.5,
    }
    run = SimpleNamespace(
        config=replace(SMALL, **settings, divergence="jsd", ofsd_lr=0.02),
        model=random_model,
        begin_stage=lambda stage, **objects: 1,
        end_step=lambda stage, step, statistics: ended.append((stage, step)),
    )
    train_module.distil(run, "ofsd-1", [["done"], ["a", "b"], ["c"]])
    assert taught == [
        (["a", "b"], {**settings, "kind": "jsd"}),
        (["c"], {**settings, "kind": "jsd"}),
    ]
    assert ended == [("ofsd-1", 2), ("ofsd-1", 3)]
    assert not torch.equal(probe_of(random_model), before)


def probe_of(model):
    with torch.no_grad():
        return response_logits(model, Trajectory("", [5, 6], [7, 8]))


@pytest.fixture
def mined(monkeypatch):
    """mined(**settings): what a stage of OFSD mines where there are ten pairs, and the
    training questions that it sampled."""

    def mine(seed=0, **settings):
        asked = []

        def sample(questions, *, group_size, progress):
            asked.extend(questions)
            return [Trajectory("Who?", [1])] * (len(questions) * group_size)

        def mine_pairs(model, tokenizer, questions, pool, rewards, longest, students):
            assert len(pool) == len(rewards) == len(questions) * SMALL.group_size
            return [SimpleNamespace(number=number) for number in range(10)], {}

        edges = {"edge": 0.1, "edge_supported": 0.1, "edge_control": 0.0}
        monkeypatch.setattr(train_module, "mine_pairs", mine_pairs)
        monkeypatch.setattr(train_module, "first_pairs", list)
        monkeypatch.setattr(train_module, "teacher_edge", lambda run, pairs: edges)
        run = SimpleNamespace(
            config=replace(SMALL, **{"force_ofsd": False, **settings}),
            model=None,
            tokenizer=None,
            rng=random.Random(seed),
            train_set=[{**QUESTION, "id": str(number)} for number in range(20)],
            sample=sample,
            log=lambda *line, **metrics: None,
            log_pairs=lambda stage, pairs: None,
        )
        mined = train_module.mine_stage(run, "ofsd-1")
        assert mined["edges"] == edges
        return mined["batches"], [int(question["id"]) for question in asked]

    return mine


def test_each_pass_of_ofsd_takes_all_pairs_in_an_order_of_its_own(mined):
    batches, _ = mined(ofsd_epochs=3, ofsd_batch=4)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    orders = []
    for first in (0, 3, 6):
        passed = batches[first] + batches[first + 1] + batches[first + 2]
        orders.append([pair.number for pair in passed])
    assert all(sorted(order) == list(range(10)) for order in orders)
    distinct = {tuple(order) for order in [*orders, list(range(10))]}
    assert len(distinct) == 4
    # The orders come from the run's own random state.
    assert mined(ofsd_epochs=3, ofsd_batch=4)[0] == batches
    assert mined(seed=1, ofsd_epochs=3, ofsd_batch=4)[0] != batches


@pytest.mark.parametrize(("wanted", "count"), [(7, 7), (0, 20), (50, 20)])
def test_ofsd_samples_as_many_questions_as_it_is_told_each_once(mined, wanted, count):
    """0: all that there are, and there may be fewer than that."""
    _, asked = mined(ofsd_questions=wanted)
    assert len(asked) == len(set(asked)) == count
    assert asked != sorted(asked)


def test_the_edge_is_measured_on_one_pair_of_a_question():
    """Pairs of one question stand together. Two questions may have the same text."""
    questions = [dict(QUESTION), dict(QUESTION)]
    pairs = []
    for question, number in ((0, 0), (0, 1), (1, 2), (1, 3), (1, 4)):
        trajectory = Trajectory("Who?", [number])
        pair = Pair(questions[question], trajectory, trajectory, [number], [])
        pairs.append(pair)
    first = train_module.first_pairs(pairs)
    assert [pair.prompt for pair in first] == [[0], [2]]
