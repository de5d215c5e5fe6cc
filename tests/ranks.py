"""Run by test_ranks.py, with and without torchrun: steps of both losses on one fixed batch; rank 0 keeps the policy."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import exact_match, load_questions  # noqa: E402
from grpo import frozen_copy, grpo_step, rank_and_ranks  # noqa: E402
from ofsd import ofsd_step  # noqa: E402
from retriever import open_index  # noqa: E402
from rollout import load_model, rollout  # noqa: E402
from train import Config, trainable  # noqa: E402


def main(target: str, lora_rank: int) -> None:
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    torch.set_num_threads(1)
    rank, _ = rank_and_ranks()
    model, tokenizer = load_model(str(ROOT / "micro/model"))
    start = frozen_copy(model)
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:5]
    index = open_index(ROOT / "micro/corpus.jsonl")
    rows = rollout(model, tokenizer, index, [q["question"] for q in questions], group_size=3, seed=0)
    rewards = torch.tensor([[exact_match(t.answer, q["golden_answers"]) for t in rows[3 * i : 3 * i + 3]] for i, q in enumerate(questions)])
    assert (rewards != rewards[:, :1]).any()
    torch.manual_seed(rank)  # what a rank draws for itself must not matter
    adapters, trained = trainable(model, lora_rank)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    config = Config(micro_batch=4, kl_coef=0.1, updates=2)
    stats = grpo_step(model, start, optimizer, rows, rewards, config)
    pairs = [(rows[i + 1], rows[i].prompt_ids + rows[i].response_ids) for i in (0, 3, 6)]
    few = ofsd_step(model, start, optimizer, pairs, replace(config, micro_batch=100))  # one micro-batch: none for rank 1
    if adapters:
        adapters.merge()
    if rank == 0:
        torch.save({"stats": [stats, few], "weights": [p.detach() for p in model.parameters()]}, target)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
