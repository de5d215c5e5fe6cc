r"""Rollouts: the policy thinks, searches, reads and answers a question.

Every token is kept as it was sampled, with its log-probability and with a mask. The
mask records who wrote the token: the policy, which is trained, or the environment,
which is not.

A question q is put into a prompt P(q). The policy pi is a language model, and what
follows the prompt is a trajectory y, a sequence of turns. In each turn the policy
samples tokens until it has written </search> or </answer>. After a search the
environment writes what was found:

    y   = (o_1, e_1, o_2, e_2, ..., o_n)
    o_i ~ pi(. | P(q), o_1, e_1, ..., o_(i-1), e_(i-1))      sampled: loss_mask is 1
    o_i = <think>...</think> <search>query</search>, and finally <answer>...</answer>
    e_i = <information>passages</information>                written: loss_mask is 0

The decoded text of a turn decides whether it has ended, but the sampled ids are kept. A
token such as ">\n", which closes a tag and contains more, stays whole. So training
scores exactly the tokens that were sampled. Sampling keeps no gradient: training
computes the log-probabilities again (grpo.py).

Three parts matter most: Trajectory.extend, which makes the mask; rollout(), which
samples all trajectories turn by turn; and RowCache, which spares the model from reading
a token twice.

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. The wording of the prompt is ours, since the paper does not publish its own.
    2. The limits in tokens are ours, and so is the truncation rule (the longest passage
       first). The paper states 4 searches (max_searches). The k = 3 passages per search
       come from Search-R1.

The same on one page, without a cache and without batches: lessons/plain.py.

    python -m lessons.rollout     # a lesson: one trajectory, live; --logprobs, --seed
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import torch
from tqdm import tqdm
from transformers.cache_utils import Cache

from machinery.devices import arithmetic, frozen_kept, product_dtype
from machinery.errors import BadInput
from machinery.passages import Passage
from machinery.text import (
    chat_ids,
    closing_tokens,
    cut,
    decode,
    encode,
    neutralise,
    stop_tokens,
)

# The standard prompt. A tokenizer may bring its own wording: --prompt puts one there,
# and the micro model's has the question alone. All others read this one: see
# standard_prompt. As in Search-R1 the model is not told how many searches it has. So
# one prompt serves for any limit, and a trajectory that asks once too often ends
# without an answer.
PROMPT = """\
Answer the question at the end. Each time you receive new information, reason about \
it first, between <think> and </think>. When you lack knowledge, call a search engine \
by writing a query between <search> and </search>; the passages it finds come back \
between <information> and </information>. You may search as often as you want. As soon \
as you know enough, write the answer between <answer> and </answer>, as short as \
possible and without an explanation.

