"""Run by test_ranks.py, with and without torchrun.

    python -m tests.system.ranks steps FILE RANK

Steps of both losses on one fixed batch. The first process keeps the policy, trained
with adapters of this rank (0: all weights).

    python -m tests.system.ranks stop NUMBER ...

train.py ..., stopped at this checkpoint.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train
from eval import load_questions, rewards_of
from grpo import grpo_step
from machinery.adapters import add_adapters, merge_adapters
from machinery.models import frozen_copy, load_model
from machinery.ranks import rank
from machinery.run import Run
from ofsd import Pair, ofsd_step
from retriever import open_index
from rollout import rollout
from train import new_optimizer

ROOT = Path(__file__).resolve().parent.parent.parent


def steps(target: str, lora_rank: int) -> None:
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(ROOT / "micro/model"))
    reference = frozen_copy(model)
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:5]
    index = open_index(ROOT / "micro/corpus.jsonl")
    asked = [question["question"] for question in questions]
    rows = rollout(model, tokenizer, index, asked, group_size=3, seed=0)
    rewards = torch.tensor(rewards_of(questions, rows)).view(5, 3)
    assert (rewards != rewards[:, :1]).any()
    torch.manual_seed(rank())  # what a rank draws for itself must not matter
    if lora_rank > 0:
        add_adapters(model, lora_rank)
    optimizer = new_optimizer(model, 1e-4)
    stats = []
    for _ in range(2):
        update = grpo_step(
            model,
            optimizer,
            rows,
            rewards,
            ref_model=reference,
            kl_coef=0.1,
            micro_batch=4,
        )
        stats.append(update)
    pairs = []
    for number in (0, 3, 6):
        shown = rows[number].prompt_ids + rows[number].response_ids
        pairs.append(Pair({}, rows[number], rows[number + 1], shown, []))
    # One micro-batch: nothing is left for the second process.
    stats.append(ofsd_step(model, reference, optimizer, pairs, micro_batch=100))
    merge_adapters(model)
    if rank() == 0:
        weights = [parameter.detach() for parameter in model.parameters()]
        torch.save({"stats": stats, "weights": weights}, target)
    if dist.is_initialized():
        dist.destroy_process_group()
        # A thread that outlives the group can abort the process at its end. Linux lists
        # them here.
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        assert not [name for name in names if "gloo" in name], names


def stop(number: int) -> None:
    plain = Run.checkpoint
    saved = []

    def checkpoint(run, stage, step):
        plain(run, stage, step)
        saved.append((stage, step))
        if len(saved) == number:
            dist.barrier()  # no process ends before the file is there
            sys.exit(3)

    Run.checkpoint = checkpoint
    train.main()


if __name__ == "__main__":
    if sys.argv[1] == "steps":
        steps(sys.argv[2], int(sys.argv[3]))
    else:
        number = int(sys.argv[2])
        del sys.argv[1:3]
        stop(number)
