"""What fits on a card? Peak GPU memory of sampling, of a GRPO step and of an OFSD step.

    python bench/card.py                    # Qwen2.5's three shapes; a minute on an H100
    python bench/card.py --adapters 16      # the same, where adapters are trained

The models have random weights in Qwen2.5's shapes, so nothing is downloaded. The trajectories are
random ids, 1,500 tokens in four turns, 400 of them sampled. Of 8 trajectories one has the reward 1,
so all have a gradient. The teacher reads 3,500 tokens. Sampling fills the cache of 64 trajectories
with 1,500 tokens each, a chunk of 500 at a time, and then samples 20 tokens. Settings, as in
configs/: micro-batches of 4, gradient checkpointing. The first row of a shape is what it holds
before a step: weights, pi_ref, and the teacher, if it is a copy. Seconds are of the second of two
steps. A CPU is refused, since it measures nothing like this.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from grpo import frozen_copy, grpo_step  # noqa: E402
from ofsd import Pair, ofsd_step, trainable  # noqa: E402
from retriever import BadInput, run_script  # noqa: E402
from rollout import RowCache, Trajectory, sample  # noqa: E402
from train import Config  # noqa: E402

SHAPES = {  # width, layers, heads, key-value heads, width of the middle layer
    "0.5B": (896, 24, 14, 2, 4864),
    "1.5B": (1536, 28, 12, 2, 8960),
    "3B": (2048, 36, 16, 2, 11008),
}


def make_model(name: str, device: str):
    width, layers, heads, shared, middle = SHAPES[name]
    config = AutoConfig.for_model(
        "qwen2", vocab_size=151_936, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, intermediate_size=middle,
        tie_word_embeddings=True, max_position_embeddings=32_768,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_trajectory(vocabulary: int, sampled: int, length: int) -> Trajectory:
    """Four turns of sampled / 4 tokens each, and observations between them."""
    trajectory = Trajectory("?", torch.randint(vocabulary, (150,)).tolist())
    for turn in range(4):
        said = torch.randint(vocabulary, (sampled // 4,)).tolist()
        trajectory.extend(said, [-12.0] * len(said))
        if turn < 3:
            trajectory.extend(torch.randint(vocabulary, ((length - sampled) // 3,)).tolist())
    return trajectory


def measured(title: str, function) -> None:
    """Peak memory of two calls, and the time of the second."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        function()
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"    {title:34}{peak:7.1f} GB{time.perf_counter() - began:9.2f} s", flush=True)
    except torch.cuda.OutOfMemoryError:
        print(f"    {title:34}does not fit", flush=True)


def run(name: str, rank: int) -> None:
    torch.manual_seed(0)
    model = make_model(name, "cuda")
    vocabulary = model.config.vocab_size
    model.activation_checkpointing_enable()
    start, teacher = frozen_copy(model), model if rank else frozen_copy(model)
    optimizer = trainable(model, rank, 1e-7)
    count = sum(p.numel() for p in model.parameters())
    held = torch.cuda.memory_allocated() / 1e9
    print(f"{name}: {count / 1e9:.2f} e9 parameters; at rest {held:.1f} GB", flush=True)
    config = Config(micro_batch=4, group_size=8, gradient_checkpointing=True)
    trajectories = [make_trajectory(vocabulary, 400, 1500) for _ in range(8)]

    def sampling():
        cache, rows = RowCache(model), 64
        for _ in range(3):
            cache.feed(torch.randint(vocabulary, (rows, 500)).tolist())
        logits = cache.feed([[1]] * rows)
        for _ in range(20):
            tokens, _ = sample(logits, 1.0)
            logits = cache.feed([[token] for token in tokens])

    measured("sampling, 64 in flight", sampling)
    rewards = torch.tensor([[1.0] + [0.0] * 7])
    given = model, start, optimizer, trajectories, rewards, config
    measured("GRPO, 8 trajectories", lambda: grpo_step(*given))
    prompt = torch.randint(vocabulary, (2000,)).tolist()
    pairs = [Pair({}, t, t, prompt, []) for t in trajectories]
    measured("OFSD, 8 pairs", lambda: ofsd_step(model, teacher, optimizer, pairs, config))


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak GPU memory, measured.")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--adapters", type=int, default=0, help="rank of adapters (0: all weights)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("no GPU here, and nothing to measure without one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, adapters: {args.adapters}")
    for name in args.shapes:
        run(name, args.adapters)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_script(main)
