"""The stages that the evidence compares, in a run that counts what they cost.

Cost is the number of tokens processed: a forward pass counts 1 a token, a forward and a
backward pass together count 3.

    sampling           1 a token of a response (observations are read, so they count);
                       1 a token of a prompt, once a group
    GRPO               3 a token of prompt and response of each trajectory in a group
                       with variance; the other groups need no pass
    OFSD               the pool and the teacher's edge are sampling; then, each time a
                       pair is seen, 3 a token of the standard prompt and the student's
                       response, 1 a token of the privileged prompt and that response
    fine-tuning (rft)  the pool is sampling; then 3 a token of the standard prompt and
                       the reference, each time it is seen

A reference that an agent has written (foreign.py) costs nothing here. "price" in the
line of kind "mining" is what sampling it would cost, prompt included.

Tests and statistics cost nothing, in any arm: the KL by kind of token, and the edge
with another question's reference. Both learning rates fall linearly, GRPO's over the
budget, and that of an offline stage over the stage.
"""

import gzip
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from eval import exact_match, score, supported
from experiments.arms import Arm
from experiments.foreign import (
    SAMPLES,
    SHOWN,
    demonstrate,
    em_by_half,
    form_of,
    from_demonstrations,
    right_share,
    with_demonstrations,
)
from grpo import grpo_step, policy_hidden, to_logits
from machinery.json_lines import read_jsonl, write_jsonl
from machinery.metrics import batch_stats
from machinery.models import frozen_copy
from machinery.run import Run
from machinery.text import decode
from ofsd import Pair, divergences, mine_pairs, ofsd_step
from rollout import Trajectory, spans
from tools.imitation import imitation_step
from train import (
    Config,
    first_pairs,
    float_rewards,
    new_optimizer,
    teacher_edge,
)

RUNS = Path("runs/evidence")
RESULTS = Path("results/evidence")
TESTS = 6  # of GRPO within a budget; more follow where a costly stage came before
KL_PAIRS = 20  # whose divergence by kind of token is measured around a stage
FORM_SPLITS = ("test-3", "retention")  # where an arm's form is looked at, too

# ---------------------------------------------------------------- a run that is counted


class CountedRun(Run):
    """A run whose cost is counted. Its questions test nothing but the evidence.

    split: the file of these questions, micro/evidence-SPLIT.jsonl. name: of the run's
    folder in runs/evidence, and of its result in results/evidence.
    """

    def __init__(self, name: str, arm: Arm, seed: int, split: str):
        folder = RUNS / name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        settings = Config(
            model=arm.model,
            questions=f"micro/{arm.questions}.jsonl",
            eval_questions=f"micro/evidence-{split}.jsonl",
            out=str(folder),
            seed=seed,
            questions_per_step=arm.questions_per_step,
            grpo_lr=arm.grpo_lr,
            ofsd_questions=arm.ofsd_questions,
            ofsd_epochs=arm.ofsd_epochs,
            ofsd_batch=8,
            ofsd_lr=arm.ofsd_lr,
            students=arm.students,
            clip=arm.clip,
            tau=arm.tau,
        )
        super().__init__(settings)
        self.arm = arm
        self.name = name
        self.split = split
        self.start = frozen_copy(self.model)
        self.cost = 0
        self.next_test = arm.budget / TESTS
        self.tested_at = -1  # the cost of the last test
        self.test_metrics: dict = {}  # what it said
        self.idle_s = 0.0  # seconds that tests took
        self.log("run", "", arm=vars(arm), seed=seed, split=split)

    def sample(
        self,
        questions: list[dict],
        *,
        group_size: int = 1,
        temperature: float = 1.0,
        prompts: list[list[int]] | None = None,
        progress: str = "",
    ) -> list[Trajectory]:
        """As every run samples. It costs, unless it serves a statistic."""
        trajectories = super().sample(
            questions,
            group_size=group_size,
            temperature=temperature,
            prompts=prompts,
            progress=progress,
        )
        if progress != "control":
            self.cost += sum(len(t.response_ids) for t in trajectories)
            firsts = trajectories[::group_size]
            self.cost += sum(len(t.prompt_ids) for t in firsts)
        return trajectories

    def log(self, kind: str, stage: str, **metrics) -> dict:
        """A line of metrics.jsonl, with the cost so far and the seconds of work."""
        work_s = round(time.time() - self.began - self.idle_s, 1)
        metrics = rounded(metrics)
        return super().log(kind, stage, cost=self.cost, **metrics, work_s=work_s)

    @contextmanager
    def aside(self):
        """A context for what only the tables need. It leaves no trace in the cost, in
        the seconds of work, and in what is drawn later."""
        began = time.time()
        cost = self.cost
        random_state = self.rng.getstate()
        yield
        self.cost = cost
        self.rng.setstate(random_state)
        self.idle_s += time.time() - began

    def measure(self, stage: str) -> None:
        """Test the policy greedily, and log it. At an unchanged cost the last test is
        logged once more."""
        if self.tested_at != self.cost:
            with self.aside():
                self.test_metrics = self.scores()
            self.tested_at = self.cost
        self.log("eval", stage, **self.test_metrics)

    def scores(self) -> dict:
        """What the policy scores. leak: the share of questions that were answered with
        what no passage said, so perhaps from memory."""
        trajectories = self.sample(self.test_set, temperature=0.0)
        metrics = score(self.test_set, trajectories)
        leaks = 0
        for trajectory in trajectories:
            if trajectory.answer is not None and not supported(trajectory):
                leaks += 1
        metrics["leak"] = leaks / len(trajectories)
        if self.split == "retention":
            metrics["em_by_half"] = em_by_half(self.test_set, trajectories)
        return metrics

    def look_at_form(self, stage: str) -> None:
        """Log what samples say about the policy."""
        questions = self.test_set[:SHOWN]
        with self.aside():
            trajectories = self.sample(questions, group_size=SAMPLES)
            form = form_of(
                self.model, self.start, self.tokenizer, questions, trajectories
            )
        self.log("form", stage, **form._asdict())

    def finish(self) -> None:
        """Keep the result. The single steps stay in the run's folder alone."""
        rows = read_jsonl(self.folder / "metrics.jsonl")
        kept = [row for row in rows if row["kind"] != "step"]
        result = result_of(self.name)
        result.parent.mkdir(parents=True, exist_ok=True)
        plain = self.folder / "result.jsonl"
        write_jsonl(plain, kept)
        part = result.with_suffix(".part")
        part.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        os.replace(part, result)  # so that a result is whole, or is not there


