"""Rollouts: a policy thinks, searches, reads and answers, and every token is kept as sampled.

`rollout` samples many questions x group_size trajectories at once. A trajectory is a sequence
of turns; in each the policy writes until a tag is closed, and after a search the environment
writes what the retriever found:

    y = (o_1, e_1, o_2, e_2, ..., o_n)        o_i ~ pi(. | P(q), o_1, e_1, ..., o_(i-1), e_(i-1))
    o_i = <think>...</think> <search>query</search>       or, at last,      <answer>...</answer>
    e_i = <information>passages</information>             written, not sampled: loss_mask 0

One key-value cache lives through all turns of a batch (class RowCache): each row keeps a
length of its own, so rows need no padding between turns, an observation enters as one chunk,
and rows whose turn is over are swapped behind the others and cost nothing.

How a turn ends is decided on decoded text, but what is stored are the sampled ids: a real
tokenizer may close a tag in the middle of a token (`>` and a newline in one); that token
stays, with its log-probability, and the observation follows it as ids of its own. Nothing is
ever decoded and encoded again, so what training scores is what was sampled.

Deviations from the paper
    1. The wording of the prompt is ours; the paper's appendix was not available. A tokenizer
       may carry its own wording ("search_prompt" in tokenizer_config.json; micro/model does).
    2. Passages are cut to a token budget, longest first, before the tags go round them; the
       paper does not state how it cuts. Markup inside passages is made harmless.
    3. The numbers of tokens a turn (256), an observation (512) and a trajectory (2,048) are
       ours; the paper states only the 4 searches. k = 3 passages a search is Search-R1's.

    python rollout.py             # one trajectory, live; --logprobs, --question, --seed
"""

import inspect
import logging
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils.logging import disable_progress_bar

from retriever import BadInput, Parser, Passage, at_least, open_index, paint, printable, run_script

PROMPT = """\
Answer the question at the end. Each time you receive new information, reason about it first, \
between <think> and </think>. When you lack knowledge, call a search engine by writing a query \
between <search> and </search>; the passages it finds come back between <information> and \
</information>. You may search as often as you want. As soon as you know enough, write the \
answer between <answer> and </answer>, as short as possible and without an explanation.

Question: {question}"""

