"""Models: loading them, checking that they can be sampled and trained exactly, saving.

What is not exact is refused in one line, before any work is done. What a library raises
for a model that it cannot use becomes such a line, too. A mistake in the code of this
repository does not: it shows its traceback.
"""

import contextlib
import copy
import logging
import os
import re
import shutil
import traceback
from datetime import date
from pathlib import Path
from textwrap import shorten

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from grpo import policy_hidden, response_logits, to_logits
from machinery.devices import choose_arithmetic, choose_device
from machinery.errors import BadInput
from machinery.text import chat_ids, decode, encode
from rollout import RowCache, Trajectory, context_length, parse_turn, standard_prompt

ROOT = Path(__file__).resolve().parent.parent

# The norms of transformers that compute as torch.nn.RMSNorm does.
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def load_model(
    name: str,
    device: str = "auto",
    arithmetic: str = "auto",
    *,
    to_train: bool = False,
):
    """(model, tokenizer) from a folder or a hub name. Its weights are float32.

    For device and arithmetic see machinery/devices.py. Raises BadInput for what cannot
    be loaded, or not be sampled exactly, or, if it is to_train, not be trained exactly.
    """
    place = choose_device(device)
    model, tokenizer = read_model(name)
    with refusing(f"cannot use {name}"):
        check_sampling(model, tokenizer)  # on the CPU, where float32 leaves no doubt
        if to_train:
            check_training(model)
    return place_model(model, place, arithmetic), tokenizer


def place_model(model, device: str, arithmetic: str):
    """Move a model to a device that choose_device chose, and note its arithmetic."""
    model.arithmetic = choose_arithmetic(arithmetic, device)
    return model.to(device)


@contextlib.contextmanager
def refusing(beginning: str):
    """A context in which what a library raises becomes a BadInput with this beginning.

    What the code of this repository raises passes, BadInput aside: it is a mistake, and
    its traceback is wanted.
    """
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{beginning}: {error}") from error
    # Families of models fail in ways of their own, in their own code, and the
    # tokenizers library raises Exception itself.
    except Exception as error:
        if raised_here(error):
            raise
        message = shorten(str(error), 400, placeholder=" ...")
        raise BadInput(f"{beginning}: {message}") from error


def raised_here(error: Exception) -> bool:
    """Was it raised by a line of this repository, and not by one of a library?"""
    frames = traceback.extract_tb(error.__traceback__)
    innermost = Path(frames[-1].filename).resolve()
    in_a_library = "site-packages" in innermost.parts
    return innermost.is_relative_to(ROOT) and not in_a_library


