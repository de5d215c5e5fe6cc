"""Rollouts: the policy thinks, searches, reads and answers, and every token is kept as sampled.

A trajectory y is a sequence of turns. In each the policy samples until it has written </search>
or </answer>, and after a search the environment writes what the retriever found:

    y   = (o_1, e_1, o_2, e_2, ..., o_n)       o_i ~ pi(. | P(q), o_1, e_1, ..., o_(i-1), e_(i-1))
    o_i = <think>...</think> <search>query</search>       and at last   <answer>...</answer>
    e_i = <information>passages</information>             written: loss_mask 0 (Trajectory.extend)

Whether a turn is over is decided on its decoded text, but the sampled ids are kept: a token such
as ">\n", which closes a tag and goes on, stays whole. So training scores just what was sampled.

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. The wording of the prompt is ours. A tokenizer may bring its own, as micro/model does.
    2. The limits in tokens are ours, and so is how passages are cut to fit them, longest first.
       The paper states 4 searches (max_searches); k = 3 passages is Search-R1's.

    python rollout.py             # a lesson: one trajectory, live; --logprobs, --question, --seed
"""

import logging
import math
import re
import shutil
from bisect import bisect
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache
from transformers.utils.logging import disable_progress_bar

from retriever import BadInput, Passage

PROMPT = """\
Answer the question at the end. Each time you receive new information, reason about it first, \
between <think> and </think>. When you lack knowledge, call a search engine by writing a query \
between <search> and </search>; the passages it finds come back between <information> and \
</information>. You may search as often as you want. As soon as you know enough, write the \
answer between <answer> and </answer>, as short as possible and without an explanation.

Question: {question}"""

NAMES = "think", "search", "information", "answer"
TAGS = tuple(f"<{slash}{name}>" for name in NAMES for slash in ("", "/"))

@dataclass
class Trajectory:
    """One answer to one question. response_ids, loss_mask and logprobs have an entry a token.
    loss_mask is 1 where the policy sampled the token (the stop token, too), and 0 where the
    environment wrote it. logprobs are the policy's at the sampling temperature, and 0.0 where
    the mask is 0. finish_reason: answer, eos, searches (one more than allowed), turn (too long),
    length (of the response), or context (of the model)."""

    question: str
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    answer: str | None = None
    finish_reason: str = ""
    passages: list[list[Passage]] = field(default_factory=list)  # what queries found, read or not
    turn_start: int = 0  # where the current turn begins in response_ids
    limits: dict[str, int] = field(default_factory=dict)  # finish_reason -> the most tokens

    def extend(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        """Append sampled tokens (with logprobs) or the environment's (without). The mask is made
        here, by who wrote the token: comparing ids later could not tell."""
        self.response_ids += ids
        self.loss_mask += [0 if logprobs is None else 1] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)

    def full(self, more: int = 0) -> str:
        """The limit that is reached once `more` tokens are added, or ""."""
        length = len(self.response_ids) + more
        return next((reason for reason, most in self.limits.items() if length >= most), "")

def parse_turn(text: str) -> tuple[str, str] | None:
    """("search", query), ("answer", answer), or None if a turn says nothing yet. The last of
    several opening tags counts, and a closing one without any is ignored.

    >>> parse_turn("<think>hm</think> <search> Ada's <search> mother </search>")
    ('search', 'mother')
    """
    for close in re.finditer(r"</(search|answer)>", text):
        start = text.rfind(f"<{close[1]}>", 0, close.start())
        if start >= 0:
            return close[1], text[start + len(f"<{close[1]}>") : close.start()].strip()
    return None

