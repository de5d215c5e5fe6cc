"""One stage of OFSD, changed in one thing at a time (arms.py lists the variants).

All variants of a seed start from the same policy, two steps of GRPO after the base
model, and learn from the same pool. So they differ in nothing but what their name says.
"""

import copy
import random
from dataclasses import replace

from eval import exact_match
from experiments.arms import ABLATIONS, Arm, Variant
from experiments.stages import (
    CountedRun,
    distil,
    groups_of,
    grpo,
    imitate,
    mine,
    reference_in,
    references_of,
    sample_pool,
)
from machinery.text import decode, encode
from ofsd import Pair, privileged_prompt
from rollout import Trajectory, parse_turn, spans
from train import first_pairs, teacher_edge


def run_ablations(name: str, arm: Arm, seed: int, split: str) -> None:
    """All variants with one seed. arm: what they start with, and the stage's size."""
    run = CountedRun(name, arm, seed, split)
    grpo(run, "grpo-1", max_steps=2)
    run.measure("grpo-1")
    questions, pool = sample_pool(run)

    policy = run.model
    cost = run.cost
    config = run.config
    for stage, variant in ABLATIONS.items():
        run.model = copy.deepcopy(policy)
        run.cost = cost
        run.tested_at = -1  # what was tested last was another variant's policy
        run.rng = random.Random(seed)
        run.config = replace(
            config,
            students=variant.students,
            divergence=variant.divergence,
            clip=variant.clip,
        )
        if variant.stage == "rft":
            references = references_of(run, questions, pool)
            run.log("mining", stage, pairs=len(references))
            imitate(run, stage, references)
        else:
            changed_pool = change_pool(run, questions, pool, variant)
            mined, counts = mine(run, questions, changed_pool)
            pairs = change_pairs(run, mined, variant)
            edge = teacher_edge(run, first_pairs(pairs))
            run.log("mining", stage, **counts, **edge)
            distil(run, stage, pairs, teacher=policy)
        run.measure(stage)
    run.finish()


# -------------------------------------------------------- another reference, or student


def change_pool(
    run: CountedRun, questions: list[dict], pool: list[Trajectory], variant: Variant
) -> list[Trajectory]:
    """A pool in which mine_pair finds a random reference, or a random student. It is
    left nothing else to choose: the others are replaced by the one that was drawn."""
    changed = []
    groups = groups_of(pool, run.config.group_size)
    for question, group in zip(questions, groups, strict=True):
        if reference_in(question, group) is None:
            changed += group
        elif variant.reference == "random":
            changed += with_random_reference(run.rng, question, group)
        elif variant.student == "random":
            changed += with_random_student(run.rng, question, group)
        else:
            changed += group
    return changed


def with_random_reference(
    rng: random.Random, question: dict, group: list[Trajectory]
) -> list[Trajectory]:
    """The group, in which one correct trajectory stands in for all of them."""
    right = [exact_match(t.answer, question["golden_answers"]) == 1 for t in group]
    correct = [t for t, is_right in zip(group, right, strict=True) if is_right]
    drawn = rng.choice(correct)
    return [drawn if is_right else t for t, is_right in zip(group, right, strict=True)]


def with_random_student(
    rng: random.Random, question: dict, group: list[Trajectory]
) -> list[Trajectory]:
    """The group's reference, and one of the others in place of all others."""
    reference = reference_in(question, group)
    others = [t for t in group if t is not reference]
    drawn = rng.choice(others)
    return [reference] + [drawn] * len(others)


# --------------------------------------------------------- another prompt, or loss mask


def change_pairs(run: CountedRun, pairs: list[Pair], variant: Variant) -> list[Pair]:
    """The pairs as a variant wants them, without those that leave nothing to learn."""
    changed = [change_pair(run, pair, pairs, variant) for pair in pairs]
    return [pair for pair in changed if pair.prompt and any(pair.student.loss_mask)]


def change_pair(
    run: CountedRun, pair: Pair, pairs: list[Pair], variant: Variant
) -> Pair:
    """A pair whose prompt shows another question's reference, or less of its own, or
    none, or whose mask is narrower. Its prompt is None where it does not fit."""
    tokenizer = run.tokenizer
    if variant.reference == "none":
        pair = pair._replace(prompt=pair.student.prompt_ids)
    if variant.reference == "shuffled":
        question_id = pair.question["id"]
        others = [other for other in pairs if other.question["id"] != question_id]
        pair = show(run, pair, run.rng.choice(others).reference)
    if variant.shown == "queries":
        pair = show(run, pair, queries_and_answer(tokenizer, pair.reference))
    if variant.tokens == "queries":
        mask = query_mask(tokenizer, pair.student)
        pair = pair._replace(student=replace(pair.student, loss_mask=mask))
    return pair


def show(run: CountedRun, pair: Pair, reference: Trajectory) -> Pair:
    """The pair with this reference in its prompt."""
    question = pair.question["question"]
    max_tokens = run.config.max_privileged_tokens
    prompt = privileged_prompt(run.tokenizer, question, reference, max_tokens)
    return pair._replace(prompt=prompt)


def queries_and_answer(tokenizer, reference: Trajectory) -> Trajectory:
    """The reference without its thoughts and without what it read."""
    text = "".join(f"<search> {query} </search>\n" for query in reference.queries)
    ids = encode(tokenizer, f"{text}<answer> {reference.answer} </answer>")
    shown = Trajectory(reference.question, reference.prompt_ids)
    shown.extend(ids, logprobs=[0.0] * len(ids))
    return shown


def query_mask(tokenizer, trajectory: Trajectory) -> list[int]:
    """The loss mask, narrowed to search queries: 1 for the sampled tokens that end
    between <search> and </search> of a turn that searched. (The paper aligns all of the
    policy's tokens.)"""
    mask = []
    for sampled, ids in spans(trajectory):
        if sampled:
            begin, end = query_place(decode(tokenizer, ids))
            for count in range(1, len(ids) + 1):
                length = len(decode(tokenizer, ids[:count]))
                mask.append(int(begin < length <= end))
        else:
            mask += [0] * len(ids)
    return mask


def query_place(text: str) -> tuple[int, int]:
    """Where the query of a turn begins and ends; (0, 0) where it has none."""
    turn = parse_turn(text)
    if turn is None or turn[0] != "search":
        return 0, 0
    end = text.find("</search>")
    begin = text.rfind("<search>", 0, end) + len("<search>")
    return begin, end
