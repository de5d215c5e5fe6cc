"""What fits on a card? Peak GPU memory of sampling, of a GRPO step, of an OFSD step.

    python -m bench.card                  # Qwen2.5's three shapes; a minute on an H100
    python -m bench.card --adapters 16    # the same, where adapters are trained

The models have random weights in Qwen2.5's shapes, so nothing is downloaded. The
trajectories are random ids: 1,500 tokens in four turns, 400 of them sampled. Of 8
trajectories one has the reward 1, so all have a gradient. The teacher reads 3,500
tokens. Sampling fills the cache of 64 trajectories with 1,500 tokens each, 500 at a
time, and then samples 20 tokens. Settings are those of configs/: micro-batches of 4,
gradient checkpointing, no penalty and so no reference policy.

The first line of a shape is what it holds before a step: the weights, and the teacher
if it is a copy. Seconds are those of the second of two steps. A CPU is refused, since
it measures nothing like this.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo import grpo_step
from machinery.adapters import add_adapters
from machinery.devices import arithmetic, frozen_kept
from machinery.errors import BadInput
from machinery.models import frozen_copy
from machinery.terminal import Parser, run_script
from ofsd import Pair, ofsd_step
from rollout import RowCache, Trajectory, sample

VOCABULARY = 151_936
PROMPT = 150  # tokens
RESPONSE = 1500  # tokens, observations included
SAMPLED = 400  # of them the policy's
TURNS = 4
PRIVILEGED = 2000  # tokens of the privileged prompt
TRAJECTORIES = 8
IN_FLIGHT = 64
MICRO_BATCH = 4


class Shape(NamedTuple):
    """The sizes in which Qwen2.5's models differ."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    middle_width: int


SHAPES = {
    "0.5B": Shape(896, 24, 14, 2, 4864),
    "1.5B": Shape(1536, 28, 12, 2, 8960),
    "3B": Shape(2048, 36, 16, 2, 11008),
}


def make_model(shape: Shape):
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.middle_width,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def random_ids(count: int) -> list[int]:
    return torch.randint(VOCABULARY, (count,)).tolist()


def make_trajectory() -> Trajectory:
    """Turns of sampled tokens, and observations between them."""
    trajectory = Trajectory("?", random_ids(PROMPT))
    turn_length = SAMPLED // TURNS
    observation_length = (RESPONSE - SAMPLED) // (TURNS - 1)
    for turn in range(TURNS):
        trajectory.extend(random_ids(turn_length), [-12.0] * turn_length)
        if turn < TURNS - 1:
            trajectory.extend(random_ids(observation_length))
    return trajectory


@torch.no_grad()
def sample_some(model) -> None:
    """Fill the cache as observations do, then sample 20 tokens a trajectory."""
    cache = RowCache(model)
    with arithmetic(model), frozen_kept(model):
        for _ in range(3):
            cache.feed([random_ids(RESPONSE // 3) for _ in range(IN_FLIGHT)])
        logits = cache.feed([[1]] * IN_FLIGHT)  # (n, V)
        for _ in range(20):
            tokens, _ = sample(logits, 1.0)
            logits = cache.feed([[token] for token in tokens])  # (n, V)


def measure(title: str, function: Callable[[], object]) -> None:
    """Print the peak memory of two calls, and the time of the second."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        function()
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        print(f"    {title:34}does not fit", flush=True)
        return
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"    {title:34}{peak:7.1f} GB{seconds:9.2f} s", flush=True)


def measure_shape(name: str, rank: int) -> None:
    """All lines of one shape. rank: of adapters, 0 where all weights are trained."""
    torch.manual_seed(0)
    model = make_model(SHAPES[name])
    model.activation_checkpointing_enable()
    if rank:
        add_adapters(model, rank)
        teacher = model  # itself, without its adapters
    else:
        teacher = frozen_copy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-7, weight_decay=0.0)
    count = sum(parameter.numel() for parameter in model.parameters())
    held = torch.cuda.memory_allocated() / 1e9
    print(f"{name}: {count / 1e9:.2f} e9 parameters; at rest {held:.1f} GB", flush=True)

    trajectories = [make_trajectory() for _ in range(TRAJECTORIES)]
    rewards = torch.zeros(1, TRAJECTORIES)
    rewards[0, 0] = 1.0
    prompt = random_ids(PRIVILEGED)
    pairs = [Pair({}, t, t, prompt, []) for t in trajectories]

    def grpo() -> None:
        grpo_step(model, optimizer, trajectories, rewards, micro_batch=MICRO_BATCH)

    def ofsd() -> None:
        ofsd_step(model, teacher, optimizer, pairs, micro_batch=MICRO_BATCH)

    measure(f"sampling, {IN_FLIGHT} in flight", lambda: sample_some(model))
    measure(f"GRPO, {TRAJECTORIES} trajectories", grpo)
    measure(f"OFSD, {TRAJECTORIES} pairs", ofsd)


def main() -> None:
    parser = Parser(description="Peak GPU memory, measured.")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument(
        "--adapters", type=int, default=0, help="rank of adapters (0: all weights)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("no GPU here, and nothing to measure without one")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, adapters: {args.adapters}")
    for name in args.shapes:
        measure_shape(name, args.adapters)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_script(main)
