"""The six files do what lessons/plain.py says, only faster: here they are held to it.

Both sides run the same model, on the CPU in float32. Tokens, pairs and prompts must be
equal. Numbers may differ by rounding, since the six files add in another order (with a
cache, a padded batch, a chunk of logits). The largest such gap was 2.5e-6 of the
largest number, and TOLERANCE is eight times that.
"""

import ast
import contextlib
import importlib
import json
import math
import random
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ofsd
from eval import exact_match, normalize_answer, rewards_of
from grpo import group_advantages, grpo_step, response_logits
from machinery.questions import load_questions
from machinery.text import chat_ids, encode
from retriever import BM25, load_corpus, words
from rollout import Trajectory, observation_ids, rollout, standard_prompt

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def plain():
    """The page, without its last cell. Its paths begin at the repository's folder."""
    with contextlib.chdir(ROOT):
        return importlib.import_module("lessons.plain")


@pytest.fixture(scope="module")
def questions():
    return load_questions(str(ROOT / "micro/train.jsonl"))[:25]


@pytest.fixture(scope="module")
def groups(plain, micro_index, questions):
    """Five trajectories of the six files for each question."""
    texts = [question["question"] for question in questions]
    trajectories = rollout(
        plain.model, plain.tokenizer, micro_index, texts, group_size=5, seed=0
    )
    return [trajectories[first : first + 5] for first in range(0, len(trajectories), 5)]


@pytest.fixture(scope="module")
def pairs(plain, questions, groups):
    """The pairs of the six files, with privileged prompts that are not cut."""
    trajectories = list(chain.from_iterable(groups))
    found, _ = ofsd.mine_pairs(
        plain.model,
        plain.tokenizer,
        questions,
        trajectories,
        rewards_of(questions, trajectories),
        max_tokens=1024,
    )
    return found


def on_the_page(question, trajectory):
    """A trajectory of the six files, as plain.rollout would return it."""
    mask = [bool(sampled) for sampled in trajectory.loss_mask]
    sampled = zip(trajectory.logprobs, mask, strict=True)
    return SimpleNamespace(
        prompt=trajectory.prompt_ids,
        response=trajectory.response_ids,
        mask=mask,
        logprobs=[logprob for logprob, is_sampled in sampled if is_sampled],
        searches=len(trajectory.queries),
        query_words=set(words(" ".join(trajectory.queries))),
        reward=exact_match(trajectory.answer, question["golden_answers"]),
    )