def rollout(
    model, tokenizer, retriever, questions: list[str], *, group_size: int = 1,
    temperature: float = 1.0, max_searches: int = 4, k: int = 3, seed: int | None = None,
    max_tokens: int = 2048, max_turn_tokens: int = 256, max_observation_tokens: int = 512,
    batch_size: int = 256, prompts: list[list[int]] | None = None, progress: str = "",
) -> list[Trajectory]:  # fmt: skip
    """Sample group_size trajectories for each question: one list, groups side by side.
    At temperature 0 sampling is greedy, and logprobs are those at temperature 1. seed None draws
    from torch's global state. A trajectory has at most max_searches, and a search finds at most k
    passages. The other limits are tokens; max_tokens counts observations, too. batch_size:
    trajectories in flight. prompts: ids that replace standard prompts. progress: a bar's title."""
    if prompts is None:
        prompts = [chat_ids(tokenizer, standard_prompt(tokenizer, q)) for q in questions]
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    # Only a token with a ">" in it can complete a closing tag.
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    closers = {token for token, piece in enumerate(pieces) if ">" in (piece or "")}
    trajectories = []
    for question, ids in zip(questions, prompts, strict=True):
        limits = {"length": max_tokens, "context": context_length(model) - len(ids)}
        trajectories += [Trajectory(question, [*ids], limits=limits) for _ in range(group_size)]
    for trajectory in trajectories:  # a prompt too long for the model stops its whole group
        trajectory.finish_reason = trajectory.full()
    size = max(batch_size // group_size, 1) * group_size  # whole groups
    bar = tqdm(total=len(trajectories), desc=progress, disable=not progress or None, leave=False)

    for first in range(0, len(trajectories), size):
        # A row is a trajectory, and its place in the cache. Each prompt is read once for its group.
        # The cache always lacks a row's last token: to read it gives the logits of the next one.
        rows = [row for row in trajectories[first : first + size] if not row.finish_reason]
        cache = RowCache(model)
        if rows:
            cache.feed([row.prompt_ids[:-1] for row in rows[::group_size]])
            cache.select([i // group_size for i in range(len(rows))])

        while rows:
            # 1. Sample a token for each row, again and again, until all turns are over. The cache
            #    reads its first n rows, so a row whose turn is over is swapped behind those that
            #    still sample. From the last to the first, a swap moves only rows already seen.
            n = len(rows)
            while n:
                last = [(row.response_ids or row.prompt_ids)[-1:] for row in rows[:n]]
                tokens, logprobs = sample(cache.feed(last), temperature, generator)  # (n,) each
                order = list(range(n))
                for i in reversed(range(n)):
                    rows[i].extend([tokens[i]], [logprobs[i]])
                    turn = rows[i].response_ids[rows[i].turn_start :]
                    text = decode(tokenizer, turn) if tokens[i] in closers else ""
                    if end_turn(rows[i], text, stops, max_searches, max_turn_tokens):
                        n -= 1
                        order[i], order[n] = order[n], order[i]
                rows[: len(order)] = [rows[i] for i in order]
                cache.reorder(order)

            # 2. Search for all rows that asked, in one call, and let each read what was found.
            asking = [row for row in rows if not row.finish_reason]
            found = retriever.search([row.queries[-1] for row in asking], k) if asking else []
            for row, passages in zip(asking, found, strict=True):
                ids = observation_ids(tokenizer, passages, max_observation_tokens)
                row.passages.append(passages)
                row.finish_reason = row.full(more=len(ids))
                if not row.finish_reason:
                    row.extend(ids)
                    row.turn_start = len(row.response_ids)

            # 3. Keep the rows that go on. Feed the cache all that it lacks but their last tokens.
            going = [i for i, row in enumerate(rows) if not row.finish_reason]
            bar.update(len(rows) - len(going))
            rows = [rows[i] for i in going]
            if rows:
                cache.select(going)
                held = [row.prompt_ids + row.response_ids for row in rows]
                cache.feed([ids[length:-1] for ids, length in zip(held, cache.lengths)])
    bar.close()
    return trajectories

def end_turn(row: Trajectory, text: str, stops, max_searches: int, max_turn_tokens: int) -> bool:
    """Note what the turn says, or why the trajectory ends. True if the turn is over. text is the
    turn's, or "" where its last token cannot close a tag."""
    kind, content = parse_turn(text) or ("", "")
    if kind == "answer":
        row.answer, row.finish_reason = content, "answer"
    elif kind == "search" and len(row.queries) >= max_searches:
        row.finish_reason = "searches"
    elif kind == "search":
        row.queries.append(content)
    elif row.response_ids[-1] in stops:
        row.finish_reason = "eos"
    else:
        spent = len(row.response_ids) - row.turn_start >= max_turn_tokens
        row.finish_reason = row.full() or ("turn" if spent else "")
    return bool(kind or row.finish_reason)

def standard_prompt(tokenizer, question: str) -> str:
    """P(q) as text: the tokenizer's own wording if it brings one, else PROMPT."""
    template = tokenizer.init_kwargs.get("search_prompt") or PROMPT
    return template.replace("{question}", neutralise(question, tokenizer))

def chat_ids(tokenizer, content: str) -> list[int]:
    """Token ids of one user message, up to where the assistant's answer begins."""
    if tokenizer.chat_template is None:
        bos = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
        return bos[:1] + encode(tokenizer, content + "\n")
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return encode(tokenizer, text)

def observation_ids(tokenizer, passages: list[Passage], budget: int) -> list[int]:
    """The ids of <information>, a line "- title: text" for each passage, and </information>.
    Passages are cut first, to fit the budget (tokens, with the tags): tags are never cut."""
    parts = "\n<information>\n", "\n", "</information>\n"
    head, newline, tail = (encode(tokenizer, part) for part in parts)
    # A passage may be a megabyte in one line. Twenty characters a token are more than enough.
    texts = [f"- {passage.title}: {passage.text}"[: 20 * budget] for passage in passages]
    texts = [" ".join(text.split()) for text in texts] or ["nothing was found"]
    lines = [encode(tokenizer, neutralise(text, tokenizer)) for text in texts]
    room = budget - len(head) - len(tail) - len(lines) * len(newline)
    # Cut the longest first. Of the lengths 0, 1, 2, ... the first `fit` leave room for all lines.
    fit = bisect(range(budget + 1), room, key=lambda most: sum(min(len(x), most) for x in lines))
    body = []
    for line in lines:
        kept = line[: max(fit - 1, 0)]
        while kept and len(kept) < len(line) and decode(tokenizer, kept).endswith("\ufffd"):
            kept.pop()  # a token may hold a part of a character only
        body += kept + newline
    return head + body + tail

def neutralise(text: str, tokenizer, tags: tuple[str, ...] = TAGS) -> str:
    """Tags and the tokenizer's own markup become (tag) in foreign text. So a passage cannot end
    the observation, answer the question or open a turn, and one sees that it tried."""
    return markup(tokenizer, tuple(tags)).sub(lambda mark: f"({mark[0][1:-1]})", text)

@lru_cache
def markup(tokenizer, tags: tuple[str, ...]) -> re.Pattern:
    """The tags, and what stands in brackets of special tokens and of the chat template."""
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    marks += re.findall(r"<[^<>\s]+>|\[[^\[\]\s]+\]", decode(tokenizer, chat_ids(tokenizer, "?")))
    marks = {mark for mark in marks if re.fullmatch(r"[<\[{|].+[>\]}|]", mark) and mark not in TAGS}
    longest_first = sorted(marks.union(tags), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)

def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a piece of text."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # no lone surrogates
    return tokenizer(text, add_special_tokens=False)["input_ids"]

def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

# ---------------------------------------------------------------- machinery

def sample(logits: torch.Tensor, temperature: float, generator=None) -> tuple[list, list]:
    """A token for each row of logits (n, V), and its log-probability."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)  # (n, V)
    if temperature:
        # One random number a row is enough. torch.multinomial draws one a word, which is slow.
        cumulative = logprobs.exp().cumsum(dim=-1)  # (n, V)
        level = torch.rand(len(logits), 1, device=logits.device, generator=generator)  # (n, 1)
        # right=True: the first token whose sum exceeds the level, so none of probability 0.
        chosen = torch.searchsorted(cumulative, level * cumulative[:, -1:], right=True)  # (n, 1)
        chosen = chosen.clamp(max=logits.shape[1] - 1)  # rounding may lead behind the last word
    else:
        chosen = logprobs.argmax(dim=-1, keepdim=True)  # (n, 1)
    values = logprobs.gather(1, chosen)[:, 0].tolist()
    if any(map(math.isnan, values)):
        raise BadInput("the model's logits are not numbers: its weights are damaged")
    return chosen[:, 0].tolist(), values

class RowCache(Cache):
    """A key-value cache in which each trajectory has a row that grows on its own. A token's slot
    is its position, and a query at position p sees the slots up to p: what stands behind a row's
    end is never seen. The first n rows take part in a forward pass: taking them copies nothing."""

    def __init__(self, model):
        super().__init__(layers=[])
        self.model = model
        self.lengths: list[int] = []  # tokens in each row
        self.store: dict[tuple[int, str], torch.Tensor] = {}  # (rows, heads, slots, width) each

    @torch.no_grad()
    def feed(self, chunks: list[list[int]]) -> torch.Tensor:
        """Append chunk i to row i. Returns the logits (n, V) after the last column, of use only if
        all chunks are equally long."""
        device, n, on_gpu = self.model.device, len(chunks), self.model.device.type != "cpu"
        size = max(1, *(len(chunk) for chunk in chunks))
        padded = [chunk + [0] * (size - len(chunk)) for chunk in chunks]
        self.lengths += [0] * (n - len(self.lengths))
        start = torch.tensor(self.lengths[:n], device=device)[:, None]  # (n, 1)
        self.slots = start + torch.arange(size, device=device)  # (n, S); the next overwrite padding
        self.used = max(self.lengths[:n]) + size
        mask = torch.arange(self.used, device=device) <= self.slots[:, None, :, None]
        if self.model.config._attn_implementation != "sdpa":  # eager attention adds its mask
            mask = torch.where(mask, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            output = self.model(
                input_ids=torch.tensor(padded, device=device),  # (n, S)
                attention_mask=mask,  # (n, 1, S, used)
                position_ids=self.slots.clamp(max=context_length(self.model) - 1),  # for padding
                past_key_values=self, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        self.lengths[:n] = [length + len(chunk) for length, chunk in zip(self.lengths, chunks)]
        return output.logits[:, -1].float()  # (n, V)

    def update(self, keys, values, layer: int, *args, **kwargs):
        """A layer of the model hands in its new keys and values, and gets back all of them."""
        rows, both = torch.arange(len(keys), device=keys.device)[:, None], []  # (n, 1)
        for name, new in (("keys", keys), ("values", values)):  # (n, heads, S, width)
            new = new.to(values.dtype)  # autocast leaves rotary keys in float32, twice the size
            kept = self.store.get((layer, name), new[:, :, :0])
            if self.used > kept.shape[2]:  # grow by half as much again: copying stays rare
                more = max(self.used * 3 // 2, 64) - kept.shape[2]
                kept = torch.nn.functional.pad(kept, (0, 0, 0, more))
            kept[rows, :, self.slots] = new.transpose(1, 2)  # (n, S, heads, width)
            self.store[layer, name] = kept
            both.append(kept[: len(keys), :, : self.used])
        return both

    def get_seq_length(self, *args) -> int:
        return self.used

    def reorder(self, order: list[int]) -> None:
        """Row order[i] becomes row i. What moves is copied at once: each call costs a GPU time."""
        self.lengths[: len(order)] = [self.lengths[row] for row in order]
        moved = [i for i, row in enumerate(order) if i != row]
        to, source = torch.tensor([moved, [order[i] for i in moved]], device=self.model.device)
        for kept in self.store.values() if moved else ():
            kept[to, :, : self.used] = kept[source, :, : self.used]

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order. A row may be named several times."""
        self.lengths = [self.lengths[row] for row in rows]
        self.store = {name: kept[rows] for name, kept in self.store.items()}

def context_length(model) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9

def load_model(name: str, day: str = ""):
    """(model, tokenizer) from a folder or hub name, in float32, on the GPU if there is one. day, as
    2026-01-31, is written into a chat template that asks for it. BadInput: it cannot be used."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line of ours is enough
    disable_progress_bar()
    dated = lambda match: repr(date.fromisoformat(day or str(date.today())).strftime(match[2]))
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(name), AutoConfig.from_pretrained(name)
        template = re.sub(r"strftime_now\((['\"])(.*?)\1\)", dated, tokenizer.chat_template or "")
        tokenizer.chat_template = template or None
        for part in (config, config.get_text_config()):  # no dropout, so training scores the same
            drops = [key for key, x in vars(part).items() if "drop" in key and isinstance(x, float)]
            vars(part).update(dict.fromkeys(drops, 0.0))
        how = dict(config=config, dtype=torch.float32, use_safetensors=True)
        model = AutoModelForCausalLM.from_pretrained(name, **how).eval()
        check_sampling(model, tokenizer)  # on the CPU, where float32 leaves no doubt
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
    except Exception as error:  # transformers raises many kinds for what is no model
        raise BadInput(f"cannot use {name}: {error}") from None

@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def check_sampling(model, tokenizer) -> None:
    """Raise ValueError where sampling would not be exact: try two rows, a long and a short one."""
    config, size = model.config.get_text_config(), model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id is None or not 0 < len(tokenizer) <= size:
        raise ValueError("its tokenizer has no end-of-sequence token, or too many tokens, or none")
    chat_ids(tokenizer, standard_prompt(tokenizer, "?"))  # its chat template may raise
    windows = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None)]
    rescales = re.search("dynamic|longrope", str(getattr(config, "rope_parameters", None)))
    if not {*windows} <= {"full_attention", None, 0} or rescales:
        raise ValueError("a token must see all before it, at positions that no later one changes")
    ids = (torch.arange(min(400, context_length(model) - 1)) * 7919 % size).tolist()  # all sorts
    cache = RowCache(model)
    cache.feed([ids[:-1], ids[:6]])
    cached = cache.feed([ids[-1:], ids[6:7]]).log_softmax(-1)  # (2, V)
    for row, chunk in enumerate((ids, ids[:7])):
        logits = model(torch.tensor([chunk])).logits[0, -1].float()  # (V,)
        gap = (cached[row] - logits.log_softmax(-1)).abs().max()
        if not gap < 0.01:
            raise ValueError(f"log-probabilities are off by {gap:.2g} when sampled with a cache")

def save_model(model, tokenizer, folder: Path) -> None:
    """Write beside, then replace: if that is cut short, folder.new is whole. Raises OSError."""
    new = folder.with_name(folder.name + ".new")
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    except SafetensorError as error:
        raise OSError(f"cannot write {new}: {error}") from None
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)

if __name__ == "__main__":
    from micro.lessons import rollout_lesson, run_script
    run_script(rollout_lesson)
