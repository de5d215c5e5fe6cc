"""Search-E1: GRPO and offline self-distillation in turn, on one search agent.

    for each round:
        GRPO   sample groups of trajectories, reward them, and make one clipped update
               on each batch                                                 (grpo.py)
        OFSD   sample again, mine pairs of a good and a worse trajectory, and pull the
               policy towards what it says itself when its prompt shows the good one;
               skipped if that does not make its answers better              (ofsd.py)

    python train.py                                # two rounds on micro/; four minutes
    python train.py --no-ofsd --out runs/grpo      # GRPO alone
    python train.py --config configs/paper.json    # settings from a file; flags win
    python train.py --resume runs/grpo             # goes on as if it had never stopped
    torchrun --standalone --nproc-per-node 2 train.py    # a process for each device

Start reading at run_stages, then grpo_stage and ofsd_stage. The gradient is taken, and
the optimizer steps, in grpo_step (grpo.py) and ofsd_step (ofsd.py). Every field of
Config, at the end of this file, is a flag. What a run writes, and how it resumes, is in
machinery/run.py. The same on one page, without any of that: lessons/plain.py.

Each stage begins with a new AdamW. Its moments are averages over past gradients, and
those of one stage's loss say nothing about the next stage's. With adapters it also has
other parameters.

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. Sizes, learning rates and --clip are tuned for a model of a million parameters.
       configs/ has settings for larger ones.
    2. Before OFSD the teacher's edge is measured: its exact match (EM) minus the
       student's. The stage is skipped unless the edge is above 0 in answers that a
       retrieved passage supports.
    3. GRPO's learning rate falls. With a constant rate the edge had vanished by the
       second stage of OFSD.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, it keeps the process group from ending

from eval import rewards_of, score
from grpo import grpo_step
from machinery.adapters import add_adapters, merge_adapters
from machinery.devices import ARITHMETICS, DEVICES
from machinery.errors import BadInput
from machinery.hints import NOTHING_EARNED, foreign_words, nothing_earned
from machinery.metrics import batch_stats
from machinery.models import frozen_copy
from machinery.run import Run, step_heading, step_line
from machinery.settings import check_settings, parse_flags, setting
from machinery.terminal import run_script
from ofsd import Pair, mine_pairs, ofsd_step, privileged_prompt
from rollout import Trajectory


def train(config: "Config", resume: bool = False) -> Path:
    """A whole run, or the rest of one. Returns its folder."""
    run = Run(config, resume)
    run_stages(run)
    return run.folder


def run_stages(run: Run) -> None:
    """All of Search-E1: two stages in turn, with a test after each."""
    config = run.config
    with run.saying_how_to_go_on():
        if not run.tested("base"):
            count = len(run.test_set)
            print(f"{run.folder}: {count} questions test what {config.model} can do")
            warning = foreign_words(config.model, run.tokenizer, run.train_set)
            if warning:
                print(warning)
            run.test("base")
        for number in range(1, config.rounds + 1):
            if not run.tested(f"grpo-{number}"):
                grpo_stage(run, number)
                run.test(f"grpo-{number}")
            if config.ofsd and not run.tested(f"ofsd-{number}"):
                edges = ofsd_stage(run, number)
                run.test(f"ofsd-{number}", edges)
    run.report()


# -------------------------------------------------------------------------------- GRPO

COLUMNS = [
    "reward",
    "zero_var",
    "clip_frac",
    "entropy",
    "grad_norm",
    "length",
    "searches",
    "no_answer",
    "repeats",
    "logprob_gap",
]


def grpo_stage(run: Run, round_number: int) -> None:
    """config.grpo_steps steps: fresh trajectories, then one update on them, or more."""
    config = run.config
    stage = f"grpo-{round_number}"
    columns = [*COLUMNS, "kl"] if config.kl_coef > 0 else COLUMNS
    if config.grpo_lora_rank > 0:
        add_adapters(run.model, config.grpo_lora_rank)
    optimizer = new_optimizer(run.model, config.grpo_lr)
    steps_done = run.begin_stage(stage, optimizer=optimizer)
    history = []
    print(f"\n{stage}: {config.grpo_steps} steps\n{step_heading(columns)}")
    for step in range(steps_done + 1, config.grpo_steps + 1):
        began = time.time()

        # 1. A group of trajectories for each question of a batch, and their rewards.
        questions = run.next_questions(config.questions_per_step)
        trajectories = run.sample(
            questions, group_size=config.group_size, progress="rollout"
        )
        rewards = torch.tensor(float_rewards(questions, trajectories))  # (Q * G,)
        rewards = rewards.view(-1, config.group_size)  # (Q, G)
        sampled_s = time.time() - began

        # 2. The learning rate falls linearly, to 0 at the end of all rounds.
        steps_before = (round_number - 1) * config.grpo_steps + step - 1
        progress = steps_before / (config.rounds * config.grpo_steps)
        optimizer.param_groups[0]["lr"] = config.grpo_lr * (1 - progress)

        # 3. One update, or several, on the same trajectories.
        updates = []
        for _ in range(config.updates):
            update = grpo_step(
                run.model,
                optimizer,
                trajectories,
                rewards,
                ref_model=run.ref_model,
                clip_eps=config.clip_eps,
                kl_coef=config.kl_coef,
                norm=config.norm,
                max_len=config.max_tokens,
                micro_batch=config.micro_batch,
                max_grad_norm=config.max_grad_norm,
            )
            updates.append(update)

        # 4. Log the last update, but the first one's gap, and the mean gradient norm.
        stats = dict(updates[-1])
        stats["logprob_gap"] = updates[0]["logprob_gap"]  # in float32 below .001
        norms = [update["grad_norm"] for update in updates]
        stats["grad_norm"] = sum(norms) / len(norms)
        stats.update(batch_stats(trajectories, rewards))
        stats["rollout_s"] = sampled_s
        stats["step_s"] = time.time() - began
        print(step_line(step, stats, columns, stats["step_s"]))
        history.append(stats)
        if steps_done == 0 and nothing_earned(history):
            print(NOTHING_EARNED)
        run.log_group(stage, step, questions, trajectories, rewards)
        run.end_step(stage, step, stats)
    merge_adapters(run.model)


def new_optimizer(model, lr: float) -> torch.optim.AdamW:
    """Of all that is trained: the adapters where there are any, else every weight."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def float_rewards(questions: list[dict], trajectories: list[Trajectory]) -> list[float]:
    """rewards_of as plain floats, whatever kind of number a reward is."""
    return [float(reward) for reward in rewards_of(questions, trajectories)]


