"""Evidence: does distillation between stages of GRPO pay, at equal cost, and why?

    python results/evidence.py tune                # trials of every arm, on validation questions
    python results/evidence.py tune-2              # more trials, after what the first showed
    python results/evidence.py loop                # the arms from the base model, on test questions
    python results/evidence.py converge            # a policy that GRPO improves no more
    python results/evidence.py tune-plateau        # trials from there, on validation questions
    python results/evidence.py tune-plateau-2      # more trials, with larger pools
    python results/evidence.py plateau             # the arms from there, on other test questions
    python results/evidence.py ablations           # a stage of OFSD, changed in one thing at a time
    python results/evidence.py loop --worker 1/2   # of two processes the first (OMP_NUM_THREADS=1)
    python results/tables.py                       # tables and figures from what these leave

Stop it and start it again at will: a finished run is a file results/evidence/PART/ARM-SEED.jsonl
and is not run again; an unfinished one is a folder in runs/evidence/ and begins anew.

Cost is the number of tokens processed, forward 1, forward and backward 3:

    sampling           1 a token of a response (observations are read, so they count), and of a
                       prompt, once a group
    GRPO               3 a token of prompt and response of each trajectory in a group with
                       variance; the other groups need no pass
    OFSD               the pool and the teacher's edge are sampling; then, each time a pair is
                       seen, 3 a token of the standard prompt and the student's response, 1 a
                       token of the privileged prompt and that response
    fine-tuning (rft)  the pool is sampling; 3 a token of the standard prompt and the reference

Evaluation and statistics (KL to the start, KL by kind of token, the edge with another question's
reference) cost nothing here, in any arm.
Within a budget both learning rates fall linearly: GRPO's over the budget, an offline stage's over
the stage.
"""

import argparse
import copy
import json
import os
import random
import re
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from arms import (
    ABLATED, ABLATIONS, ARMS, CONVERGE, CONVERGED, PLATEAU, PLATEAU_TRIALS, PLATEAU_TRIALS_2,
    TRIALS, TRIALS_2, WORLD, Arm,
)  # fmt: skip

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from eval import rewards_of, score, supported  # noqa: E402
from grpo import (  # noqa: E402
    backward_in_chunks, chunks, clip_and_update, frozen_copy, grpo_step, micro_batches,
    policy_hidden, to_logits, token_logprobs,
)  # fmt: skip
from ofsd import (  # noqa: E402
    Pair, divergences, mine_pairs, ofsd_step, privileged_prompt, spans, trainable,
)  # fmt: skip
from retriever import read_jsonl, run_script  # noqa: E402
from rollout import Trajectory, decode, encode, parse_turn  # noqa: E402
from train import Config, Run, teacher_edge  # noqa: E402

# ---------------------------------------------------------------- a run whose cost is counted


class Counted(Run):
    """train.py's Run with a counter, and a split of the questions that no other run reads."""

    def __init__(self, arm: Arm, name: str, seed: int, split: str):
        ours = "stages", "students", "budget", "falls"  # the others are settings of train.py
        settings = {name: value for name, value in vars(arm).items() if name not in ours}
        questions = f"micro/evidence-{split}.jsonl"
        folder = Path("runs/evidence") / name
        shutil.rmtree(folder, ignore_errors=True)
        settings |= WORLD | dict(seed=seed, eval_questions=questions, out=str(folder))
        super().__init__(Config(**settings))
        self.arm, self.name, self.cost, self.waiting = arm, name, 0, []
        self.next_test, self.tested_at, self.idle_s = arm.budget / 6, -1, 0.0
        self.log("run", "", arm=vars(arm), seed=seed, split=split)

    def sample(self, questions: list[dict], **how):
        trajectories = super().sample(questions, **how)
        if how.get("progress") != "control":
            self.cost += sum(len(t.response_ids) for t in trajectories)
            self.cost += sum(len(t.prompt_ids) for t in trajectories[:: how.get("group_size", 1)])
        return trajectories

    def log(self, kind: str, stage: str, **metrics) -> dict:
        def short(value):
            if isinstance(value, dict):
                return {key: short(part) for key, part in value.items()}
            return float(f"{value:.5g}") if isinstance(value, float) else value

        work_s = round(time.time() - self.began - self.idle_s, 1)
        return super().log(kind, stage, cost=self.cost, **short(metrics), work_s=work_s)

    def test(self, stage: str) -> None:
        """Greedy, without cost, and without a trace in the random state. leak: the share of
        questions with an answer that no passage retrieved for them contains."""
        cost, began, state = self.cost, time.time(), self.rng.getstate()
        if cost != self.tested_at:
            trajectories = self.sample(self.test_set, temperature=0.0)
            self.metrics = score(self.test_set, trajectories)
            leaks = [t.answer is not None and not supported(t) for t in trajectories]
            self.metrics["leak"] = sum(leaks) / len(leaks)
            self.cost = self.tested_at = cost
            self.rng.setstate(state)
        self.idle_s += time.time() - began
        self.log("eval", stage, **self.metrics)

    def finish(self) -> None:
        """Keep the tests and what was mined. The single steps stay in the run's folder alone."""
        target = HERE / "evidence" / f"{self.name}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_jsonl(self.folder / "metrics.jsonl") if row["kind"] != "step"]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        target.with_suffix(".part").write_text(text)
        os.replace(target.with_suffix(".part"), target)