def result_of(name: str) -> Path:
    return RESULTS / f"{name}.jsonl.gz"


def rounded(value):
    """Numbers to five digits, in dictionaries, too."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value


def token_count(trajectories: list[Trajectory]) -> int:
    return sum(len(t.prompt_ids) + len(t.response_ids) for t in trajectories)


def groups_of(trajectories: list, size: int) -> list[list]:
    """The groups of a flat list, question by question."""
    starts = range(0, len(trajectories), size)
    return [trajectories[start : start + size] for start in starts]


# --------------------------------------------------------------------------- run an arm


def run_arm(name: str, arm: Arm, seed: int, split: str) -> CountedRun:
    """The stages of an arm in turn, the last one again and again, within the budget."""
    run = CountedRun(name, arm, seed, split)
    run.measure("base")
    stages = arm.stages.split(", ")
    number = 0
    stage = "base"
    while run.cost < arm.budget:
        place = min(number, len(stages) - 1)  # after the last stage comes the last one
        kind, _, steps = stages[place].partition(" ")
        number += 1
        stage = f"{kind}-{number}"
        if kind == "ofsd":
            ofsd(run, stage)
        elif kind == "rft":
            rft(run, stage)
        elif steps:
            grpo(run, stage, max_steps=int(steps))
        else:
            grpo(run, stage)
        if kind != "grpo" and split in FORM_SPLITS:
            run.look_at_form(stage)
    run.measure(stage)
    if split in FORM_SPLITS:
        run.look_at_form(stage)
    run.finish()
    return run


# --------------------------------------------------------------------------------- GRPO


def grpo(run: CountedRun, stage: str, max_steps: int | None = None) -> None:
    """So many steps, or fewer if the budget is spent before."""
    config = run.config
    optimizer = new_optimizer(run.model, config.grpo_lr)
    step = 0
    while run.cost < run.arm.budget and step != max_steps:
        step += 1
        if run.arm.falls:
            lr = config.grpo_lr * (1 - run.cost / run.arm.budget)
            optimizer.param_groups[0]["lr"] = lr

        # A group of trajectories for each question, their rewards, and an update.
        questions = run.next_questions(config.questions_per_step)
        trajectories = run.sample(questions, group_size=config.group_size)
        rewards = torch.tensor(float_rewards(questions, trajectories))  # (Q * G,)
        rewards = rewards.view(-1, config.group_size)  # (Q, G)
        stats = grpo_step(
            run.model,
            optimizer,
            trajectories,
            rewards,
            clip_eps=config.clip_eps,
            micro_batch=config.micro_batch,
            max_grad_norm=config.max_grad_norm,
        )

        varied = (rewards != rewards[:, :1]).any(dim=1)  # (Q,)
        groups = groups_of(trajectories, config.group_size)
        for group, has_variance in zip(groups, varied, strict=True):
            if has_variance:
                run.cost += 3 * token_count(group)

        stats.update(batch_stats(trajectories, rewards))
        run.log("step", stage, step=step, **stats)
        if run.cost >= run.next_test:
            run.measure(stage)
            run.next_test += run.arm.budget / TESTS


# ------------------------------------------------------------------- the offline stages


def sample_pool(run: CountedRun) -> tuple[list[dict], list[Trajectory]]:
    """Questions of a stage, and a group of trajectories for each."""
    questions = run.rng.sample(run.train_set, run.config.ofsd_questions)
    pool = run.sample(questions, group_size=run.config.group_size)
    return questions, pool


def log_pool(run: CountedRun, stage: str) -> None:
    """The policy still scores what it scored before the stage. So the cost of the pool
    stands in the curve as a flat piece. (A skipped stage has none: tables.py knows.)"""
    run.log("eval", f"pool {stage}", **run.test_metrics)


def ofsd(run: CountedRun, stage: str) -> None:
    """One stage of OFSD: pool, pairs, the teacher's edge, training."""
    run.measure(f"before {stage}")
    questions, pool = sample_pool(run)
    price = 0  # of an agent's references
    if run.arm.references == "own":
        pairs, counts = mine(run, questions, pool)
    else:
        demonstrations = demonstrations_for(run, questions)
        price = token_count(demonstrations)
        groups = groups_of(pool, run.config.group_size)
        widened = with_demonstrations(groups, demonstrations)
        mined, counts = mine(run, questions, widened)
        pairs = from_demonstrations(mined, demonstrations)
        counts["own_reference"] = len(mined) - len(pairs)  # which are dropped
        counts["pairs"] = len(pairs)
    if not pairs:
        run.log("mining", stage, **counts, price=price, skipped=True)
        return
    one_each = first_pairs(pairs)
    edge = teacher_edge(run, one_each)
    skipped = edge["edge_supported"] <= 0
    run.log(
        "mining",
        stage,
        **counts,
        **edge,
        right_share=right_share(pairs),
        price=price,
        skipped=skipped,
    )
    if skipped:
        return

    log_pool(run, stage)
    teacher = frozen_copy(run.model)
    sample = one_each[:KL_PAIRS]
    before = kl_by_kind(run.model, teacher, sample, run.tokenizer)
    distil(run, stage, pairs, teacher)
    after = kl_by_kind(run.model, teacher, sample, run.tokenizer)
    run.log("kinds", stage, before=before, after=after)
    run.measure(stage)