TAGS = [f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")]


@dataclass
class Trajectory:
    """One answer to one question. The three lists have one entry a response token.

    loss_mask is 1 where the policy sampled the token (the stop token included), 0 where the
    environment wrote it. logprobs are the policy's, at the sampling temperature; 0.0 where the
    mask is 0. answer is None where there is none. finish_reason: answer, eos, searches (one
    more than allowed), turn (too many tokens in it), length (in all), context (the model's).
    """

    question: str
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    answer: str | None = None
    finish_reason: str = ""
    passages: list[list[Passage]] = field(default_factory=list)  # what each query found
    turn_start: int = 0  # where the turn being sampled begins in response_ids

    def extend(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        """Append sampled tokens (with logprobs) or the environment's (without). The mask is
        made here, by who wrote the token: no later comparison of ids could know that."""
        self.response_ids += ids
        self.loss_mask += [0 if logprobs is None else 1] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)


def spans(trajectory: Trajectory):
    """Yield (sampled, ids) for each run of tokens with the same author, in order."""
    start, mask = 0, trajectory.loss_mask
    for end in range(1, len(mask) + 1):
        if end == len(mask) or mask[end] != mask[start]:
            yield bool(mask[start]), trajectory.response_ids[start:end]
            start = end


# ---------------------------------------------------------------- text in, text out


def load_model(name: str):
    """(model, tokenizer) from a local folder or a hub name: float32, on the GPU if there is one.
    Safetensors only, no remote code. Raises BadInput where either cannot be loaded."""
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise BadInput(f"{name} is not a model folder: it has no config.json")
    if not path.exists() and path.parent != Path() and path.parent.is_dir():  # a path, mistyped: no use asking the hub
        raise BadInput(f"no such model folder: {name}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the one line that is wanted
    disable_progress_bar()  # of reading and writing weights: a line that tells a reader nothing
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # transformers raises many kinds for a folder or name that is no model
        raise BadInput(f"cannot load a model and its tokenizer from {name}: {error}") from None
    if not len(tokenizer) or tokenizer.eos_token_id is None:
        raise BadInput(f"{name}: no usable tokenizer there (it has no words or no end-of-sequence token)")
    RowCache(model)  # refuses a model that it could not sample
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def save_model(model, tokenizer, folder: Path) -> None:
    """In transformers' form, written beside and then renamed: the folder never holds half a model.
    Raises OSError where it cannot be written."""
    new = folder.with_name(folder.name + ".new")
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    except SafetensorError as error:
        shutil.rmtree(new)
        raise OSError(f"cannot write {folder}: {error}") from None
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def standard_prompt(tokenizer, question: str) -> str:
    """P(q) as text: the tokenizer's own wording where it carries one, else PROMPT. Markup in the
    question is made harmless, as in passages."""
    template = tokenizer.init_kwargs.get("search_prompt") or PROMPT
    return template.replace("{question}", neutralise(question, tokenizer))


def chat_ids(tokenizer, content: str) -> list[int]:
    """Token ids of one user turn, up to where the assistant's answer begins."""
    if tokenizer.chat_template is None:
        return tokenizer(content + "\n")["input_ids"]
    message = [{"role": "user", "content": content}]
    return encode(tokenizer, tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))


def parse_turn(text: str) -> tuple[str, str] | None:
    """What a turn asks for: ("search", query), ("answer", answer), or None if nothing yet.

    The first closing tag that has an opening tag of its kind before it decides; its content
    is what follows the last such opening tag. A closing tag without an opening one is ignored.

    >>> parse_turn("<think>hm</think> <search> Ada's <search> mother </search>")
    ('search', 'mother')
    >>> parse_turn("</answer> <search> still writing")
    """
    for close in re.finditer(r"</(search|answer)>", text):
        start = text.rfind(f"<{close[1]}>", 0, close.start())
        if start >= 0:
            return close[1], text[start + len(f"<{close[1]}>") : close.start()].strip()
    return None


def neutralise(text: str, tokenizer, tags: list[str] = TAGS) -> str:
    """Our tags and the tokenizer's special tokens inside foreign text become (tag): a passage
    can then neither end the observation nor answer the question nor open a turn, and a reader
    of the trajectory sees that it tried."""
    marks = sorted({*tags, *tokenizer.all_special_tokens}, key=len, reverse=True)
    pattern = "|".join(re.escape(mark) for mark in marks)
    return re.sub(pattern, lambda mark: f"({mark[0][1:-1]})", text, flags=re.IGNORECASE)


def fit_lengths(lengths: list[int], room: int) -> list[int]:
    """Shorten the longest first until the sum is at most room.

    >>> fit_lengths([5, 100, 40], room=65)
    [5, 30, 30]
    """
    for shorter, length in enumerate(sorted(lengths)):  # those shorter than the limit stay whole
        limit = max(room, 0) // (len(lengths) - shorter)
        if length > limit:
            return [min(length, limit) for length in lengths]
        room -= length
    return list(lengths)


def observation_ids(tokenizer, passages: list[Passage], budget: int) -> list[int]:
    """<information>, a line "- title: text" for each passage, </information>, as ids. The passages
    are cut to fit the budget (tokens, tags included) first, so no tag is ever cut."""
    newline, head, tail = (encode(tokenizer, text) for text in ("\n", "\n<information>\n", "</information>\n"))
    # A passage may be a megabyte in one line: twenty characters for each token of the budget are enough.
    lines = [" ".join(f"- {passage.title}: {passage.text}"[: 20 * budget].split()) for passage in passages] or ["nothing was found"]
    lines = [encode(tokenizer, neutralise(line, tokenizer)) for line in lines]
    kept = fit_lengths([len(line) for line in lines], budget - len(head) - len(tail) - len(lines) * len(newline))
    body = [token for line, length in zip(lines, kept) for token in line[:length] + newline]
    return head + body + tail


# ---------------------------------------------------------------- the model, with its cache


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, slots, width); row r writes at its own slots.
    The slots of a forward pass are set in RowCache; there is no other state."""

    def __init__(self, cache: "RowCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, keys, values):
        self.keys, self.values = (values.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (keys, values))
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        keys = keys.to(values.dtype)  # under autocast rotary embeddings make them float32: twice what attention reads
        slots, used = self.cache.slots, self.cache.used  # slots: (n, S)
        if used > self.keys.shape[2]:  # grow by half as much again: copying stays rare
            more = max(used * 3 // 2, 64) - self.keys.shape[2]
            self.keys, self.values = (
                torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], dim=2) for x in (self.keys, self.values)
            )
        rows = torch.arange(len(slots), device=slots.device)[:, None]  # (n, 1)
        self.keys[rows, :, slots] = keys.transpose(1, 2)  # (n, S, heads, width)
        self.values[rows, :, slots] = values.transpose(1, 2)
        return self.keys[: len(slots), :, :used], self.values[: len(slots), :, :used]

    def get_seq_length(self):
        return self.cache.used

    def get_mask_sizes(self, query_length):
        return self.cache.used, 0

    def get_max_length(self):
        return -1


class RowCache(Cache):
    """A key-value cache whose rows have lengths of their own.

    The next tokens of row r go to the slots after its length, so the slots of a row have no
    gaps and slot = position. A query at position p sees the slots <= p: that is the whole
    mask. The rows that take part in a forward pass are the first n; slicing copies nothing.
    """

    def __init__(self, model):
        config = model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["sliding" if getattr(config, "sliding_window", None) else "full_attention"]
        wanted = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
        if {*kinds} != {"full_attention"} or not wanted <= inspect.signature(model.forward).parameters.keys():
            raise BadInput(f"{config.model_type}: only decoders whose every layer is full attention can be sampled here")
        super().__init__(layers=[RowLayer(self) for _ in range(config.num_hidden_layers)])
        self.model, self.context = model, context_length(model)
        self.lengths: list[int] = []  # tokens held by each row

    @torch.no_grad()
    def forward(self, chunks: list[list[int]]) -> torch.Tensor:
        """Append chunk i to row i; the logits (n, V) after each chunk's last PADDED position:
        meaningful only where all chunks have one length. (Hence sampling feeds all tokens but
        the last as a chunk, and the last as a chunk of one.)"""
        device = self.model.device
        size = max(1, *(len(chunk) for chunk in chunks))
        ids = torch.tensor([chunk + [0] * (size - len(chunk)) for chunk in chunks], device=device)  # (n, S)
        start = torch.tensor(self.lengths[: len(chunks)], device=device)[:, None]  # (n, 1)
        self.slots = start + torch.arange(size, device=device)  # (n, S); those of padding are overwritten later
        self.used = max(self.lengths[: len(chunks)]) + size
        mask = torch.arange(self.used, device=device) <= self.slots[:, None, :, None]  # (n, 1, S, used)
        if self.model.config._attn_implementation != "sdpa":  # eager attention adds its mask to the scores
            mask = torch.where(mask, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)
        with autocast(device):
            output = self.model(
                input_ids=ids, attention_mask=mask, position_ids=self.slots.clamp(max=self.context - 1),
                past_key_values=self, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        for row, chunk in enumerate(chunks):
            self.lengths[row] += len(chunk)
        return output.logits[:, -1].float()  # (n, V)

    def swap(self, one: int, two: int) -> None:
        used = max(self.lengths[one], self.lengths[two])
        self.lengths[one], self.lengths[two] = self.lengths[two], self.lengths[one]
        for layer in self.layers:
            for x in (layer.keys, layer.values):
                x[[one, two], :, :used] = x[[two, one], :, :used]

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        self.lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def autocast(device):
    """bf16 arithmetic on a GPU, over float32 weights; nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def context_length(model) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9