Question: {question}"""


@dataclass
class Trajectory:
    """One attempt to answer a question.

    response_ids, loss_mask and logprobs have one entry for each token of the response.
    loss_mask is 1 if the policy sampled the token (the stop token, too), and 0 if the
    environment wrote it. logprobs are the policy's at the sampling temperature, and 0.0
    where the mask is 0. Training scores at temperature 1. So after sampling at another
    temperature GRPO's ratio rho does not start at 1.
    """

    question: str
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    answer: str | None = None
    # Why it ended. answer: it gave one; eos: it stopped without one; searches: it asked
    # for one search too many; turn, length, context: the turn, the response or the
    # whole sequence became too long (see Rules). Empty while it is unfinished.
    finish_reason: str = ""
    # The passages of each query, even if they did not fit into the response.
    passages: list[list[Passage]] = field(default_factory=list)

    def extend(self, ids: list[int], logprobs: list[float] | None = None) -> None:
        """Append tokens: the policy's if they have logprobs, or else the environment's.

        The mask is made here, by who wrote the token. You could not recover it from the
        ids: the policy may write <information>, too.
        """
        self.response_ids += ids
        if logprobs is None:
            self.loss_mask += [0] * len(ids)
            self.logprobs += [0.0] * len(ids)
        else:
            self.loss_mask += [1] * len(ids)
            self.logprobs += logprobs


def spans(trajectory: Trajectory) -> Iterator[tuple[bool, list[int]]]:
    """Yield (sampled, ids) for each run of tokens with the same author, in order.

    >>> list(spans(Trajectory("?", [1], response_ids=[7, 8, 9], loss_mask=[1, 1, 0])))
    [(True, [7, 8]), (False, [9])]
    """
    tokens = zip(trajectory.loss_mask, trajectory.response_ids, strict=True)
    for sampled, run in groupby(tokens, key=itemgetter(0)):
        yield bool(sampled), [token for _, token in run]


def parse_turn(text: str) -> tuple[str, str] | None:
    """("search", query), ("answer", answer), or None if the turn has not ended yet.

    The first closing tag decides. Its content begins at the last opening tag before it;
    a closing tag without an opening one is ignored.

    >>> parse_turn("<think>hm</think> <search> Ada's <search> mother </search>")
    ('search', 'mother')
    """
    for closing in re.finditer(r"</(search|answer)>", text):
        kind = closing[1]
        opening = f"<{kind}>"
        start = text.rfind(opening, 0, closing.start())
        if start >= 0:
            content = text[start + len(opening) : closing.start()]
            return kind, content.strip()
    return None


# ---------------------------------------------------------------- the rules


@dataclass(frozen=True)
class Rules:
    """What ends a turn, and what ends a trajectory. All lengths are in tokens."""

    tokenizer: object
    stop_tokens: set[int]
    closing_tokens: set[int]  # those that can complete a closing tag
    max_searches: int
    max_turn_tokens: int
    max_tokens: int  # of the response, observations included
    context_length: int  # of prompt and response together

    def reached_limit(self, trajectory, turn_length: int = 0, added: int = 0) -> str:
        """The limit that is reached after `added` more tokens, or "" if none is.

        It is a finish_reason.
        """
        length = len(trajectory.response_ids) + added
        if length >= self.max_tokens:
            return "length"
        if len(trajectory.prompt_ids) + length >= self.context_length:
            return "context"
        if turn_length >= self.max_turn_tokens:
            return "turn"
        return ""

    def record_turn(self, trajectory: Trajectory, turn_length: int) -> None:
        """Record the query or the answer of the current turn, or why it ends.

        The turn is the last turn_length tokens. If it has not ended, nothing changes.
        """
        token = trajectory.response_ids[-1]
        text = ""
        if token in self.closing_tokens:  # no other token can end a query or an answer
            text = decode(self.tokenizer, trajectory.response_ids[-turn_length:])
        kind, content = parse_turn(text) or ("", "")

        if kind == "answer":
            trajectory.answer = content
            trajectory.finish_reason = "answer"
        elif kind == "search":
            if len(trajectory.queries) < self.max_searches:
                trajectory.queries.append(content)
            else:
                trajectory.finish_reason = "searches"
        elif token in self.stop_tokens:
            trajectory.finish_reason = "eos"
        else:
            trajectory.finish_reason = self.reached_limit(trajectory, turn_length)


def turn_has_ended(trajectory: Trajectory) -> bool:
    """True if the trajectory is finished, or if its last query waits for passages."""
    if trajectory.finish_reason:
        return True
    return len(trajectory.queries) > len(trajectory.passages)


# ---------------------------------------------------------------- the rollout


@torch.no_grad()
def rollout(
    model,
    tokenizer,
    retriever,
    questions: list[str],
    *,
    group_size: int = 1,
    temperature: float = 1.0,
    max_searches: int = 4,
    k: int = 3,
    seed: int | None = None,
    max_tokens: int = 2048,
    max_turn_tokens: int = 256,
    max_observation_tokens: int = 512,
    batch_size: int = 256,
    prompts: list[list[int]] | None = None,
    progress: str = "",
) -> list[Trajectory]:
    """Sample group_size trajectories for each question: one list, groups side by side.

    temperature             0 is greedy, with the log-probabilities at temperature 1
    max_searches            the maximum number of searches per trajectory
    k                       the maximum number of passages per search
    seed                    None draws from torch's global state
    max_tokens              the maximum length of a response, observations included
    max_turn_tokens         the maximum length of a turn
    max_observation_tokens  the maximum length of an observation, its tags included
    batch_size              how many trajectories are sampled at the same time (at most,
                            but at least one group)
    prompts                 token ids that replace the standard prompts, one list per
                            question
    progress                the title of a progress bar; "" shows none

    Raises BadInput if the model's logits are NaN.
    """
    rules = Rules(
        tokenizer=tokenizer,
        stop_tokens=stop_tokens(model, tokenizer),
        closing_tokens=closing_tokens(tokenizer),
        max_searches=max_searches,
        max_turn_tokens=max_turn_tokens,
        max_tokens=max_tokens,
        context_length=context_length(model),
    )
    generator = None
    if seed is not None:
        generator = torch.Generator(model.device).manual_seed(seed)
    if prompts is None:
        prompts = [
            chat_ids(tokenizer, standard_prompt(tokenizer, question))
            for question in questions
        ]

    trajectories = []
    for question, prompt_ids in zip(questions, prompts, strict=True):
        for _ in range(group_size):
            trajectory = Trajectory(question, list(prompt_ids))
            # A prompt that is too long for the model ends its whole group at once.
            trajectory.finish_reason = rules.reached_limit(trajectory)
            trajectories.append(trajectory)

    size = max(batch_size // group_size, 1) * group_size  # whole groups
    hide_bar = None if progress else True  # None: tqdm shows it on a terminal only
    bar = tqdm(total=len(trajectories), desc=progress, disable=hide_bar, leave=False)
    with arithmetic(model), frozen_kept(model), bar:
        for first in range(0, len(trajectories), size):
            rows = unfinished(trajectories[first : first + size])
            cache = RowCache(model)
            read_prompts(rows, cache, group_size)
            while rows:
                sample_turns(rows, cache, rules, temperature, generator)
                search_for_all(rows, rules, retriever, k, max_observation_tokens)
                bar.update(len(rows) - len(unfinished(rows)))
                rows = keep_unfinished(rows, cache)
                read_observations(rows, cache)
    return trajectories


# The steps of a rollout follow. `rows` lists the unfinished trajectories of a batch,
# and rows[i] is in row i of the cache. The order of `rows` changes, but `trajectories`
# is a separate list and keeps the order of the questions. The cache always lacks the
# last token of a row: feeding that token yields the next token's logits.


def unfinished(rows):
    return [trajectory for trajectory in rows if not trajectory.finish_reason]


def read_prompts(rows, cache, group_size):
    """Let the cache read each prompt once, and copy it for the rest of its group."""
    # A batch consists of whole groups, and a prompt that is too long ends its whole
    # group. So every group_size-th row is the first one of its group.
    if rows:
        cache.feed([trajectory.prompt_ids[:-1] for trajectory in rows[::group_size]])
        cache.select([row // group_size for row in range(len(rows))])


def sample_turns(rows, cache, rules, temperature, generator):
    """Sample token after token for each row, until all turns have ended.

    All rows begin a turn together, so those that still sample have equally long turns.
    Rows are swapped meanwhile: the order of `rows` changes.
    """
    sampling = len(rows)  # the number of leading rows that still sample
    turn_length = 0
    while sampling:
        last_tokens = [[last_token(trajectory)] for trajectory in rows[:sampling]]
        logits = cache.feed(last_tokens)  # (n, V)
        tokens, logprobs = sample(logits, temperature, generator)  # (n,) each
        turn_length += 1

        ended = []
        for trajectory, token, logprob in zip(
            rows[:sampling], tokens, logprobs, strict=True
        ):
            trajectory.extend([token], [logprob])
            rules.record_turn(trajectory, turn_length)
            ended.append(turn_has_ended(trajectory))

        # Apply the same swaps to the trajectories and to the cache.
        order = swap_ended_last(ended)
        rows[:sampling] = [rows[row] for row in order]
        cache.reorder(order)
        sampling = ended.count(False)


def last_token(trajectory):
    ids = trajectory.response_ids or trajectory.prompt_ids
    return ids[-1]


def swap_ended_last(ended: list[bool]) -> list[int]:
    """The order in which rows whose turn has ended come after those that still sample.

    Three rows sample: A, B and C. The turn of A ends, so A is swapped with the last row
    that still samples, C. From now on the cache reads its first two rows only:

        before   A B C      order [2, 1, 0]      after   C B | A

    Few rows move, because moving one costs a copy. Scanning backwards means that a row
    which a swap brings forward was already checked.

    >>> swap_ended_last([True, False, False])
    [2, 1, 0]
    """
    sampling = len(ended)
    order = list(range(sampling))
    for row in reversed(range(len(ended))):
        if ended[row]:
            sampling -= 1
            order[row], order[sampling] = order[sampling], order[row]
    return order


def search_for_all(rows, rules, retriever, k, max_observation_tokens):
    """Search for all rows that asked, in one call, and append their observations."""
    asking = unfinished(rows)
    if not asking:
        return
    queries = [trajectory.queries[-1] for trajectory in asking]
    results = retriever.search(queries, k)
    for trajectory, passages in zip(asking, results, strict=True):
        trajectory.passages.append(passages)
        ids = observation_ids(rules.tokenizer, passages, max_observation_tokens)
        # An observation that does not fit is dropped whole, never truncated here.
        trajectory.finish_reason = rules.reached_limit(trajectory, added=len(ids))
        if not trajectory.finish_reason:
            trajectory.extend(ids)


def keep_unfinished(rows, cache):
    """The unfinished rows. The cache drops the others."""
    kept = [i for i, trajectory in enumerate(rows) if not trajectory.finish_reason]
    cache.select(kept)
    return unfinished(rows)


def read_observations(rows, cache):
    """Let the cache read all tokens of each row that it lacks, except the last one."""
    chunks = []
    for trajectory, length in zip(rows, cache.lengths, strict=True):
        ids = trajectory.prompt_ids + trajectory.response_ids
        chunks.append(ids[length:-1])
    if chunks:  # there are none once all rows are finished
        cache.feed(chunks)


# ---------------------------------------------------------------- what the policy reads


def standard_prompt(tokenizer, question: str) -> str:
    """P(q) as text: the tokenizer's own wording if it brings one, or else PROMPT."""
    wording = tokenizer.init_kwargs.get("search_prompt") or PROMPT
    return wording.replace("{question}", neutralise(question, tokenizer))