# -------------------------------------------------------------------------------- OFSD


def ofsd_stage(run: Run, round_number: int) -> dict:
    """Mine pairs, and distil them. Returns the teacher's edges, for the log."""
    stage = f"ofsd-{round_number}"
    if run.mined is None:  # else this run resumes within the stage
        run.mined = mine_stage(run, stage)
        run.checkpoint(stage, 0)
    if run.mined["batches"]:
        distil(run, stage, run.mined["batches"])
    return run.mined["edges"]


def distil(run: Run, stage: str, batches: list[list[Pair]]) -> None:
    """One update for each batch of pairs: the student is pulled towards the teacher."""
    config = run.config
    # The teacher is the policy as it is now. If adapters are trained, it is the same
    # model, with its adapters off.
    if config.lora_rank > 0:
        add_adapters(run.model, config.lora_rank)
        teacher = run.model
    else:
        teacher = frozen_copy(run.model)
    optimizer = new_optimizer(run.model, config.ofsd_lr)
    steps_done = run.begin_stage(stage, optimizer=optimizer, teacher=teacher)

    columns = ["loss", "grad_norm"]
    print(step_heading(columns))
    for step in range(steps_done + 1, len(batches) + 1):
        began = time.time()
        stats = ofsd_step(
            run.model,
            teacher,
            optimizer,
            batches[step - 1],
            kind=config.divergence,
            clip=config.clip,
            tau=config.tau,
            micro_batch=config.micro_batch,
            max_grad_norm=config.max_grad_norm,
        )
        print(step_line(step, stats, columns, time.time() - began))
        run.end_step(stage, step, stats)
    merge_adapters(run.model)