def tokens(trajectories) -> int:
    return sum(len(t.prompt_ids) + len(t.response_ids) for t in trajectories)


def run_arm(name: str, arm: Arm, seed: int, split: str) -> Counted:
    run, stages, number = Counted(arm, name, seed, split), arm.stages.split(", "), 0
    run.test("base")
    while run.cost < arm.budget:
        kind, _, count = stages[min(number, len(stages) - 1)].partition(" ")
        number += 1
        if kind == "grpo":
            grpo(run, f"grpo-{number}", int(count) if count else None)
        else:
            offline(run, kind, f"{kind}-{number}")
    run.test(f"{kind}-{number}")
    run.finish()
    return run


# ---------------------------------------------------------------- GRPO


def grpo(run: Counted, stage: str, steps: int | None) -> None:
    """So many steps, or until the budget is spent."""
    config, size, step = run.config, run.config.group_size, 0
    optimizer = trainable(run.model, 0, config.grpo_lr)
    while run.cost < run.arm.budget and step != steps:
        step += 1
        done = run.arm.falls * run.cost / run.arm.budget
        optimizer.param_groups[0]["lr"] = config.grpo_lr * (1 - done)
        while len(run.waiting) < config.questions_per_step:
            run.waiting += run.rng.sample(run.train_set, len(run.train_set))
        questions = run.waiting[: config.questions_per_step]
        run.waiting = run.waiting[config.questions_per_step :]
        trajectories = run.sample(questions, group_size=size)
        rewards = torch.tensor(rewards_of(questions, trajectories)).view(-1, size)  # (Q, G)
        stats = grpo_step(run.model, run.ref_model, optimizer, trajectories, rewards, config)
        varied = (rewards != rewards[:, :1]).any(dim=1).tolist()
        run.cost += 3 * tokens(t for i, t in enumerate(trajectories) if varied[i // size])
        stats |= {"reward": rewards.mean().item(), "zero_var": 1 - sum(varied) / len(varied)}
        stats["searches"] = sum(len(t.queries) for t in trajectories) / len(trajectories)
        run.log("step", stage, step=step, **stats)
        if run.cost >= run.next_test:
            run.test(stage)
            run.next_test += run.arm.budget / 6


# ---------------------------------------------------------------- the offline stages


def offline(run: Counted, kind: str, stage: str) -> None:
    """One stage of ofsd, or of rft in its place: pool, mine, train. What the policy scored
    before holds until training begins, so the pool's cost stands in the curve as a flat piece."""
    config, size = run.config, run.config.group_size
    run.test(f"before {stage}")
    questions = run.rng.sample(run.train_set, config.ofsd_questions)
    pool = run.sample(questions, group_size=size)
    if kind == "rft":
        data = references(questions, pool, size)
        run.log("mining", stage, pairs=len(data))
    else:
        data, counts = mine_more(run, questions, pool)
        edge = teacher_edge(run, one_each(data)) if data else {}
        skipped = not data or edge["edge_supported"] <= 0
        run.log("mining", stage, **counts, **edge, skipped=skipped)
        if skipped:
            return
    run.log("eval", f"pool {stage}", **run.metrics)
    if kind == "rft":
        distil(run, kind, stage, data)
    else:
        teacher, some = frozen_copy(run.model), data[:20]
        before = kl_by_kind(run.model, teacher, some, run.tokenizer)
        distil(run, kind, stage, data, teacher)
        after = kl_by_kind(run.model, teacher, some, run.tokenizer)
        run.log("kinds", stage, before=before, after=after)
    run.test(stage)


def distil(run: Counted, kind: str, stage: str, data: list, teacher=None) -> None:
    """Passes over pairs (ofsd) or references (rft), with a test between two passes."""
    config, step = run.config, 0
    optimizer = trainable(run.model, 0, config.ofsd_lr)
    starts = range(0, len(data), config.ofsd_batch)
    for number in range(config.ofsd_epochs):
        if number:
            run.test(stage)
        shuffled = run.rng.sample(data, len(data))
        for start in starts:
            done = step / (config.ofsd_epochs * len(starts))
            optimizer.param_groups[0]["lr"] = config.ofsd_lr * (1 - done)
            step, batch = step + 1, shuffled[start : start + config.ofsd_batch]
            if kind == "rft":
                stats = rft_step(run.model, optimizer, batch, config)
                run.cost += 3 * tokens(batch)
            else:
                stats = ofsd_step(run.model, teacher, optimizer, batch, config)
                run.cost += 3 * tokens(pair.student for pair in batch)
                run.cost += sum(len(pair.prompt) + len(pair.student.response_ids) for pair in batch)
            run.log("step", stage, step=step, **stats)


def reference_index(group: list, rewards: list[float]) -> int | None:
    """The number of mine_pair's reference in its group; None where no trajectory is correct."""
    correct = [i for i, reward in enumerate(rewards) if reward > 0]
    return min(correct, key=lambda i: len(group[i].queries), default=None)


def references(questions: list[dict], pool: list, size: int) -> list:
    """What rft learns: the reference of each question that has one."""
    rewards, found = rewards_of(questions, pool), []
    for i in range(0, len(pool), size):
        best = reference_index(pool[i : i + size], rewards[i : i + size])
        found += [] if best is None else [pool[i + best]]
    return found


def rft_step(model, optimizer, batch: list, config: Config) -> dict:
    """Cross-entropy on the policy's tokens of references, under the standard prompt."""
    num_tokens, stats = sum(sum(t.loss_mask) for t in batch), []

    def loss(logits, ids):
        value = -token_logprobs(logits, ids).sum() / num_tokens
        return value, {"loss": value.item()}

    for part in micro_batches(batch, config.micro_batch, lambda t: len(t.response_ids)):
        tokens = [zip(t.response_ids, t.loss_mask) for t in part]
        ids = [token for pairs in tokens for token, sampled in pairs if sampled]
        ids = torch.tensor(ids, device=model.device)  # (N,)
        stats += backward_in_chunks(model, loss, policy_hidden(model, part), ids)
    norm = clip_and_update(optimizer, config.max_grad_norm)
    return {"loss": sum(its["loss"] for its in stats), "grad_norm": norm}


def mine_more(run: Counted, questions: list[dict], pool: list) -> tuple[list[Pair], dict]:
    """mine_pairs again and again, each time without the students it has found: arm.students pairs
    a question."""
    size, most = run.config.group_size, run.config.max_privileged_tokens

    def mine(pool: list) -> tuple[list[Pair], dict]:
        rewards = rewards_of(questions, pool)
        return mine_pairs(run.model, run.tokenizer, questions, pool, rewards, most)

    pairs, counts = mine(pool)
    for _ in range(run.arm.students - 1):
        used = {id(pair.student) for pair in pairs}
        reference = {pair.question["id"]: pair.reference for pair in pairs}
        # A student that was used stands in for nothing: the group's reference takes its place.
        left = [
            reference[questions[i // size]["id"]] if id(t) in used else t
            for i, t in enumerate(pool)
        ]  # fmt: skip
        pairs += mine(left)[0]
    return pairs, counts | {"pairs": len(pairs)}


def one_each(pairs: list[Pair]) -> list[Pair]:
    """The first pair of each question."""
    return list({pair.question["id"]: pair for pair in reversed(pairs)}.values())


# ---------------------------------------------------------------- the mechanism


def token_kinds(tokenizer, trajectory) -> list[str]:
    """think, search, answer or tag for each of the policy's tokens, by the last tag opened before
    it."""
    kinds = []
    for sampled, ids in spans(trajectory):
        for i, token in enumerate(ids if sampled else []):
            opened = re.findall(r"<(/?)(think|search|answer)>", decode(tokenizer, ids[:i]))
            inside = opened[-1][1] if opened and not opened[-1][0] else "tag"
            kinds.append("tag" if "<" in decode(tokenizer, [token]) else inside)
    return kinds


@torch.no_grad()
def kl_by_kind(model, teacher, pairs: list[Pair], tokenizer) -> dict[str, float]:
    """Mean forward KL from teacher to student on the students' tokens, by kind of token, in
    nats."""
    sums, counts = defaultdict(float), defaultdict(int)
    for part in micro_batches(pairs, 20, lambda pair: len(pair.student.response_ids)):
        students, prompts = [pair.student for pair in part], [pair.prompt for pair in part]
        hidden = policy_hidden(model, students)  # (N, H)
        teacher_hidden = policy_hidden(teacher, students, prompts)  # (N, H)
        parts = chunks(model, hidden, teacher_hidden)
        values = [divergences(to_logits(model, h), to_logits(teacher, t)) for h, t in parts]
        kinds = [kind for t in students for kind in token_kinds(tokenizer, t)]
        for kind, value in zip(kinds, torch.cat(values).tolist(), strict=True):
            sums[kind] += value
            counts[kind] += 1
    return {kind: sums[kind] / counts[kind] for kind in sorted(sums)}


# ---------------------------------------------------------------- ablations


def ablations(name: str, seed: int, split: str) -> None:
    run = Counted(ABLATED, name, seed, split)
    grpo(run, "grpo-1", 2)
    run.test("grpo-1")
    questions = run.rng.sample(run.train_set, run.config.ofsd_questions)
    pool = run.sample(questions, group_size=run.config.group_size)
    config, cost, model = run.config, run.cost, run.model
    for variant, change in ABLATIONS.items():
        run.model, run.cost, run.rng = copy.deepcopy(model), cost, random.Random(seed)
        run.arm = replace(ABLATED, students=change.get("students", 1))
        settings = {key: value for key, value in change.items() if hasattr(config, key)}
        run.config = replace(config, **settings)
        kind = change.get("kind", "ofsd")
        if kind == "rft":
            data = references(questions, pool, run.config.group_size)
            run.log("mining", variant, pairs=len(data))
        else:
            mined, counts = mine_more(run, questions, altered(run, questions, pool, change))
            data = [conditioned(run, pair, change, mined) for pair in mined]
            data = [pair for pair in data if pair.prompt and any(pair.student.loss_mask)]
            run.log("mining", variant, **counts, **teacher_edge(run, one_each(data)))
        distil(run, kind, variant, data, model)
        run.test(variant)
    run.finish()


def altered(run: Counted, questions: list[dict], pool: list, change: dict) -> list:
    """The pool in which mine_pair finds a random reference, or a random student: those that it is
    not to choose from are replaced by the one that was drawn."""
    size, result = run.config.group_size, list(pool)
    rewards = rewards_of(questions, pool)
    for i in range(0, len(pool), size):
        group = range(i, i + size)
        correct = [j for j in group if rewards[j]]
        if correct and change.get("reference") == "random":
            drawn = run.rng.choice(correct)
            for j in correct:
                result[j] = pool[drawn]
        if correct and change.get("student") == "random":
            first = i + reference_index(pool[i : i + size], rewards[i : i + size])
            drawn = run.rng.choice([j for j in group if j != first])
            for j in group:
                result[j] = pool[first] if j == first else pool[drawn]
    return result


def conditioned(run: Counted, pair: Pair, change: dict, pairs: list[Pair]) -> Pair:
    """A pair whose prompt shows another question's reference, or less of its own, or none; or whose
    mask is narrower."""
    tokenizer, asked, shown = run.tokenizer, pair.question["question"], None
    if change.get("reference") == "none":
        pair = pair._replace(prompt=pair.student.prompt_ids)
    if change.get("reference") == "shuffled":
        others = [other for other in pairs if other.question["id"] != pair.question["id"]]
        shown = run.rng.choice(others).reference
    if change.get("reads") == "queries":
        shown = queries_only(tokenizer, pair.reference)
    if shown:
        room = run.config.max_privileged_tokens
        pair = pair._replace(prompt=privileged_prompt(tokenizer, asked, shown, room))
    if change.get("tokens") == "queries":
        mask = query_mask(tokenizer, pair.student)
        pair = pair._replace(student=replace(pair.student, loss_mask=mask))
    return pair


def queries_only(tokenizer, reference: Trajectory) -> Trajectory:
    """A reference that shows its queries and its answer, and neither thoughts nor passages."""
    text = "".join(f"<search> {query} </search>\n" for query in reference.queries)
    ids = encode(tokenizer, f"{text}<answer> {reference.answer} </answer>")
    shown = Trajectory(reference.question, reference.prompt_ids)
    shown.extend(ids, [0.0] * len(ids))
    return shown


def query_mask(tokenizer, trajectory: Trajectory) -> list[int]:
    """The loss_mask narrowed to search queries: 1 for the sampled tokens that end between <search>
    and </search> of a turn that searched. (The paper aligns all of the policy's tokens.)"""
    mask = []
    for sampled, ids in spans(trajectory):
        text = decode(tokenizer, ids)
        end = text.find("</search>")
        begin = text.rfind("<search>", 0, max(end, 0)) + len("<search>")
        searched = sampled and (parse_turn(text) or "?")[0] == "search"
        ends = [len(decode(tokenizer, ids[: i + 1])) for i in range(len(ids))]
        mask += [int(searched and begin < here <= end) for here in ends]
    return mask


# ---------------------------------------------------------------- the plan


def converge(name: str, seed: int) -> None:
    run = run_arm(name, CONVERGE, seed, "validation")
    run.model.save_pretrained(CONVERGED)
    run.tokenizer.save_pretrained(CONVERGED)


def trials(part: str, arms: dict, *seeds: int) -> list[tuple]:
    """One trial of each kind, then the next of each, ...; all of that for each seed."""
    named = [
        [(f"{part}/{kind}-{name}", arm) for name, arm in those.items()]
        for kind, those in arms.items()
    ]  # fmt: skip
    plan = [(name, arm) for row in zip(*named, strict=True) for name, arm in row]
    return [
        (run_arm, f"{name}-{seed}", arm, seed, "validation")
        for seed in seeds for name, arm in plan
    ]  # fmt: skip


def final(part: str, arms: dict, seeds, split: str = "test") -> list[tuple]:
    plan = [(seed, kind, arm) for seed in seeds for kind, arm in arms.items()]
    return [(run_arm, f"{part}/{kind}-{seed}", arm, seed, split) for seed, kind, arm in plan]


# (function, name of the result, further arguments), in the order of the runs
PARTS = {
    "tune": trials("tune", TRIALS, 100),
    "tune-2": trials("tune-2", TRIALS_2, 100),
    "loop": final("loop", ARMS, range(10, 30)),
    "converge": [(converge, "converge", 102)],
    "tune-plateau": trials("tune-plateau", PLATEAU_TRIALS, 103),
    "tune-plateau-2": trials("tune-plateau-2", PLATEAU_TRIALS_2, 103),
    "plateau": final("plateau", PLATEAU, range(40, 50), "test-2"),
    "ablations": [(ablations, f"ablations/{seed}", seed, "validation") for seed in range(200, 205)],
}


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--worker", default="1/1", help="I/N: of N processes, this is the I-th")
    args = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    worker, workers = map(int, args.worker.split("/"))
    for number, (function, name, *arguments) in enumerate(PARTS[args.part]):
        if number % workers == worker - 1 and not (HERE / "evidence" / f"{name}.jsonl").exists():
            print(name, time.strftime("%H:%M:%S"), flush=True)
            function(name, *arguments)


if __name__ == "__main__":
    run_script(main)