def observation_ids(tokenizer, passages: list[Passage], budget: int) -> list[int]:
    """The token ids of an observation: its tags, and between them a line per passage.

    It has at most `budget` tokens, unless its tags and newlines alone have more.
    Passages are cut to fit, the longest first. Tags are never cut.
    """
    ids = encode(tokenizer, "\n<information>\n")
    newline = encode(tokenizer, "\n")
    tail = encode(tokenizer, "</information>\n")

    texts = [f"- {passage.title}: {passage.text}" for passage in passages]
    if not texts:
        texts = ["nothing was found"]
    lines = []
    for text in texts:
        # Cut before tokenizing, since a passage may be a megabyte. Twenty characters
        # per token are more than enough.
        text = " ".join(text[: 20 * budget].split())
        lines.append(encode(tokenizer, neutralise(text, tokenizer)))

    # What remains for the lines, and the largest line length at which all of them fit.
    room = max(0, budget - len(ids) - len(tail) - len(lines) * len(newline))
    longest = room
    while sum(min(len(line), longest) for line in lines) > room:
        longest -= 1

    for line in lines:
        ids += cut(tokenizer, line, longest) + newline
    return ids + tail


# ---------------------------------------------------------------- one token


def sample(logits, temperature: float, generator=None) -> tuple[list[int], list[float]]:
    """A token for each row of logits (n, V), and its log-probability.

    Temperature 0 takes the likeliest token, with its log-probability at temperature 1.
    Raises BadInput if a logit is NaN.
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)  # (n, V)
    if temperature == 0:
        chosen = logprobs.argmax(dim=-1, keepdim=True)  # (n, 1)
    else:
        # One uniform draw per row is enough. torch.multinomial makes one per vocabulary
        # entry, which is slow.
        # (n, 1)
        u = torch.rand(len(logits), 1, device=logits.device, generator=generator)
        cumulative = logprobs.exp().cumsum(dim=-1)  # (n, V)
        level = u * cumulative[:, -1:]  # (n, 1), the last sum being about 1
        # The first token whose sum exceeds the level (right=True), so that a token of
        # probability 0 is never drawn.
        chosen = torch.searchsorted(cumulative, level, right=True)  # (n, 1)
        # If the logits are NaN the index is V. It stays in range, for the check below.
        chosen = chosen.clamp(max=logits.shape[1] - 1)
    values = logprobs.gather(1, chosen).flatten().tolist()  # n numbers
    if math.isnan(sum(values)):  # a sum is NaN if one of its terms is
        raise BadInput("the model's logits are NaN: its weights are damaged")
    return chosen.flatten().tolist(), values


def context_length(model) -> int:
    """The maximum number of tokens that a model can read at once."""
    config = model.config.get_text_config()
    mpt_limit = getattr(config, "max_seq_len", 1_000_000_000)
    return getattr(config, "max_position_embeddings", None) or mpt_limit


# ---------------------------------------------------------------- the cache


class RowCache(Cache):
    """A cache of keys and values, in which each trajectory has a row of its own.

    The token at position p of a trajectory is kept in slot p of its row. Take three
    rows; P is a token of a prompt, and a, b and c are sampled tokens:

        slot     0 1 2 3 4 5 6 7 8 9
        row 0    P P P a a
        row 1    P P b b
        row 2    P P c

    The turn of row 2 has ended. Rows 0 and 1 still sample, and each has one more token,
    sampled last, that the cache lacks. feed([[a], [b]]) reads it for these two rows
    only:

        slot     0 1 2 3 4 5 6 7 8 9
        row 0    P P P a a a
        row 1    P P b b b
        row 2    P P c

    The first n rows of a tensor are a view of it, so leaving row 2 out copies nothing.
    For this the rows whose turn has ended are swapped to the end (reorder).

    When all turns have ended, each row is fed its last sampled token and its
    observation (e), except for the last token of the observation. These chunks are
    [a, e, e], [b, e] and [c, e, e, e]. The shorter ones are padded (-), so that all are
    read at once:

        slot     0 1 2 3 4 5 6 7 8 9
        row 0    P P P a a a a e e -
        row 1    P P b b b b e - -
        row 2    P P c c e e e

    Padding does not count in the length of a row, and the next tokens of the row
    overwrite it. They never see it: a token at position p sees slots 0 to p.
    """

    def __init__(self, model):
        super().__init__(layers=[])
        self.model = model
        self.lengths = []  # tokens in each row
        self.store = {}  # ("keys" or "values", layer): (rows, heads, slots, width)
        self.used = 0  # slots in use, padding included, in the rows fed last

    def feed(self, chunks: list[list[int]]) -> torch.Tensor:
        """Append chunk i to row i. Returns the logits (n, V) after the n chunks.

        Chunks of different lengths are padded. Then the logits of the shorter ones are
        meaningless, and the caller must ignore them.
        """
        model = self.model
        device = model.device
        n = len(chunks)
        size = max(1, *map(len, chunks))
        padded = [chunk + [0] * (size - len(chunk)) for chunk in chunks]
        if not self.lengths:
            self.lengths = [0] * n  # the first feed makes the rows

        # The slots that this feed fills. The model calls update, and not we, so update
        # finds them here.
        lengths = self.lengths[:n]
        start = torch.tensor(lengths, device=device)[:, None]  # (n, 1)
        self.rows = torch.arange(n, device=device)[:, None]  # (n, 1)
        self.slots = start + torch.arange(size, device=device)  # (n, S)
        self.used = max(lengths) + size
        # A token sees the slots up to its own. The mask is added to the scores: one of
        # True and False would be turned into such a one in every layer.
        # (n, 1, S, used)
        seen = torch.arange(self.used, device=device) <= self.slots[:, None, :, None]
        mask = torch.where(seen, 0.0, -torch.inf).to(product_dtype(model))

        output = model(
            input_ids=torch.tensor(padded, device=device),  # (n, S)
            attention_mask=mask,  # (n, 1, S, used)
            # Positions of padding may exceed the model's maximum.
            position_ids=self.slots.clamp(max=context_length(model) - 1),  # (n, S)
            past_key_values=self,  # each layer calls update
            use_cache=True,
            logits_to_keep=1,
        )
        for row, chunk in enumerate(chunks):
            self.lengths[row] += len(chunk)
        return output.logits[:, -1].float()  # (n, V)

    def update(self, keys, values, layer: int, *args, **kwargs):
        """A layer passes its new keys and values, and receives those of all tokens.

        (n, heads, S, width) each -> (n, heads, used, width) each.
        """
        # Autocast leaves rotary keys in float32, which would take twice the memory.
        keys = keys.to(values.dtype)
        return self.write(("keys", layer), keys), self.write(("values", layer), values)

    def write(self, name, new):
        """Put new keys or values into the slots of this feed. Returns all in use."""
        kept = self.store.get(name, new[:, :, :0])
        missing = self.used - kept.shape[2]
        if missing > 0:
            # Add half as many slots again as are in use, so that growing stays rare.
            missing += self.used // 2
            # (rows, heads, slots, width)
            kept = torch.nn.functional.pad(kept, (0, 0, 0, missing))
            self.store[name] = kept
        # Token j of row i goes to slot self.slots[i, j]. Two index tensors around a
        # slice put their own dimensions first, so `new` is transposed to match.
        kept[self.rows, :, self.slots] = new.transpose(1, 2)  # (n, S, heads, width)
        return kept[: len(new), :, : self.used]  # (n, heads, used, width)

    def get_seq_length(self, *args) -> int:
        return self.used

    def reorder(self, order: list[int]) -> None:
        """Row order[i] becomes row i. All rows that move are copied in one call."""
        moved = [row for row, source in enumerate(order) if source != row]
        if not moved:
            return
        self.lengths[: len(order)] = [self.lengths[row] for row in order]
        target = torch.tensor(moved, device=self.model.device)
        source = torch.tensor(order, device=self.model.device)[target]
        for kept in self.store.values():
            kept[target] = kept[source]  # the right side is a copy, so rows can swap

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order.

        Indices may repeat: that is how prompts are copied.
        """
        self.lengths = [self.lengths[row] for row in rows]
        self.store = {name: kept[rows] for name, kept in self.store.items()}