def gap(one, other):
    """The largest difference, as a share of the largest number."""
    one = torch.as_tensor(one, dtype=torch.float64)
    other = torch.as_tensor(other, dtype=torch.float64)
    return ((one - other).abs().max() / one.abs().max()).item()


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradient, and changes no weight."""

    def step(self):
        parameters = self.param_groups[0]["params"]
        self.gradient = torch.cat([p.grad.flatten().clone() for p in parameters])


def recorder(plain):
    return Recorder(plain.model.parameters(), lr=0.0)


def test_greedy_trajectories(plain, micro_index):
    """Twenty test questions: the same tokens, masks, log-probabilities and rewards."""
    asked = load_questions(str(ROOT / "micro/test.jsonl"))[:20]
    texts = [question["question"] for question in asked]
    theirs = rollout(plain.model, plain.tokenizer, micro_index, texts, temperature=0.0)
    for question, trajectory in zip(asked, theirs, strict=True):
        page = vars(plain.rollout(question, greedy=True))
        six = vars(on_the_page(question, trajectory))
        assert gap(page.pop("logprobs"), six.pop("logprobs")) < TOLERANCE
        assert page == six
    rewards = rewards_of(asked, theirs)
    assert 0 < sum(rewards) < 20


class Bigrams:
    """A stand-in for a model. It writes one text again and again: each token follows
    the one before, and the first follows a prompt or an observation."""

    def __init__(self, plain, text):
        self.config = plain.model.config
        self.generation_config = plain.model.generation_config
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        ids = encode(plain.tokenizer, "\n" + text)
        assert len(set(ids)) == len(ids), "each token needs one that follows it"
        self.following = dict(zip(ids, ids[1:] + ids[1:2], strict=True))

    def parameters(self):
        return []

    def __call__(self, tokens=None, input_ids=None, **others):
        last = (input_ids if tokens is None else tokens)[:, -1].tolist()
        logits = torch.zeros(len(last), 1, self.config.vocab_size)  # (B, 1, V)
        for row, token in enumerate(last):
            logits[row, 0, self.following.get(token, 0)] = 9.0
        return SimpleNamespace(logits=logits)


ENDS = {
    "<search> Works</search>": "searches",  # a fifth one is written, but not executed
    "<think> Works<|im_end|>": "eos",
    "</search><answer><search> Works</answer>": "answer",
    "<search><answer> Works</search>": "searches",
    "<think> Works.": "context",
}


@pytest.mark.parametrize("text", ENDS)
def test_ends_of_a_trajectory(plain, micro_index, monkeypatch, text):
    """The page has no limit of a turn, which nothing in micro/ reaches."""
    model = Bigrams(plain, text)
    question = {"question": "Who?", "golden_answers": ["<search> works"]}
    [trajectory] = rollout(
        model,
        plain.tokenizer,
        micro_index,
        [question["question"]],
        temperature=0.0,
        max_turn_tokens=2000,
    )
    assert trajectory.finish_reason == ENDS[text]
    monkeypatch.setattr(plain, "model", model)
    page = vars(plain.rollout(question, greedy=True))
    six = vars(on_the_page(question, trajectory))
    assert gap(page.pop("logprobs"), six.pop("logprobs")) < TOLERANCE
    assert page == six
    assert page["reward"] == (ENDS[text] == "answer")


def test_searches(plain, micro_index, groups):
    """The same passages, as the same tokens, for all queries of the groups."""
    queries = {query for group in groups for t in group for query in t.queries}
    odd_ones = ["", "zzz", "Labs", "is by", "Who or what is it, and of what?"]
    for query in sorted(queries)[:60] + odd_ones:
        passages = micro_index.search([query], 3)[0]
        text = f"\n<information>\n{plain.search(query)}</information>\n"
        ids = plain.tokenizer.encode(text)
        assert ids == observation_ids(plain.tokenizer, passages, 512)


def test_searches_of_another_world(plain, tmp_path):
    """The passages of micro/ are equally long. Here they are not."""
    drawn = random.Random(0)
    known = ["ada", "and", "the", "loom", "engine", "of", "byron", "paper", "punched"]
    rows = []
    for number in range(40):
        length = drawn.randint(1, 12)
        text = " ".join(drawn.choices(known, weights=range(1, 10), k=length))
        rows.append({"id": str(number), "title": drawn.choice(known), "text": text})
    corpus = tmp_path / "micro/corpus.jsonl"
    corpus.parent.mkdir()
    corpus.write_text("\n".join(map(json.dumps, rows)))
    # The cell with the search engine, run in a folder with another corpus.
    cells = (ROOT / "lessons/plain.py").read_text().split("# %%")
    [cell] = [cell for cell in cells if "def search(" in cell]
    page = dict(vars(plain))
    with contextlib.chdir(tmp_path):
        exec(cell, page)
    index = BM25(load_corpus(corpus))
    for _ in range(200):
        query = " ".join(drawn.choices(known, k=drawn.randint(1, 4)))
        best = [f"- {p.title}: {p.text}\n" for p in index.search([query], 3)[0]]
        assert page["search"](query) == "".join(best)


@pytest.mark.parametrize(
    "text", ["The U.S.A.,  a country", "an", "", "Ada's «Works»\n", "THE-a-b", "_the_"]
)
def test_normalization(plain, text):
    assert " ".join(plain.normalize(text)) == normalize_answer(text)


def test_advantages(plain, questions, groups, monkeypatch):
    sums = set()
    for question, group in zip(questions, groups, strict=True):
        waiting = [on_the_page(question, trajectory) for trajectory in group]
        monkeypatch.setattr(plain, "rollout", lambda _, waiting=waiting: waiting.pop())
        page = plain.sample_group(question)
        rewards = torch.tensor([[trajectory.reward for trajectory in page]])  # (1, G)
        six = group_advantages(rewards)[0]  # (G,)
        assert [t.advantage for t in page] == pytest.approx(six.tolist(), rel=1e-5)
        sums.add(rewards.sum().item())
    assert len(sums) > 3


def test_logprobs(plain, questions, groups):
    """Those of training, of the plain forward pass, and of sampling with a cache."""
    for question, group in zip(questions[:10], groups, strict=False):
        page = on_the_page(question, group[0])
        with torch.no_grad():
            logprobs = plain.policy_logprobs(page.prompt, page)  # (N, V)
            logits = response_logits(plain.model, group[0])[page.mask]  # (N, V)
        assert gap(logprobs, logits.log_softmax(-1)) < TOLERANCE
        sampled = torch.tensor(page.response)[page.mask]  # (N,)
        chosen = logprobs.gather(1, sampled[:, None])[:, 0]  # (N,)
        assert gap(chosen, page.logprobs) < TOLERANCE


def test_privileged_prompts(plain, questions, pairs):
    for question in questions:
        text = standard_prompt(plain.tokenizer, question["question"])
        page = plain.tokenizer.encode(plain.USER.format(question["question"]))
        assert page == chat_ids(plain.tokenizer, text)
    for pair in pairs:
        reference = on_the_page(pair.question, pair.reference)
        assert plain.privileged_prompt(pair.question, reference) == pair.prompt


def test_mining(plain, questions, groups):
    """The same pairs of the groups that were sampled, and of groups drawn at random."""
    drawn = random.Random(0)
    cases = list(zip(questions, groups, strict=True))
    anyone = {"question": "?", "golden_answers": ["Ada"]}
    cases += [(anyone, random_group(drawn)) for _ in range(500)]
    kinds = set()
    for question, group in cases:
        page_group = [on_the_page(question, trajectory) for trajectory in group]
        rewards = [trajectory.reward for trajectory in page_group]
        page = plain.mine(page_group)
        six = ofsd.mine_pair(group, rewards)
        if page is None:
            assert six is None
            kinds.add("none is right" if max(rewards) == 0 else "no contrast")
            continue
        # The very same trajectories, by their places in the group.
        assert [page_group.index(t) for t in page] == [group.index(t) for t in six]
        kinds.add("wrong student" if page[1].reward == 0 else "right student")
    assert len(kinds) == 4


def random_group(drawn):
    """Five trajectories that matter to mining only: some queries, and an answer."""
    known = [[], [""], ["Ada works"], ["works", "ADA"], ["Ada works for", "Bob"]]
    group = []
    searches = drawn.sample(known, k=drawn.randint(1, 3))
    for number in range(5):
        # The number in the prompt makes each one different from all others.
        trajectory = Trajectory("?", [number], queries=drawn.choice(searches))
        trajectory.answer = drawn.choice(["Ada", "Ada", "Ada", "Bob"])
        group.append(trajectory)
    return group


def test_divergences(plain, pairs):
    for pair in pairs[:8]:
        student = with_teacher(plain, pair)
        with torch.no_grad():
            page = plain.forward_kl(student)  # (N,)
        six = ofsd.token_divergences(plain.model, pair)
        assert gap(page, [value for value in six if value is not None]) < TOLERANCE


def with_teacher(plain, pair):
    """The student's trajectory, as the last cell of the page prepares it."""
    student = on_the_page(pair.question, pair.student)
    student.teacher_logprobs = plain.policy_logprobs(pair.prompt, student).detach()
    return student


