"""What does a decoding step do outside its matrix products? Counted by the profiler.

    python -m bench.decode_ops          # 30 layers, random weights; half a minute

The model has the shape of SmolLM2-135M: 30 layers, width 576, 9 heads and 3 of keys. A
decoding step is what sample_turns does for each token: the cache reads the last token
of each row, and sample draws the next one. Counted are, for each step:

operations       all that compute or copy, but no matrix products and no attention. One
                 that another one calls counts with it. Views are not counted
copies           those of the operations that copy: casts, mostly
synchronisations where Python reads a value, so that a GPU must have finished

Time is the median of a step, in milliseconds. The last line has adapters
of rank 8 beside frozen weights. On a CPU torch.nn.RMSNorm still takes six steps inside
the one operation that is counted. On a GPU it is one.
"""

import time
from collections import Counter
from statistics import median

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from machinery.adapters import add_adapters
from machinery.devices import arithmetic, choose_device, frozen_kept
from machinery.models import fuse_norms
from machinery.terminal import Parser, run_script
from rollout import RowCache, sample

STEPS = 16

# The products themselves, and what only hands over to them. Inside them we still look
# for casts and for work on the mask.
PRODUCTS = {
    "aten::linear",
    "aten::matmul",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_efficient_attention_forward",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_cudnn_attention_forward",
}

# These compute nothing: they return a view, allocate, or hand over to another one.
NOTHING = {
    "aten::_reshape_alias",
    "aten::_to_copy",
    "aten::_unsafe_view",
    "aten::alias",
    "aten::as_strided",
    "aten::clone",
    "aten::contiguous",
    "aten::detach",
    "aten::detach_",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::expand",
    "aten::expand_as",
    "aten::flatten",
    "aten::lift_fresh",
    "aten::narrow",
    "aten::permute",
    "aten::reshape",
    "aten::resize_",
    "aten::resolve_conj",
    "aten::resolve_neg",
    "aten::result_type",
    "aten::select",
    "aten::slice",
    "aten::squeeze",
    "aten::t",
    "aten::to",
    "aten::transpose",
    "aten::unsqueeze",
    "aten::view",
}


class Reads(TorchFunctionMode):
    """Counts where Python reads values of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.item):
            self.count += 1
        return func(*args, **(kwargs or {}))


def make_model(layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    fuse_norms(model)  # as load_model does
    return model


def step(cache: RowCache, tokens: list[int]) -> list[int]:
    """One decoding step: the next token of each row."""
    logits = cache.feed([[token] for token in tokens])  # (n, V)
    chosen, _ = sample(logits, 1.0)
    return chosen


def computes(event) -> bool:
    return event.name.startswith("aten::") and event.name not in PRODUCTS | NOTHING


def is_part(event) -> bool:
    """Whether another operation that computes has called this one."""
    caller = event.cpu_parent
    while caller is not None:
        if computes(caller):
            return True
        caller = caller.cpu_parent
    return False


def count_operations(events) -> Counter:
    """How often each operation was called, as the docstring above counts them."""
    counts = Counter()
    for event in events:
        if computes(event) and not is_part(event):
            counts[event.name] += 1
    return counts


@torch.no_grad()
def measure(title: str, model, rows: int, most: int) -> None:
    """Print a line for this model, and its `most` frequent operations."""
    with arithmetic(model), frozen_kept(model):
        cache = RowCache(model)
        cache.feed([[1 + row] * 100 for row in range(rows)])
        tokens = [1] * rows
        seconds = []
        for _ in range(STEPS):
            began = time.perf_counter()
            tokens = step(cache, tokens)
            seconds.append(time.perf_counter() - began)
        with Reads() as reads, profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(STEPS):
                tokens = step(cache, tokens)
    counts = count_operations(profiler.events())
    copies = counts["aten::copy_"]
    synchronisations = reads.count + counts["aten::_local_scalar_dense"]
    print(f"{title:22}{counts.total() / STEPS:12.1f}{copies / STEPS:9.1f}", end="")
    print(f"{synchronisations / STEPS:19.1f}{median(seconds) * 1000:9.1f}", flush=True)
    for name, count in counts.most_common(most):
        print(f"    {name:36}{count / STEPS:8.1f}")


def main() -> None:
    parser = Parser(description="Count a decoding step's operations.")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--most", type=int, default=0, help="operations to list")
    args = parser.parse_args()
    model = make_model(args.layers, args.vocabulary).to(choose_device("auto"))
    print(f"{args.layers} layers, {args.rows} rows, {model.device}, ", end="")
    print(f"torch {torch.__version__}, threads: {torch.get_num_threads()}")
    print(f"{'':22}{'operations':>12}{'copies':>9}", end="")
    print(f"{'synchronisations':>19}{'ms':>9}")
    model.arithmetic = torch.float32
    measure("float32", model, args.rows, args.most)
    model.arithmetic = torch.bfloat16
    measure("bfloat16", model, args.rows, args.most)
    add_adapters(model, rank=8)
    measure("bfloat16, adapters", model, args.rows, args.most)


if __name__ == "__main__":
    run_script(main)