def read_model(name: str, day: str = ""):
    """(model, tokenizer) on the CPU, unchecked.

    day, as 2026-01-31, is written into a chat template that asks for the date.
    """
    # One line of ours is enough, in place of the libraries' reports.
    for library in ("huggingface_hub", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    disable_progress_bar()
    with refusing(f"cannot use {name}"):
        check_name(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
        choose_template(tokenizer)
        write_date(tokenizer, day or str(date.today()))
        remove_dropout(config)
        if config._attn_implementation != "eager":  # flash attention, perhaps
            config._attn_implementation = None  # transformers takes what is there
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        check_report(report)
    fuse_norms(model)
    return model.eval(), tokenizer


def fuse_norms(model) -> None:
    """Let torch compute the norms: one operation on a GPU, and not six.

    On a CPU the digits are the same, forward and backward. Only norms of the width of
    the model are taken: those of single heads (Qwen3) see bfloat16 under autocast, and
    there the two differ.
    """
    width = model.config.get_text_config().hidden_size
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ in NORMS and len(norm.weight) == width:
                fused = torch.nn.RMSNorm(width, norm.variance_epsilon)
                fused.weight = norm.weight
                setattr(parent, name, fused)


def check_report(report: dict) -> None:
    """Raise BadInput where weights were drawn at random: anew, at each loading."""
    drawn = sorted(report["missing_keys"])
    drawn += [name for name, *_ in sorted(report["mismatched_keys"])]
    if drawn:
        raise BadInput(
            f"its files lack {len(drawn)} of the weights, or have them in another"
            f" size, such as {drawn[0]}"
        )


def check_name(name: str) -> None:
    """Raise BadInput for what is no folder and cannot be a name on the hub."""
    if not os.path.isdir(name) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise BadInput(
            "there is no such folder, and a model on the hub is called owner/name."
            f" python -m tools.start --out {name} makes a start (docs/real-models.md)"
        )


def choose_template(tokenizer) -> None:
    """Of several chat templates take the default one, as transformers does."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        if "default" not in templates:
            names = ", ".join(templates)
            raise BadInput(f"it has the chat templates {names}, and no default one")
        tokenizer.chat_template = templates["default"]


def write_date(tokenizer, day: str) -> None:
    """Put the date into a chat template that asks for it, so that it never changes."""
    try:
        parsed = date.fromisoformat(day)
    except ValueError as error:
        message = f"--date: a date is written as 2026-01-31, not {day!r}"
        raise BadInput(message) from error

    def written(match: re.Match) -> str:
        return repr(parsed.strftime(match[2]))

    if isinstance(tokenizer.chat_template, str):
        asks = r"strftime_now\((['\"])(.*?)\1\)"
        tokenizer.chat_template = re.sub(asks, written, tokenizer.chat_template)


def remove_dropout(config) -> None:
    """Without dropout, training scores a trajectory as sampling did."""
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def check_sampling(model, tokenizer) -> None:
    """Raise BadInput where sampling would not be exact, or where no turn could end."""
    check_tokenizer(model, tokenizer)

    # The cache keeps the keys and values of each token. They stay right only if a token
    # sees all before it, and if no later token changes its position.
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is None and window:
        kinds = ["sliding_attention"]
    positions = str(getattr(config, "rope_parameters", None))
    rescaled = re.search("dynamic|longrope", positions)
    windows = [
        value
        for name, value in vars(config).items()
        if re.search("window_size$|attention_chunk_size$", name)
    ]
    limit = context_length(model)
    narrow = any(isinstance(size, int) and 0 < size < limit for size in windows)
    if set(kinds) != {"full_attention"} or rescaled or narrow:
        raise BadInput(
            "a token must see all before it, at positions that no later one changes"
        )

    if limit < 8:
        raise BadInput(f"it reads only {limit} tokens at once")

    # Two rows, a long one and a short one, of tokens of all sorts: with the cache and
    # without.
    size = model.get_input_embeddings().weight.shape[0]
    length = min(400, limit - 1)
    ids = (torch.arange(length) * 7919 % size).tolist()
    sequences = [ids, ids[:7]]
    cache = RowCache(model)
    cache.feed([ids[:-1] for ids in sequences])
    cached = cache.feed([ids[-1:] for ids in sequences]).log_softmax(-1)  # (2, V)
    for number, ids in enumerate(sequences):
        logits = model(torch.tensor([ids])).logits[0, -1].float()  # (V,)
        gap = (cached[number] - logits.log_softmax(-1)).abs().max()
        if not gap < 0.01:  # it may be NaN
            raise BadInput(
                f"log-probabilities are off by {gap:.2g} when sampled with a cache"
            )


def check_tokenizer(model, tokenizer) -> None:
    """Raise BadInput where its tokens do not fit the model, or its turns cannot end."""
    size = model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id is None or not 0 < len(tokenizer) <= size:
        raise BadInput(
            "its tokenizer has no end-of-sequence token, or too many tokens, or none"
        )
    chat_ids(tokenizer, standard_prompt(tokenizer, "?"))  # its chat template may raise
    for text in ("<search> Ada </search>", "<answer> Ada </answer>"):
        turn = decode(tokenizer, encode(tokenizer, text))
        if parse_turn(turn) is None:
            raise BadInput(f"its tokenizer reads {text!r} as {turn!r}")


@torch.autocast("cpu", enabled=False)
def check_training(model) -> None:
    """Raise BadInput where a training pass does not see the logits that sampling sees.

    The gap is a total variation: half the sum over the vocabulary of the differences in
    probability. Call it on the CPU, where float32 leaves no doubt.
    """
    if model.base_model is model or model.get_output_embeddings() is None:
        raise BadInput("its layers cannot be used without its output layer")
    probe = Trajectory("", [1], response_ids=[2] * 40, loss_mask=[1] * 40)
    logits = to_logits(model, policy_hidden(model, [probe]))  # (40, V)
    plain = response_logits(model, probe)  # (40, V)
    differences = (logits.softmax(-1) - plain.softmax(-1)).abs()  # (40, V)
    gap = differences.sum(-1).max() / 2
    if not gap < 0.005:  # it may be NaN
        raise BadInput(f"its probabilities are off by {gap:.2g} when it is trained")
    logits.sum().backward()  # this must work, too
    model.zero_grad()


def frozen_copy(model):
    """A copy that is never trained. On a GPU it is rounded to bfloat16 where the model
    computes in it, so a KL to this copy begins a little above 0."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    on_gpu = model.device.type == "cuda"
    if on_gpu and getattr(model, "arithmetic", None) == torch.bfloat16:
        return frozen.bfloat16()
    return frozen


def save_model(model, tokenizer, folder: Path) -> None:
    """Write folder.new, then let it replace the folder.

    A save that is cut short leaves an old folder whole until folder.new is whole.
    Raises BadInput where the disk refuses.
    """
    new = folder.with_name(folder.name + ".new")
    with refusing(f"cannot write {new}"):
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