def test_gradient_of_grpo(plain, questions, groups, monkeypatch):
    """One update on four groups. Old log-probabilities are moved: some are clipped."""
    drawn = random.Random(0)
    trajectories = []
    rewards = []
    page = []
    for question, group in zip(questions, groups, strict=True):
        group_rewards = rewards_of([question], group)
        if len(rewards) == 4 or len(set(group_rewards)) == 1:
            continue
        advantages = group_advantages(torch.tensor([group_rewards]))[0].tolist()
        for trajectory, advantage in zip(group, advantages, strict=True):
            moved = [logprob + drawn.gauss(0, 0.3) for logprob in trajectory.logprobs]
            trajectories.append(replace(trajectory, logprobs=moved))
            page.append(on_the_page(question, trajectories[-1]))
            page[-1].advantage = advantage
        rewards.append(group_rewards)

    six_optimizer = recorder(plain)
    stats = grpo_step(
        plain.model,
        six_optimizer,
        trajectories,
        torch.tensor(rewards),
        max_grad_norm=math.inf,  # the page does not clip gradients
        micro_batch=6,
    )
    assert stats["clip_frac"] > 0.1
    monkeypatch.setattr(plain, "optimizer", recorder(plain))
    plain.update(plain.grpo_losses, page)
    assert gap(six_optimizer.gradient, plain.optimizer.gradient) < TOLERANCE


def test_gradient_of_ofsd(plain, pairs, monkeypatch):
    """One update on eight pairs, with the model as its own frozen teacher."""
    six_optimizer = recorder(plain)
    ofsd.ofsd_step(
        plain.model,
        plain.model,
        six_optimizer,
        pairs[:8],
        max_grad_norm=math.inf,
        micro_batch=3,
    )
    monkeypatch.setattr(plain, "optimizer", recorder(plain))
    students = [with_teacher(plain, pair) for pair in pairs[:8]]
    plain.update(plain.forward_kl, students)
    assert gap(six_optimizer.gradient, plain.optimizer.gradient) < TOLERANCE


def test_the_page_stands_alone():
    """It imports nothing of the repository, and it is one page."""
    text = (ROOT / "lessons/plain.py").read_text()
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    assert modules <= {*sys.stdlib_module_names, "torch", "numpy", "transformers"}
    assert len(text.splitlines()) <= 220