def rft(run: CountedRun, stage: str) -> None:
    """One stage of fine-tuning in its place: pool, references, training."""
    run.measure(f"before {stage}")
    price = 0  # of an agent's references
    if run.arm.references == "own":
        questions, pool = sample_pool(run)
        references = references_of(run, questions, pool)
    else:
        questions = run.rng.sample(run.train_set, run.config.ofsd_questions)
        references = demonstrations_for(run, questions)
        price = token_count(references)
    run.log("mining", stage, pairs=len(references), price=price)
    log_pool(run, stage)
    imitate(run, stage, references)
    run.measure(stage)


def demonstrations_for(run: CountedRun, questions: list[dict]) -> list[Trajectory]:
    """The agent's trajectory for each question."""
    demonstrations = []
    for question in questions:
        demonstration = demonstrate(
            run.tokenizer,
            run.retriever,
            question,
            run.config.k,
            foreign=run.arm.references == "foreign",
        )
        demonstrations.append(demonstration)
    return demonstrations


def mine(
    run: CountedRun, questions: list[dict], pool: list[Trajectory]
) -> tuple[list[Pair], dict]:
    """The pairs of a pool, and counts of what gave none."""
    return mine_pairs(
        run.model,
        run.tokenizer,
        questions,
        pool,
        float_rewards(questions, pool),
        run.config.max_privileged_tokens,
        students=run.config.students,
    )