# ---------------------------------------------------------------- sampling


def draw(logprobs: torch.Tensor, generator=None) -> torch.Tensor:
    """One token a row, (n, V) -> (n, 1), by inverting the cumulative distribution: one random
    number a row. torch.multinomial draws one a word, which on a CPU costs more than a small model.

    >>> draw(torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]).log(), torch.Generator().manual_seed(0)).tolist()
    [[1], [0]]
    """
    cumulative = logprobs.exp().cumsum(dim=-1)  # (n, V)
    level = torch.rand(len(logprobs), 1, device=logprobs.device, generator=generator) * cumulative[:, -1:]  # (n, 1)
    # right=True: the first word whose sum exceeds the level, so never one of probability 0.
    return torch.searchsorted(cumulative, level, right=True).clamp(max=logprobs.shape[1] - 1)


def rollout(
    model, tokenizer, retriever, questions: list[str], *, group_size: int = 1, temperature: float = 1.0,
    max_searches: int = 4, k: int = 3, seed: int | None = None, max_tokens: int = 2048, max_turn_tokens: int = 256,
    max_observation_tokens: int = 512, batch_size: int = 256, prompts: list[list[int]] | None = None,
    progress: str = "",
) -> list[Trajectory]:  # fmt: skip
    """Sample group_size trajectories for each question: question-major, groups side by side.

    temperature 0 is greedy (logprobs are then those at temperature 1). seed None draws from
    torch's global state. batch_size: trajectories in flight. prompts: token ids to condition
    on, one list a question, in place of the standard prompt (OFSD's teacher). progress: what a
    progress bar is to say. max_searches and k: searches a trajectory, passages a search. In tokens:
    max_tokens a response, observations included; max_turn_tokens; max_observation_tokens.
    """
    if prompts is None:
        prompts = [chat_ids(tokenizer, standard_prompt(tokenizer, question)) for question in questions]
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    stops = {tokenizer.eos_token_id}
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops |= set(listed) if isinstance(listed, list) else {listed} - {None}
    # Only a token with a ">" in it can complete a closing tag: the rest need no decoding.
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    closers = {token for token, piece in enumerate(pieces) if piece and ">" in piece}

    def ends_turn(row: Trajectory) -> bool:
        """Has this row just finished its turn? Sets finish_reason where that ends it for good."""
        turn = row.response_ids[row.turn_start :]
        if turn[-1] in closers and (asked := parse_turn(decode(tokenizer, turn))):
            if asked[0] == "answer":
                row.answer, row.finish_reason = asked[1], "answer"
            elif len(row.queries) == max_searches:
                row.finish_reason = "searches"
            else:
                row.queries.append(asked[1])
            return True
        if turn[-1] in stops:
            row.finish_reason = "eos"
        elif len(row.response_ids) >= max_tokens:
            row.finish_reason = "length"
        elif len(row.prompt_ids) + len(row.response_ids) >= context_length(model):
            row.finish_reason = "context"
        elif len(turn) >= max_turn_tokens:
            row.finish_reason = "turn"
        return row.finish_reason != ""

    def sample_turn(cache: RowCache, rows: list[Trajectory], tokens: list[int]) -> None:
        """Sample until every row's turn is over. tokens[i] is the last one row i holds, not yet
        in the cache. The rows still sampling are the first n; rows and cache change order."""
        n = len(rows)
        while n:
            logits = cache.forward([[token] for token in tokens[:n]])  # (n, V)
            logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)  # (n, V)
            if temperature:
                chosen = draw(logprobs, generator)  # (n, 1)
            else:
                chosen = logprobs.argmax(dim=-1, keepdim=True)  # (n, 1)
            tokens[:n], values = chosen[:, 0].tolist(), logprobs.gather(1, chosen)[:, 0].tolist()
            for row, token, value in zip(rows, tokens, values):
                row.extend([token], [value])
            for i in reversed([i for i in range(n) if ends_turn(rows[i])]):
                n -= 1
                if i < n:
                    cache.swap(i, n)
                    rows[i], rows[n] = rows[n], rows[i]
                    tokens[i], tokens[n] = tokens[n], tokens[i]

    def observe(row: Trajectory, found: list[Passage]) -> list[int]:
        """Append what was found; returns the tokens the cache lacks, or [] where it cannot fit."""
        ids = observation_ids(tokenizer, found, max_observation_tokens)
        row.passages.append(found)
        if len(row.response_ids) + len(ids) >= max_tokens:
            row.finish_reason = "length"
        elif len(row.prompt_ids) + len(row.response_ids) + len(ids) >= context_length(model):
            row.finish_reason = "context"
        else:
            last = row.response_ids[-1:]
            row.extend(ids)
            row.turn_start = len(row.response_ids)
            return last + ids
        return []

    def run_batch(batch: list[Trajectory]) -> None:
        rows = [row for row in batch if len(row.prompt_ids) < context_length(model)]
        for row in batch:
            row.finish_reason = "" if len(row.prompt_ids) < context_length(model) else "context"
        if not rows:
            return
        cache, firsts = RowCache(model), rows[::group_size]
        cache.lengths = [0] * len(firsts)
        cache.forward([row.prompt_ids[:-1] for row in firsts])  # once a question
        cache.select([i // group_size for i in range(len(rows))])  # shared by its group
        new = [row.prompt_ids[-1:] for row in rows]  # what each row holds and the cache lacks
        while rows:
            sample_turn(cache, rows, [ids[-1] for ids in new])
            bar.update(sum(row.finish_reason != "" for row in rows))
            going = [i for i, row in enumerate(rows) if not row.finish_reason]
            found = retriever.search([rows[i].queries[-1] for i in going], k) if going else []
            new = [observe(rows[i], passages) for i, passages in zip(going, found)]
            bar.update(sum(not ids for ids in new))
            going, new = [i for i, ids in zip(going, new) if ids], [ids for ids in new if ids]
            rows = [rows[i] for i in going]
            if rows:
                cache.select(going)
                cache.forward([ids[:-1] for ids in new])  # the observation, as one chunk

    result = [Trajectory(q, list(ids)) for q, ids in zip(questions, prompts) for _ in range(group_size)]
    step = max(batch_size // group_size, 1) * group_size
    with tqdm(total=len(result), desc=progress, disable=None if progress else True, leave=False) as bar:
        for start in range(0, len(result), step):
            run_batch(result[start : start + step])
    return result


def lesson() -> None:
    """One trajectory of micro/model: who wrote what, and how likely the policy found it."""
    parser = Parser(description="Play one trajectory of micro/model.")
    parser.add_argument("--question", default="Who or what is the spouse of the founder of Hunik Labs?")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--logprobs", action="store_true", help="each token on a line, with its log-probability")
    args = parser.parse_args()
    folder = Path(__file__).parent / "micro"
    model, tokenizer = load_model(str(folder / "model"))
    row = rollout(model, tokenizer, open_index(folder / "corpus.jsonl"), [args.question], seed=args.seed)[0]
    print(f"question: {printable(args.question)}\n\nSampled by the policy (loss_mask 1), written by the environment (loss_mask 0):\n")
    last = None
    for token, sampled, value in zip(row.response_ids, row.loss_mask, row.logprobs):
        if sampled != last:
            print(("\n" if last is not None else "") + ("policy> " if sampled else "environment> "), end="\n" if args.logprobs else "")
        text = printable(decode(tokenizer, [token]))
        if args.logprobs:
            print(f"    {text!r:24}" + (f"{value:8.3f}" if sampled else "       -"))
        else:
            print(paint(text, "32" if sampled else "34"), end="", flush=True)
        last = sampled
        time.sleep(0.03 if sys.stdout.isatty() else 0)  # as one would read it
    print(f"\n\n{len(row.queries)} searches, {sum(row.loss_mask)} of {len(row.loss_mask)} tokens are the policy's; "
          f"it ended by: {row.finish_reason}; answer: {printable(str(row.answer))}")  # fmt: skip


if __name__ == "__main__":
    run_script(lesson)