def mine_stage(run: Run, stage: str) -> dict:
    """{"batches": the pairs to distil, in the order of their updates, "edges": the
    teacher's}. There are no batches if the stage is skipped."""
    config = run.config
    began = time.time()

    # 1. Sample a pool of groups, and mine it.
    count = config.ofsd_questions or len(run.train_set)
    count = min(count, len(run.train_set))
    questions = run.rng.sample(run.train_set, count)
    pool = run.sample(questions, group_size=config.group_size, progress="pool")
    pairs, counts = mine_pairs(
        run.model,
        run.tokenizer,
        questions,
        pool,
        float_rewards(questions, pool),
        config.max_privileged_tokens,
        config.students,
    )
    counted = ", ".join(f"{number} {name}" for name, number in counts.items())
    print(f"\n{stage}: {len(questions)} questions, {counted}")

    # 2. Is the teacher worth listening to?
    edges = {"edge": None, "edge_supported": None, "edge_control": None}
    skipped = True
    if not pairs:
        print("skipped: no pair to learn from")
    else:
        edges = teacher_edge(run, first_pairs(pairs))
        gains = ", ".join(f"{name} {gain:+.3f}" for name, gain in edges.items())
        print(f"the teacher's {gains}")
        skipped = edges["edge_supported"] <= 0 and not config.force_ofsd
        if skipped:
            print("skipped: no supported edge (--force-ofsd distils anyway)")
    mining_s = time.time() - began
    run.log("mining", stage, **counts, **edges, skipped=skipped, mining_s=mining_s)
    run.log_pairs(stage, pairs)

    # 3. Batches, in a fresh order each epoch.
    batches = []
    if not skipped:
        for _ in range(config.ofsd_epochs):
            order = run.rng.sample(pairs, len(pairs))
            starts = range(0, len(order), config.ofsd_batch)
            batches += [order[start : start + config.ofsd_batch] for start in starts]
    return {"batches": batches, "edges": edges}


def first_pairs(pairs: list[Pair]) -> list[Pair]:
    """The first pair of each question."""
    first = []
    for pair in pairs:  # those of one question stand together
        if not first or pair.question is not first[-1].question:
            first.append(pair)
    return first


def teacher_edge(run: Run, pairs: list[Pair]) -> dict[str, float]:
    """How much better the policy is when its prompt shows a reference, in EM.

    The samples are fresh, since the old ones chose the pairs: one per pair and prompt,
    at temperature 1. edge: with the pair's own reference. edge_supported: the same, but
    an answer counts only if a passage that the same response retrieved contains it.
    edge_control: with the next pair's reference. Does it matter whose it is? (It is the
    pair's own if the other does not fit, or if there is no other pair.)
    """
    questions = [pair.question for pair in pairs]
    own_prompts = [pair.prompt for pair in pairs]
    other_prompts = []
    for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
        prompt = privileged_prompt(
            run.tokenizer,
            pair.question["question"],
            other.reference,
            run.config.max_privileged_tokens,
        )
        other_prompts.append(prompt or pair.prompt)

    trajectories = run.sample(questions, prompts=None, progress="student")
    student = score(questions, trajectories)
    trajectories = run.sample(questions, prompts=own_prompts, progress="teacher")
    teacher = score(questions, trajectories)
    trajectories = run.sample(questions, prompts=other_prompts, progress="control")
    control = score(questions, trajectories)
    return {
        "edge": teacher["em"] - student["em"],
        "edge_supported": teacher["em_supported"] - student["em_supported"],
        "edge_control": control["em"] - student["em"],
    }


# ---------------------------------------------------------------------------- settings