def reference_in(question: dict, group: list[Trajectory]) -> Trajectory | None:
    """mine_group's reference: the correct trajectory with the fewest searches. It is
    taken here also where all are correct and search alike."""
    correct = [t for t in group if exact_match(t.answer, question["golden_answers"])]
    return min(correct, key=lambda t: len(t.queries), default=None)


def references_of(
    run: CountedRun, questions: list[dict], pool: list[Trajectory]
) -> list[Trajectory]:
    """What fine-tuning learns: the reference of each question that has one."""
    references = []
    groups = groups_of(pool, run.config.group_size)
    for question, group in zip(questions, groups, strict=True):
        reference = reference_in(question, group)
        if reference is not None:
            references.append(reference)
    return references


def distil(run: CountedRun, stage: str, pairs: list[Pair], teacher) -> None:
    config = run.config
    optimizer = new_optimizer(run.model, config.ofsd_lr)
    for step, batch in batches(run, stage, pairs, optimizer):
        stats = ofsd_step(
            run.model,
            teacher,
            optimizer,
            batch,
            kind=config.divergence,
            clip=config.clip,
            tau=config.tau,
            micro_batch=config.micro_batch,
            max_grad_norm=config.max_grad_norm,
        )
        run.cost += 3 * token_count([pair.student for pair in batch])
        for pair in batch:  # the teacher's forward pass
            run.cost += len(pair.prompt) + len(pair.student.response_ids)
        run.log("step", stage, step=step, **stats)


def imitate(run: CountedRun, stage: str, references: list[Trajectory]) -> None:
    config = run.config
    optimizer = new_optimizer(run.model, config.ofsd_lr)
    for step, batch in batches(run, stage, references, optimizer):
        stats = imitation_step(
            run.model,
            optimizer,
            batch,
            micro_batch=config.micro_batch,
            max_grad_norm=config.max_grad_norm,
        )
        run.cost += 3 * token_count(batch)
        run.log("step", stage, step=step, **stats)


def batches(
    run: CountedRun, stage: str, examples: list, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[int, list]]:
    """Yield (step, batch) for all passes, each in an order of its own. The learning
    rate falls to 0. Between two passes the policy is tested."""
    config = run.config
    starts = range(0, len(examples), config.ofsd_batch)
    updates = config.ofsd_epochs * len(starts)
    step = 0
    for epoch in range(config.ofsd_epochs):
        if epoch > 0:
            run.measure(stage)
        shuffled = run.rng.sample(examples, len(examples))
        for start in starts:
            optimizer.param_groups[0]["lr"] = config.ofsd_lr * (1 - step / updates)
            step += 1
            yield step, shuffled[start : start + config.ofsd_batch]


# ----------------------------------------------------------------- what a stage changes


@torch.no_grad()
def kl_by_kind(model, teacher, pairs: list[Pair], tokenizer) -> dict[str, float]:
    """Mean forward KL from teacher to student on the students' tokens, in nats, by the
    kind of token."""
    values = defaultdict(list)
    for pair in pairs:
        student_hidden = policy_hidden(model, [pair.student])  # (N, H)
        teacher_hidden = policy_hidden(teacher, [pair.student], [pair.prompt])  # (N, H)
        student_logits = to_logits(model, student_hidden)  # (N, V)
        teacher_logits = to_logits(teacher, teacher_hidden)  # (N, V)
        kls = divergences(student_logits, teacher_logits).tolist()  # (N,)
        kinds = token_kinds(tokenizer, pair.student)
        for kind, kl in zip(kinds, kls, strict=True):
            values[kind].append(kl)
    return {kind: sum(values[kind]) / len(values[kind]) for kind in sorted(values)}


def token_kinds(tokenizer, trajectory: Trajectory) -> list[str]:
    """think, search, answer or tag, for each of the policy's tokens."""
    kinds = []
    for sampled, ids in spans(trajectory):
        if sampled:
            for place, token in enumerate(ids):
                if "<" in decode(tokenizer, [token]):
                    kinds.append("tag")
                else:
                    kinds.append(open_tag(decode(tokenizer, ids[:place])))
    return kinds


def open_tag(text: str) -> str:
    """The tag whose content a turn is writing; "tag" if it is between two."""
    tags = re.findall(r"<(/?)(think|search|answer)>", text)
    if not tags:
        return "tag"
    slash, name = tags[-1]
    return "tag" if slash else name
