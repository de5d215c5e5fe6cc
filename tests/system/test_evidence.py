"""experiments/: the cost that is counted, the arms, what only the ablations need, and
the arithmetic of the tables."""

import gzip
import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_main

import grpo
import ofsd
from experiments import ablations, evidence, mechanism, stages, tables
from experiments.arms import ABLATIONS, CONVERGED, Arm, Variant
from grpo import response_logits
from machinery import run as run_module
from machinery.json_lines import read_jsonl
from machinery.models import frozen_copy
from machinery.questions import load_questions
from machinery.text import decode, encode
from ofsd import Pair, mine_pair, mine_pairs, privileged_prompt
from rollout import Trajectory, rollout
from tools import imitation
from tools.imitation import imitation_step


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs and results go to tmp_path; micro/ is where it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro").symlink_to(ROOT / "micro")
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Four questions to test on."""
    start = stages.CountedRun.__init__

    def start_with_few(self, name, arm, seed, split):
        start(self, name, arm, seed, split)
        self.test_set = self.test_set[:4]

    monkeypatch.setattr(stages.CountedRun, "__init__", start_with_few)


def rows_of(path):
    return list(read_jsonl(path))


def train_questions(count):
    return load_questions(str(ROOT / "micro/train.jsonl"))[:count]


def sampled_by(micro, index, questions, group_size=1):
    """What micro/model says to questions, with seed 0."""
    model, tokenizer = micro
    texts = [question["question"] for question in questions]
    return rollout(model, tokenizer, index, texts, group_size=group_size, seed=0)


# -------------------------------------------------------------------------------- cost


class Meter:
    """Counts the cost a second time, inside: what rollout() returned, and what
    policy_hidden() was given."""

    def __init__(self, monkeypatch):
        self.cost = 0
        self.paused = False
        self.rollout = run_module.rollout
        self.policy_hidden = grpo.policy_hidden
        self.kl_by_kind = stages.kl_by_kind
        monkeypatch.setattr(run_module, "rollout", self.sample)
        for module in (grpo, ofsd, imitation, stages):
            monkeypatch.setattr(module, "policy_hidden", self.forward)
        monkeypatch.setattr(stages, "kl_by_kind", self.statistic)

    def sample(self, *args, **keywords):
        trajectories = self.rollout(*args, **keywords)
        is_test = keywords["temperature"] == 0.0
        if not is_test and keywords["progress"] != "control":
            firsts = trajectories[:: keywords["group_size"]]
            self.cost += sum(len(t.response_ids) for t in trajectories)
            self.cost += sum(len(t.prompt_ids) for t in firsts)
        return trajectories

    def forward(self, model, trajectories, prompts=None):
        if not self.paused:
            factor = 3 if torch.is_grad_enabled() else 1
            read = prompts or [t.prompt_ids for t in trajectories]
            self.cost += factor * sum(len(prompt) for prompt in read)
            self.cost += factor * sum(len(t.response_ids) for t in trajectories)
        return self.policy_hidden(model, trajectories, prompts)

    def statistic(self, *args):
        self.paused = True
        kls = self.kl_by_kind(*args)
        self.paused = False
        return kls


def with_an_edge(teacher_edge):
    """The edge is measured, and the stage goes on whatever it is."""

    def measure(run, pairs):
        edges = teacher_edge(run, pairs)
        edges["edge_supported"] = 1.0
        return edges

    return measure


@pytest.mark.parametrize("kind", ["ofsd", "rft"])
def test_cost_is_the_tokens_that_the_models_saw(here, quick, monkeypatch, kind):
    arm = Arm(
        f"grpo 1, {kind}, grpo",
        ofsd_questions=12,
        ofsd_epochs=1,
        questions_per_step=8,
        budget=30_000,
    )
    meter = Meter(monkeypatch)
    monkeypatch.setattr(stages, "teacher_edge", with_an_edge(stages.teacher_edge))
    run = stages.run_arm("x/y-7", arm, 7, "validation")
    rows = rows_of(run.folder / "metrics.jsonl")
    kept = rows_of(here / "results/evidence/x/y-7.jsonl.gz")
    assert kept == [row for row in rows if row["kind"] != "step"]
    assert run.cost == rows[-1]["cost"] == meter.cost >= 30_000
    assert any(row["stage"] == f"{kind}-2" and row["kind"] == "step" for row in rows)
    # Where no group has variance, the one pass is for statistics, and costs nothing.
    assert all(row.get("zero_var", 0) < 1 for row in rows)


def test_a_test_leaves_no_trace_in_what_is_drawn_later(here, quick):
    arm = Arm("grpo", questions_per_step=2, budget=100)
    run = stages.CountedRun("x/y-7", arm, 7, "validation")
    random_state = run.rng.getstate()
    cost = run.cost
    run.measure("base")
    assert run.rng.getstate() == random_state
    assert run.cost == cost
    last = rows_of(run.folder / "metrics.jsonl")[-1]
    assert {"em", "leak", "cost", "work_s"} <= last.keys()


def test_a_finished_run_is_not_run_again(here, quick, monkeypatch, capsys):
    arm = Arm("grpo", questions_per_step=2, budget=100)
    jobs = evidence.comparison("loop", {"grpo": arm}, [7], "validation")
    monkeypatch.setattr(evidence, "PARTS", {"loop": jobs})
    run_main(monkeypatch, evidence.main, "evidence.py", "loop")
    assert capsys.readouterr().out.startswith("loop/grpo-7")
    run_main(monkeypatch, evidence.main, "evidence.py", "loop")
    assert capsys.readouterr().out == ""


def test_one_arm_of_a_part_runs_alone(here, monkeypatch, capsys):
    """So each working copy runs the arm that its code is for."""
    done = []

    def work(name, arm, seed, split):
        done.append(name)

    arms = {"grpo": Arm("grpo"), "grpo-2": Arm("grpo")}
    planned = evidence.comparison("price", arms, [7, 8], "test")
    jobs = [job._replace(work=work) for job in planned]
    monkeypatch.setattr(evidence, "PARTS", {"price": jobs})
    run_main(monkeypatch, evidence.main, "evidence.py", "price", "--arm", "grpo")
    assert done == ["price/grpo-7", "price/grpo-8"]
    flags = ["price", "--arm", "nobody"]
    run_main(monkeypatch, evidence.main, "evidence.py", *flags, status=2)
    assert "price has no arm of the name nobody" in capsys.readouterr().err


def test_the_workers_share_the_runs_of_a_part(monkeypatch, capsys):
    """Each run is one worker's, and a worker that is none of them is refused."""
    done = []

    def work(name, arm, seed, split):
        done.append(seed)

    jobs = []
    for seed in range(5):
        job = evidence.Job(f"no-result-{seed}", Arm("grpo"), seed, "test", work)
        jobs.append(job)
    monkeypatch.setattr(evidence, "PARTS", {"loop": jobs})
    for worker in (1, 2):
        flags = ["--worker", worker, "--workers", 2]
        run_main(monkeypatch, evidence.main, "evidence.py", "loop", *flags)
    assert done == [0, 2, 4, 1, 3]
    flags = ["--worker", 3, "--workers", 2]
    run_main(monkeypatch, evidence.main, "evidence.py", "loop", *flags, status=2)
    assert "--worker is a number from 1 to --workers" in capsys.readouterr().err


