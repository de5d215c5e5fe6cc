"""Peak memory and time of the losses at a vocabulary of 151,936: plain, in chunks, and TRL's.

    python bench/losses.py                  # 500 and 1,000 positions; 3 minutes on 2 cores, 6 GB
    python bench/losses.py --positions 250  # smaller

A hidden state of width --hidden stands for the model; the output layer is a real one. Each row
is a process of its own: forward and backward of (1) GRPO's log-probabilities, with the entropies
that are logged, and (2) the forward KL to a teacher. Peak: the largest resident size above that
before the loss, or on a GPU the most memory that torch held above that. Time: the median of
--repeats runs after one that warms up. plain is the formula on the logits of all positions; chunks
is what training uses (backward_in_chunks of grpo.py).
TRL's functions (skipped where trl is not installed) are those its trainers call without a fused
kernel: selective_log_softmax with entropy_from_logits, the full-vocabulary loss of its
self-distillation, and the chunked divergence of its distillation trainer.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from bench.memory import resident  # noqa: E402
from grpo import backward_in_chunks, token_entropies, token_logprobs  # noqa: E402
from ofsd import divergences  # noqa: E402

VOCABULARY = 151_936


def model(head):
    """What backward_in_chunks needs of a model."""
    config = SimpleNamespace(vocab_size=head.out_features)
    config.get_text_config = lambda: config
    device = head.weight.device
    return SimpleNamespace(config=config, device=device, get_output_embeddings=lambda: head)


def grpo_plain(head, hidden, teacher_hidden, ids):
    logits = head(hidden)  # (N, V)
    token_entropies(logits).sum()
    token_logprobs(logits, ids).mean().backward()


def grpo_chunks(head, hidden, teacher_hidden, ids):
    def loss(logits, ids_):
        token_entropies(logits).sum()
        return token_logprobs(logits, ids_).sum() / len(ids), {}

    backward_in_chunks(model(head), loss, hidden, ids)


def grpo_trl(head, hidden, teacher_hidden, ids):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = head(hidden)
    with torch.no_grad():
        entropy_from_logits(logits).sum()
    selective_log_softmax(logits, ids).mean().backward()


def ofsd_plain(head, hidden, teacher_hidden, ids):
    with torch.no_grad():
        teacher = head(teacher_hidden)  # (N, V)
    divergences(head(hidden), teacher).mean().backward()


def ofsd_chunks(head, hidden, teacher_hidden, ids):
    def loss(logits, teacher_hidden):
        with torch.no_grad():
            teacher = head(teacher_hidden)  # (n, V)
        return divergences(logits, teacher).sum() / len(ids), {}

    backward_in_chunks(model(head), loss, hidden, teacher_hidden)


def ofsd_trl(head, hidden, teacher_hidden, ids):
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    with torch.no_grad():
        teacher = head(teacher_hidden)
    student = head(hidden)
    loss = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=0.0)
    loss.mean().backward()


def ofsd_trl_chunks(head, hidden, teacher_hidden, ids):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    states, weights = (hidden[None], teacher_hidden[None]), (head.weight, head.weight.detach())
    loss = _chunked_divergence_loss(*states, *weights, torch.ones(1, len(ids)), beta=0.0)[0]
    loss.backward()


WAYS = {
    "GRPO plain": grpo_plain, "GRPO chunks": grpo_chunks, "GRPO TRL": grpo_trl,
    "OFSD plain": ofsd_plain, "OFSD chunks": ofsd_chunks, "OFSD TRL": ofsd_trl,
    "OFSD TRL chunks": ofsd_trl_chunks,
}  # fmt: skip


def measure(name: str, positions: int, width: int, repeats: int) -> dict:
    """In a fresh process: the norms of both gradients, peak bytes above the start, seconds."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else "cpu")

    def now(name: str) -> int:
        """Bytes of memory held now (VmRSS), or at most so far (VmHWM)."""
        if not on_gpu:
            return resident(name)
        torch.cuda.synchronize()
        peak = name == "VmHWM"
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()

    def inputs(vocabulary, positions):
        head = torch.nn.Linear(width, vocabulary, bias=False)
        hidden = torch.randn(positions, width, requires_grad=True)
        teacher_hidden = hidden.detach() + 0.3 * torch.randn(positions, width)
        return head, hidden, teacher_hidden, torch.randint(vocabulary, (positions,))

    WAYS[name](*inputs(1000, 4))  # imports and thread pools are not the loss's
    head, hidden, teacher_hidden, ids = inputs(VOCABULARY, positions)
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)
    before, seconds = now("VmRSS"), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        WAYS[name](head, hidden, teacher_hidden, ids)
        now("VmRSS")  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    norms = [(x.grad.norm() / (repeats + 1)).item() for x in (hidden, head.weight)]
    return {"norms": norms, "peak": now("VmHWM") - before, "seconds": median(seconds[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of the losses, side by side.")
    parser.add_argument("--positions", type=int, nargs="+", default=[500, 1000])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"vocabulary {VOCABULARY}, hidden width {args.hidden}, float32, "
          f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    print(f"\n{'':18}{'positions':>10}{'peak MB':>9}{'of plain':>10}{'seconds':>9}{'of plain':>10}"
          f"{'gradients of states and layer':>32}")  # fmt: skip
    for positions in args.positions:
        for name in WAYS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                try:
                    got = pool.submit(measure, name, positions, args.hidden, args.repeats).result()
                except ImportError as error:
                    print(f"{name:18} is skipped: {error}")
                    continue
            plain = got if name.endswith("plain") else plain
            share = {key: got[key] / plain[key] for key in ("peak", "seconds")}
            states, layer = got["norms"]
            print(f"{name:18}{positions:10}{got['peak'] / 1e6:9.0f}{share['peak']:10.2f}"
                  f"{got['seconds']:9.4f}{share['seconds']:10.2f}{states:18.5e}{layer:14.5e}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