@dataclass
class Config:
    """Every field is a flag, and a key in a --config file."""

    model: str = setting("micro/model", "where the policy starts: a folder or hub name")
    questions: str = setting(
        "micro/train.jsonl", "JSON lines, or hub/dataset:config:split, or A,B"
    )
    eval_questions: str = setting("micro/test.jsonl", "questions of the tests")
    corpus: str = setting(
        "micro/corpus.jsonl", "passages; CORPUS.bm25 may be their saved index"
    )
    retriever_url: str = setting(
        "", "a server with Search-R1's protocol, in place of a corpus"
    )
    out: str = setting(
        "", "folder of this run, a new one; if empty, runs/ and the date"
    )
    seed: int = setting(0, "seed of everything random", zero=True)
    rounds: int = setting(2, "rounds of GRPO and then OFSD", zero=True)
    ofsd: bool = setting(True, "the OFSD stages; without them GRPO alone")

    # The search environment.
    max_searches: int = setting(4, "searches per trajectory", zero=True)
    k: int = setting(3, "passages per search")
    max_tokens: int = setting(2048, "tokens of a response, observations included")
    max_turn_tokens: int = setting(256, "tokens of a turn")
    max_observation_tokens: int = setting(512, "tokens of an observation")
    prompt: str = setting("", "wording of the prompt, with {question} in it")
    date: str = setting(
        "", "the date for a chat template that asks, as 2026-01-31; if empty, today"
    )

    # GRPO.
    grpo_steps: int = setting(12, "steps per round", zero=True)
    questions_per_step: int = setting(16, "groups per step")
    group_size: int = setting(5, "trajectories per question: G, and K in OFSD")
    grpo_lr: float = setting(3e-4, "learning rate of GRPO, which falls linearly to 0")
    updates: int = setting(1, "updates on each batch of trajectories")
    clip_eps: float = setting(0.2, "epsilon of the clipped ratio")
    kl_coef: float = setting(0.0, "beta, the weight of the k3 penalty", zero=True)
    norm: str = setting(
        "token", "how the loss is normalized", choices=("token", "grpo", "dr_grpo")
    )
    grpo_lora_rank: int = setting(
        0, "GRPO trains adapters of this rank (0: all weights)", zero=True
    )

    # OFSD.
    ofsd_questions: int = setting(
        200, "questions sampled for a stage (0: all)", zero=True
    )
    ofsd_epochs: int = setting(2, "passes over the mined pairs", zero=True)
    ofsd_batch: int = setting(16, "pairs per update")
    ofsd_lr: float = setting(5e-4, "learning rate of OFSD")
    students: int = setting(1, "trajectories of a question that OFSD corrects, at most")
    divergence: str = setting(
        "forward_kl",
        "divergence in the loss",
        choices=("forward_kl", "reverse_kl", "jsd"),
    )
    clip: str = setting(
        "none",
        "clip of the divergence (paper: entry)",
        choices=("none", "entry", "position"),
    )
    tau: float = setting(0.05, "clipping threshold, in nats")
    max_privileged_tokens: int = setting(
        224, "tokens of the privileged prompt, whose passages are cut to fit"
    )
    lora_rank: int = setting(
        0, "OFSD trains adapters of this rank (0: all weights)", zero=True
    )
    force_ofsd: bool = setting(
        False, "distil even where the teacher has no supported edge"
    )

    # Hardware, files and evaluation.
    device: str = setting(
        "auto", "auto: the NVIDIA GPU if there is one; mps is untried", choices=DEVICES
    )
    arithmetic: str = setting(
        "auto",
        "precision of matrix products; auto: bfloat16 on a GPU that has it in hardware",
        choices=ARITHMETICS,
    )
    micro_batch: int = setting(20, "sequences per forward pass in training")
    gradient_checkpointing: bool = setting(False, "less memory, a third more time")
    rollout_batch: int = setting(256, "trajectories in flight while sampling")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    save_every: int = setting(10, "steps between two checkpoints")
    keep_stages: bool = setting(False, "keep the model of each stage, in stages/")
    eval_limit: int = setting(
        0, "evaluate on only this many questions (0: all)", zero=True
    )

    def __post_init__(self):
        check_settings(self)
        if self.prompt and "{question}" not in self.prompt:
            raise BadInput(
                "prompt must hold {question}, in the place where the question goes"
            )


def main() -> None:
    config, resume = parse_flags(Config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    if "LOCAL_RANK" in os.environ:  # one of torchrun's processes
        join_other_ranks()
    train(config, resume)
    if dist.is_initialized():  # its threads must end before Python does
        dist.destroy_process_group()


def join_other_ranks() -> None:
    """Take this rank's GPU, and leave the terminal to rank 0."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    if dist.get_rank() > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_script(main)