def test_converge_is_done_when_its_policy_is_there_too(here):
    """Git keeps the result, and not the policy that the plateau's arms begin with."""
    (job,) = evidence.PARTS["converge"]
    assert not evidence.is_done(job)
    result = stages.result_of("converge")
    result.parent.mkdir(parents=True)
    result.write_bytes(b"")
    assert not evidence.is_done(job)
    Path(CONVERGED).mkdir(parents=True)
    assert evidence.is_done(job)


def test_every_committed_result_is_a_run_of_the_plan():
    """A part is committed as a whole. The plan of a part stands there before its runs.
    A file tells the arm's settings; the first trials had no clip."""
    tracked = subprocess.run(
        ["git", "ls-files", "results/evidence"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    results = {path for path in tracked if path.endswith(".jsonl.gz")}
    if not results:  # a copy that is no checkout
        pytest.skip("no git")
    for name, jobs in evidence.PARTS.items():
        planned = {f"results/evidence/{job.name}.jsonl.gz": job for job in jobs}
        committed = results & planned.keys()
        assert committed in (set(), set(planned)), name
        results -= committed
        for path in committed:
            head = rows_of(ROOT / path)[0]
            job = planned[path]
            assert (head["seed"], head["split"]) == (job.seed, job.split)
            assert vars(job.arm) == vars(Arm(**head["arm"]))
    assert not results


# ------------------------------------------------------------- the reference, the pairs

QUESTION = {"id": "q", "question": "?", "golden_answers": ["yes"]}


def trajectory(answer, searches, name=""):
    queries = [f"{name} {number}" for number in range(searches)]
    return Trajectory(name, [1], queries=queries, answer=answer)


def run_with(**attributes):
    """What the functions here ask of a run: its settings, its random state, ..."""
    config = SimpleNamespace(group_size=5, max_privileged_tokens=1000, students=1)
    return SimpleNamespace(config=config, **attributes)


def exact_rewards(group):
    return [float(t.answer == "yes") for t in group]


def test_random_reference_and_random_student_are_drawn_from_all_that_there_are():
    group = [
        trajectory("yes", 1, "a"),
        trajectory("yes", 2, "b"),
        trajectory("no", 1, "c"),
        trajectory("no", 3, "d"),
        trajectory("yes", 3, "e"),
    ]
    references = set()
    students = set()
    for seed in range(40):
        run = run_with(rng=random.Random(seed))
        variant = Variant(reference="random")
        pool = ablations.change_pool(run, [QUESTION], group, variant)
        reference, _ = mine_pair(pool, exact_rewards(pool))
        references.add(reference.question)
        variant = Variant(student="random")
        pool = ablations.change_pool(run, [QUESTION], group, variant)
        reference, student = mine_pair(pool, exact_rewards(pool))
        assert reference is group[0]
        students.add(student.question)
    assert references == {"a", "b", "e"}
    assert students == {"b", "c", "d", "e"}

    run = run_with()
    assert ablations.change_pool(run, [QUESTION], group, Variant()) == group
    learned = stages.references_of(run, [QUESTION], group)
    assert [t.question for t in learned] == ["a"]


def test_a_group_without_a_right_answer_is_left_alone():
    group = [trajectory("no", 1, str(number)) for number in range(5)]
    run = run_with(rng=random.Random(0))
    for variant in (Variant(reference="random"), Variant(student="random")):
        assert ablations.change_pool(run, [QUESTION], group, variant) == group


def test_the_reference_here_is_that_of_mine_pair():
    draw = random.Random(0)
    mined = 0
    for _ in range(200):
        group = []
        for number in range(5):
            searches = draw.randrange(4)
            answer = "yes" if draw.random() < 0.4 else "no"
            group.append(trajectory(answer, searches, str(number)))
        rewards = exact_rewards(group)
        reference = stages.reference_in(QUESTION, group)
        pair = mine_pair(group, rewards)
        if pair is not None:
            mined += 1
            assert reference is pair[0]
        assert (reference is None) == (not any(rewards))
    assert mined > 100


def test_an_arm_of_three_students_mines_the_pairs_of_one_and_more(micro, micro_index):
    """That these pairs are the right ones, the tests of mine_pairs show."""
    model, tokenizer = micro
    questions = train_questions(6)
    pool = sampled_by(micro, micro_index, questions, group_size=5)
    pairs_of = {}
    for students in (1, 3):
        run = run_with(model=model, tokenizer=tokenizer)
        run.config.students = students
        pairs_of[students], counts = stages.mine(run, questions, pool)
        assert counts["pairs"] == len(pairs_of[students])
    rewards = [0.0] * len(pool)
    expected, _ = mine_pairs(
        model, tokenizer, questions, pool, rewards, 1000, students=3
    )
    assert [pair.student for pair in pairs_of[3]] == [pair.student for pair in expected]
    assert len(pairs_of[1]) < len(pairs_of[3]) <= 3 * len(pairs_of[1])
    for pair in pairs_of[1]:
        of_question = [p for p in pairs_of[3] if p.question is pair.question]
        students = {id(p.student) for p in of_question}
        assert len(students) == len(of_question) <= 3
        assert {id(p.reference) for p in of_question} == {id(pair.reference)}
        assert all(p.student is not pair.reference for p in of_question)
    assert ofsd_pairs(stages.first_pairs(pairs_of[3])) == ofsd_pairs(pairs_of[1])


def ofsd_pairs(pairs):
    return [(id(pair.reference), id(pair.student), pair.prompt) for pair in pairs]


# ------------------------------------------------------------ what the ablations change


def test_the_query_mask_holds_the_queries_and_nothing_else(micro, micro_index):
    _, tokenizer = micro
    rows = sampled_by(micro, micro_index, train_questions(6))
    assert sum(len(row.queries) for row in rows) > 6
    for row in rows:
        mask = ablations.query_mask(tokenizer, row)
        kept = []
        for token, kept_here, sampled in zip(
            row.response_ids, mask, row.loss_mask, strict=True
        ):
            assert kept_here <= sampled
            if kept_here:
                kept.append(token)
        assert decode(tokenizer, kept).split() == " ".join(row.queries).split()


def test_a_turn_that_answers_or_says_nothing_has_no_query():
    assert ablations.query_place("<answer> x </answer>") == (0, 0)
    assert ablations.query_place("<search> x") == (0, 0)
    text = "<think> <search> </think><search> it </search>"
    begin, end = ablations.query_place(text)
    assert text[begin:end] == " it "


@pytest.fixture
def reference(micro, micro_index):
    """A trajectory of micro/model that searched twice and answered."""
    rows = sampled_by(micro, micro_index, train_questions(20))
    return next(row for row in rows if row.answer and len(row.queries) == 2)


def test_the_teacher_may_read_only_queries_and_answer(tokenizer, reference):
    whole = decode(tokenizer, privileged_prompt(tokenizer, "Who?", reference, 1000))
    shown = ablations.queries_and_answer(tokenizer, reference)
    short = decode(tokenizer, privileged_prompt(tokenizer, "Who?", shown, 1000))
    for tag in ("<information>", "<think>"):
        assert tag in whole
        assert tag not in short
    for query in reference.queries:
        assert f"<search> {query} </search>" in short
    assert f"<answer> {reference.answer} </answer>" in short
    assert short.startswith(whole[:20])
    # Nothing in it can be cut.
    assert privileged_prompt(tokenizer, "Who?", shown, 10) is None


@pytest.fixture
def pairs(tokenizer, reference):
    """Four pairs. The first one's reference is long; the others' is an answer only."""
    prompt = privileged_prompt(tokenizer, "Who?", reference, 1000)
    question = {"id": "q", "question": "Who?"}
    made = [Pair(question, reference, reference, prompt, [1.0])]
    for name in ("Who is Ada?", "Who is Bob?", "Who is Cy?"):
        other = Trajectory(name, [1], answer=name)
        ids = encode(tokenizer, f"<answer> {name} </answer>")
        other.extend(ids, logprobs=[0.0] * len(ids))
        made.append(Pair({"id": name}, other, other, [], [1.0]))
    return made


@pytest.fixture
def run(tokenizer):
    return run_with(tokenizer=tokenizer, rng=random.Random(0))


def test_the_unchanged_pair_is_the_pair(run, pairs):
    assert ablations.change_pair(run, pairs[0], pairs, Variant()) is pairs[0]
    variant = Variant(clip="entry")
    assert ablations.change_pair(run, pairs[0], pairs, variant) is pairs[0]


def test_a_shuffled_reference_is_any_other_question_s_and_only_the_prompt_changes(
    run, pairs, tokenizer
):
    pair = pairs[0]
    drawn = set()
    for _ in range(30):
        variant = Variant(reference="shuffled")
        shuffled = ablations.change_pair(run, pair, pairs, variant)
        assert shuffled._replace(prompt=pair.prompt) == pair
        drawn.add(tuple(shuffled.prompt))
    expected = set()
    for other in pairs[1:]:
        prompt = privileged_prompt(tokenizer, "Who?", other.reference, 1000)
        expected.add(tuple(prompt))
    assert drawn == expected


def test_less_of_a_reference_or_none_changes_only_the_prompt(run, pairs, tokenizer):
    pair = pairs[0]
    reads = ablations.change_pair(run, pair, pairs, Variant(shown="queries"))
    shown = ablations.queries_and_answer(tokenizer, pair.reference)
    assert reads.prompt == privileged_prompt(tokenizer, "Who?", shown, 1000)
    assert reads.prompt != pair.prompt
    assert reads._replace(prompt=pair.prompt) == pair
    blind = ablations.change_pair(run, pair, pairs, Variant(reference="none"))
    assert blind.prompt == pair.student.prompt_ids
    assert blind._replace(prompt=pair.prompt) == pair


def test_a_narrower_mask_changes_only_the_student_of_that_pair(run, pairs, tokenizer):
    pair = pairs[0]
    sampled = sum(pair.student.loss_mask)
    narrow = ablations.change_pair(run, pair, pairs, Variant(tokens="queries"))
    assert narrow.student.loss_mask == ablations.query_mask(tokenizer, pair.student)
    assert narrow._replace(student=pair.student) == pair
    # The pair's own student is left as it was.
    assert sum(pair.student.loss_mask) == sampled > sum(narrow.student.loss_mask) > 0


def test_a_pair_with_nothing_to_learn_is_dropped(run, pairs):
    """A prompt that does not fit, or a student without a query."""
    run.config.max_privileged_tokens = 10
    assert ablations.change_pairs(run, pairs[:1], Variant(shown="queries")) == []
    assert ablations.change_pairs(run, pairs[1:], Variant(tokens="queries")) == []


def test_every_variant_runs_and_starts_from_the_same_policy(here, quick):
    arm = Arm(
        "grpo 1, ofsd",
        ofsd_questions=12,
        ofsd_epochs=1,
        questions_per_step=2,
        budget=10**9,
    )
    ablations.run_ablations("ablations/7", arm, 7, "validation")
    rows = rows_of(here / "runs/evidence/ablations/7/metrics.jsonl")
    first = {}  # the loss of the first batch of each variant, before any update
    costs = []
    tested = set()
    for row in rows:
        if row["kind"] == "step" and row["step"] == 1 and row["stage"] != "grpo-1":
            first[row["stage"]] = row["loss"]
        if row["kind"] == "mining":
            costs.append(row["cost"])
        if row["kind"] == "eval":
            tested.add(row["stage"])
    assert first.keys() == ABLATIONS.keys()
    assert tested == {"grpo-1", *ABLATIONS}
    # This teacher reads what the student reads.
    assert abs(first["no reference"]) < 1e-6
    # These may see the same batch.
    same = {"search-e1", "random reference", "random student", "three students"}
    for variant in first.keys() - same:
        assert first[variant] != first["search-e1"]
    # None pays for those before it.
    assert max(costs) < 2 * min(costs)


# ------------------------------------------------------------------------- fine-tuning


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_fine_tuning_is_the_cross_entropy_of_the_references(micro, micro_index):
    """Its loss and its gradient, by the plain formula, for any size of micro-batch."""
    references = sampled_by(micro, micro_index, train_questions(4))
    model = frozen_copy(micro[0]).requires_grad_(True)
    losses = 0.0
    for row in references:
        logprobs = torch.log_softmax(response_logits(model, row), dim=-1)  # (T, V)
        ids = torch.tensor(row.response_ids)  # (T,)
        chosen = logprobs.gather(1, ids[:, None])[:, 0]  # (T,)
        losses = losses - (chosen * torch.tensor(row.loss_mask)).sum()
    loss = losses / sum(sum(row.loss_mask) for row in references)
    loss.backward()
    expected = flat(parameter.grad for parameter in model.parameters())
    for micro_batch in (1, 3, 100):
        tuned = frozen_copy(micro[0]).requires_grad_(True)
        before = flat(tuned.parameters()).detach()
        optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
        stats = imitation_step(
            tuned,
            optimizer,
            references,
            micro_batch=micro_batch,
            max_grad_norm=1e9,
        )
        moved = before - flat(tuned.parameters()).detach()
        assert stats["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
        assert (moved - expected).norm() < 1e-3 * expected.norm()


# ---------------------------------------------------------------- what a stage changes


def test_kinds_of_tokens(tokenizer):
    made = Trajectory("q", [1])
    ids = encode(tokenizer, "<think> I need</think>\n<search> it</search>")
    made.extend(ids, logprobs=[0.0] * len(ids))
    made.extend(encode(tokenizer, "<information> a <answer> b"))
    ids = encode(tokenizer, "<answer> b</answer>")
    made.extend(ids, logprobs=[0.0] * len(ids))
    kinds = stages.token_kinds(tokenizer, made)
    assert kinds.count("tag") == 7
    assert "search" in kinds
    assert kinds[:2] == ["tag", "think"]
    assert kinds[-3:] == ["tag", "answer", "tag"]
    assert len(kinds) == sum(made.loss_mask)


def test_the_kl_by_kind_is_the_mean_of_the_plain_formula(micro, reference):
    """From a teacher that reads the same, there is none; from one that reads more,
    there is some."""
    model, tokenizer = micro
    prompt = privileged_prompt(tokenizer, reference.question, reference, 1000)
    pair = Pair({"id": "q"}, reference, reference, prompt, [1.0])
    alike = pair._replace(prompt=reference.prompt_ids)
    kls = stages.kl_by_kind(model, model, [alike], tokenizer)
    assert kls.keys() == {"think", "search", "answer", "tag"}
    assert max(kls.values()) == pytest.approx(0.0, abs=1e-6)

    with torch.no_grad():
        student = response_logits(model, reference).log_softmax(-1)  # (T, V)
        privileged = replace(reference, prompt_ids=prompt)
        teacher = response_logits(model, privileged).log_softmax(-1)  # (T, V)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)  # (T,)
    divergence = divergence[torch.tensor(reference.loss_mask).bool()]  # (N,)
    kinds = stages.token_kinds(tokenizer, reference)
    is_query = torch.tensor([kind == "search" for kind in kinds])  # (N,)
    expected = divergence[is_query].mean().item()
    kls = stages.kl_by_kind(model, model, [pair, pair], tokenizer)
    assert kls["search"] == pytest.approx(expected, rel=1e-3)


def test_kinds_of_a_pairs_tokens():
    """As a run logs them: the environment's tokens have no divergence."""
    expected = [
        ("<think>", "tag"),
        (" It", "thought"),
        (" is", "thought"),
        (" Bevor", "name in a thought"),
        (" Bridge", "name in a thought"),
        (".", "thought"),
        ("</think>", "tag"),
        ("\n", "tag"),
        ("<search>", "tag"),
        (" Bevor", "name in a query"),
        (" Bridge", "name in a query"),
        (" mayor", "relation in a query"),
        (" warded", "word searched with"),
        ("</search>", "tag"),
        ("\n<information>", ""),
        (" Bevor", ""),
        (" Bridge", ""),
        ("<answer>", "tag"),
        (" Kegon", "answer"),
        (" Sawyer", "answer"),
        ("</answer>", "tag"),
    ]
    divergence = []
    for token, kind in expected:
        divergence.append([token, 0.5 if kind else None])
    kinds = mechanism.kinds_of({"divergence": divergence}, {"Bevor", "Bridge"})
    assert kinds == [kind for _, kind in expected]
    assert set(kinds) - {""} == set(mechanism.KINDS)


def test_the_mechanism_is_read_from_a_runs_log(tmp_path, monkeypatch):
    """Two questions, one pair: the means and the shares by hand."""
    chains = [{"chain": ["mayor", "mayor"]}, {"chain": ["mayor", "port"]}]
    validation = tmp_path / "validation.jsonl"
    write_rows(validation, chains)
    monkeypatch.setattr(mechanism, "VALIDATION", str(validation))
    monkeypatch.chdir(ROOT)  # for the names of micro/corpus.jsonl
    divergence = [["<search>", 0.1], [" warded", 0.6], [" x", None], ["</search>", 0.3]]
    log = [{"kind": "pair", "stage": "ofsd-1", "divergence": divergence}]
    for stage, ems in {"base": (0.0, 1.0), "ofsd-1": (1.0, 1.0)}.items():
        log += [{"kind": "eval", "stage": stage, "em": em} for em in ems]
    write_rows(tmp_path / "trajectories.jsonl", log)
    monkeypatch.setattr(mechanism, "run_stage", lambda seed: tmp_path)
    monkeypatch.setattr(mechanism, "KINDS", ("tag", "word searched with"))
    numbers = mechanism.summary(mechanism.measure((300,)))
    assert numbers["kl"]["tag"]["mean"] == pytest.approx(0.2)
    word = numbers["kl"]["word searched with"]
    assert word["share"] == pytest.approx(0.6)
    assert word["of_tokens"] == pytest.approx(1 / 3)
    assert numbers["em"] == {"mayor": [0.5, 1.0], "port": [1.0, 1.0]}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_result(name, rows):
    """The same in results/evidence/, where the files are packed."""
    path = Path(f"evidence/{name}.jsonl.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()))


# -------------------------------------------------------------------------- the tables


def run_of(points, budget=100):
    rows = [{"kind": "run", "arm": {"budget": budget}, "seed": 0}]
    for cost, em in points:
        rows.append({"kind": "eval", "cost": cost, "em": em})
    return rows


def test_area_levels_and_final_of_a_curve():
    run = run_of([(0, 0.2), (50, 0.6), (50, 0.8), (120, 0.8)])
    assert tables.area(run) == pytest.approx(0.5 * 0.4 + 0.5 * 0.8, abs=1e-3)
    assert tables.cost_of(run, 0.5) == pytest.approx(37.5, abs=0.1)
    assert tables.cost_of(run, 0.9) == float("inf")
    assert tables.final_em(run) == pytest.approx(0.8)


def test_the_curve_is_flat_over_the_pool_of_a_skipped_stage():
    run = run_of([(0, 0.2), (100, 0.6)])
    run.insert(2, {"kind": "mining", "cost": 50, "skipped": True})
    assert tables.em_at(run, [25, 50, 75]) == pytest.approx([0.2, 0.2, 0.4])
    run[2]["skipped"] = False  # a stage that trains has a row of its own for that
    assert tables.em_at(run, [25, 50, 75]) == pytest.approx([0.3, 0.4, 0.5])


def test_the_interval_is_students():
    """Mean 2, standard deviation 1, n 3: 4.303 / sqrt(3) = 2.484."""
    assert tables.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484, abs=1e-3))


def small_run(arm: str, seed: int, em: float) -> list[dict]:
    rows = [{"kind": "run", "arm": {"budget": 100}, "seed": seed}]
    for cost in (0, 100):
        test = {"kind": "eval", "cost": cost, "em": em, "searches": 2.0, "leak": 0.0}
        rows.append({**test, "work_s": 7})
    return rows


def test_a_part_of_ones_own_has_a_table(tmp_path, monkeypatch):
    """Without an arm grpo it is compared with the first; one seed has no interval."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    runs = {"own/b": (0.5, [1, 2]), "own/a": (0.25, [1, 2]), "deep/er/x": (0.5, [3])}
    for name, (em, seeds) in runs.items():
        for seed in seeds:
            write_result(f"{name}-{seed}", small_run(name, seed, em))
    write_result("converge", small_run("converge", 1, 0.5))
    assert tables.other_parts() == ["deep/er", "own"]
    text = tables.all_tables()
    assert "## own\n\n| arm | seeds | area | to a |" in text
    assert "| b | 2 | 0.500 ± 0.000 | +0.250 ± 0.000 |" in text
    assert "| x | 1 | 0.500 |  | 0.500 |" in text


def test_the_committed_tables_are_those_of_the_committed_runs(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "evidence").symlink_to(ROOT / "results/evidence")
    monkeypatch.setattr(tables, "draw", lambda part, title: None)
    monkeypatch.setattr(tables, "draw_retention", lambda part: None)
    tables.main()
    written = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert written == (ROOT / "results/evidence.md").read_text(encoding="utf-8")
    assert written.strip() == capsys.readouterr().out.strip()
