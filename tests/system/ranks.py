"""Run by test_ranks.py, with and without torchrun.

    python tests/system/ranks.py steps FILE RANK    steps of both losses on one fixed batch; the
                                                    first process keeps the policy, trained with
                                                    adapters of this rank (0: all weights)
    python tests/system/ranks.py stop NUMBER ...    train.py ..., stopped at this checkpoint
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from eval import load_questions, rewards_of  # noqa: E402
from grpo import frozen_copy, grpo_step, rank_and_ranks  # noqa: E402
from ofsd import Pair, merge_adapters, ofsd_step, trainable  # noqa: E402
from retriever import open_index  # noqa: E402
from rollout import load_model, rollout  # noqa: E402
from train import Config  # noqa: E402


def steps(target: str, lora_rank: int) -> None:
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    torch.set_num_threads(1)
    rank, _ = rank_and_ranks()
    model, tokenizer = load_model(str(ROOT / "micro/model"))
    start = frozen_copy(model)
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:5]
    index, asked = open_index(ROOT / "micro/corpus.jsonl"), [q["question"] for q in questions]
    rows = rollout(model, tokenizer, index, asked, group_size=3, seed=0)
    rewards = torch.tensor(rewards_of(questions, rows)).view(5, 3)
    assert (rewards != rewards[:, :1]).any()
    torch.manual_seed(rank)  # what a rank draws for itself must not matter
    optimizer = trainable(model, lora_rank, 1e-4)
    config = Config(micro_batch=4, kl_coef=0.1)
    stats = [grpo_step(model, start, optimizer, rows, rewards, config) for _ in range(2)]
    shown = [rows[i].prompt_ids + rows[i].response_ids for i in (0, 3, 6)]
    pairs = [Pair({}, rows[i], rows[i + 1], ids, []) for i, ids in zip((0, 3, 6), shown)]
    # One micro-batch: nothing is left for the second process.
    few = ofsd_step(model, start, optimizer, pairs, replace(config, micro_batch=100))
    merge_adapters(model)
    if rank == 0:
        weights = [parameter.detach() for parameter in model.parameters()]
        torch.save({"stats": [*stats, few], "weights": weights}, target)
    if dist.is_initialized():
        dist.destroy_process_group()
        # A thread that outlives the group can abort the process at its end. Linux lists them here.
        alive = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        assert not [name for name in alive if "gloo" in name], alive


def stop(number: int) -> None:
    plain, saved = train.Run.checkpoint, []

    def checkpoint(run, *args, **more):
        plain(run, *args, **more)
        saved.append(args[:2])
        if len(saved) == number:
            dist.barrier()  # no process ends before the file is there
            sys.exit(3)

    train.Run.checkpoint = checkpoint
    train.main()


if __name__ == "__main__":
    if sys.argv[1] == "steps":
        steps(sys.argv[2], int(sys.argv[3]))
    else:
        number = int(sys.argv[2])
        del sys.argv[1:3]
        stop(number)
