"""Search-E1 on one page, to read first: a language model, the policy, learns to search.
Run it with a seed (fifteen minutes on one core): python -m lessons.plain 0
As a notebook: jupytext --to notebook --output plain.ipynb lessons/plain.py"""

import json
import random
import re
import string
import sys
from statistics import mean, stdev
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("micro/model")
model = AutoModelForCausalLM.from_pretrained("micro/model")
optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


# %% [markdown]
# **The search engine (BM25).** A passage scores for each word of the query that it has:
# more for a rare word (idf), for a repeated one (tf), and in a short passage (norm).
# %%
def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def words(text):
    return re.findall(r"\w+", text.lower())


passages = ["{title}: {text}".format(**row) for row in read("micro/corpus.jsonl")]
bags = [words(passage) for passage in passages]
lengths = [len(bag) for bag in bags]
norm = 0.9 * (0.6 + 0.4 * torch.tensor(lengths) / mean(lengths))  # (P,) for P passages


def search(query):
    scores = torch.zeros_like(norm)  # (P,)
    for word in words(query):
        tf = torch.tensor([bag.count(word) for bag in bags])  # (P,)
        df = tf.count_nonzero()  # so many passages have the word
        idf = torch.log((len(bags) + 1) / (df + 0.5))
        scores += idf * tf / (tf + norm)
    best = scores.argsort(descending=True, stable=True)[:3]
    lines = [f"- {passages[number]}\n" for number in best if scores[number] > 0]
    return "".join(lines) or "nothing was found\n"


# %% [markdown]
# **A trajectory.** The policy writes <search>words</search>, up to four times, and at
# last <answer>name</answer>. Only what it writes is trained. The reward is exact match
# (EM): 1 if this is a golden answer but for capitals, punctuation, articles, else 0.
# %%
def normalize(text):
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


@torch.no_grad()
def rollout(question, greedy=False):
    trajectory = SimpleNamespace(
        prompt=tokenizer.encode(USER.format(question["question"])),
        response=[],  # all tokens after the prompt
        mask=[],  # for each of them, True if the policy wrote it
        logprobs=[],  # of those that it wrote, at the time when it wrote them
        searches=0,
        query_words=set(),  # all that it searched for
        reward=0.0,
    )
    turn = []
    while len(trajectory.prompt + trajectory.response) < 1024:
        # 1. From all tokens so far the policy predicts the next one, and it is drawn.
        tokens = torch.tensor([trajectory.prompt + trajectory.response])
        logprobs = model(tokens).logits[0, -1].log_softmax(dim=-1)  # (V,)
        token = torch.multinomial(logprobs.exp(), 1).item()
        if greedy:  # the likeliest token, for tests
            token = logprobs.argmax().item()
        turn += [token]
        trajectory.response += [token]
        trajectory.mask += [True]
        trajectory.logprobs += [logprobs[token]]
        if token == tokenizer.eos_token_id:
            break
        # 2. A turn is over when its text has a whole search or a whole answer in it.
        text = tokenizer.decode(turn)
        tag = re.match(r".*<(search|answer)>(.*)</\1>", text, re.DOTALL)
        if not tag:
            continue
        kind, content = tag.groups()
        if kind == "answer":
            golden_answers = map(normalize, question["golden_answers"])
            if normalize(content) in golden_answers:
                trajectory.reward = 1.0
            break
        if trajectory.searches == 4:
            break
        # 3. The policy will read what was found, but has not written it.
        found = tokenizer.encode(f"\n<information>\n{search(content)}</information>\n")
        trajectory.response += found
        trajectory.mask += [False] * len(found)
        trajectory.searches += 1
        trajectory.query_words.update(words(content))
        turn = []
    return trajectory


# %% [markdown]
# **GRPO** (group relative policy optimization). A group is five trajectories for one
# question. Above their mean reward the advantage is above 0, and what the policy wrote
# becomes likelier; below, less likely. The clip ends a push once it has changed the
# probability of a token by a fifth: never here, with one update a batch.
# %%
def sample_group(question):
    group = [rollout(question) for _ in range(5)]
    rewards = [trajectory.reward for trajectory in group]
    for trajectory in group:
        better_by = trajectory.reward - mean(rewards)
        trajectory.advantage = better_by / (stdev(rewards) + 1e-6)
    return group


def policy_logprobs(prompt, trajectory):
    tokens = torch.tensor([prompt + trajectory.response])
    logits = model(tokens).logits[0, len(prompt) - 1 : -1]  # (T, V), each for its next
    return logits[trajectory.mask].log_softmax(dim=-1)  # (N, V) for what it wrote


def grpo_losses(trajectory):
    predicted = policy_logprobs(trajectory.prompt, trajectory)  # (N, V)
    written = torch.tensor(trajectory.response)[trajectory.mask]  # (N,)
    logprobs = predicted[range(len(written)), written]  # (N,)
    ratio = torch.exp(logprobs - torch.tensor(trajectory.logprobs))  # (N,)
    gain = ratio * trajectory.advantage  # (N,)
    clipped = ratio.clamp(0.8, 1.2) * trajectory.advantage  # (N,)
    return -torch.minimum(gain, clipped)  # (N,)


def update(losses_of, trajectories):
    num_tokens = sum(sum(trajectory.mask) for trajectory in trajectories)
    for trajectory in trajectories:
        loss = losses_of(trajectory).sum() / num_tokens
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# %% [markdown]
# **OFSD** (offline self-distillation). The reference is a correct trajectory with the
# fewest searches. The student's trajectory is a wrong one if there is any, or else the
# right one that differs most. The student is the policy with the question alone; the
# teacher is the same policy with a privileged prompt, which shows the reference. The
# student learns the teacher's predictions at its own tokens. The teacher is frozen,
# asked once before these updates: else both could drift together.
# %%
def mine(group):
    reference = min(group, key=lambda other: (-other.reward, other.searches))
    for other in group:
        more_or_fewer = abs(other.searches - reference.searches)
        apart = len(other.query_words ^ reference.query_words)
        together = len(other.query_words | reference.query_words)
        other.difference = (-other.reward, more_or_fewer, apart / max(together, 1))
    student = max(group, key=lambda other: other.difference)
    if reference.reward == 0 or student.difference == reference.difference:
        return None
    return reference, student


def privileged_prompt(question, reference):
    shown = tokenizer.decode(reference.response).strip()
    text = (
        f"{question['question']}\n\n"
        "An expert answered this very question as follows:\n\n"
        f"{shown}\n\n"
        "Now answer it yourself."
    )
    return tokenizer.encode(USER.format(text))


def forward_kl(student):
    predicted = policy_logprobs(student.prompt, student)  # (N, V)
    teacher = student.teacher_logprobs  # (N, V)
    return (teacher.exp() * (teacher - predicted)).sum(dim=-1)  # (N,)


# %% [markdown]
# **The loop.** GRPO, then OFSD. The paper goes through both twice.
# %%
def test(when):
    questions = read("micro/test.jsonl")[:120]
    rewards = [rollout(question, greedy=True).reward for question in questions]
    print("EM", when, mean(rewards))


if __name__ == "__main__":
    random.seed(sys.argv[-1])
    torch.manual_seed(random.randrange(1000))
    questions = read("micro/train.jsonl")
    test("before")
    for _ in range(4):
        batch = []
        for question in random.sample(questions, 16):
            batch += sample_group(question)
        update(grpo_losses, batch)
    test("after GRPO")
    students = []
    for question in random.sample(questions, 120):
        pair = mine(sample_group(question))
        if pair:
            reference, student = pair
            prompt = privileged_prompt(question, reference)
            if len(prompt) <= 224:  # the model has never seen longer prompts
                student.teacher_logprobs = policy_logprobs(prompt, student).detach()
                students.append(student)
    for _ in range(16):
        update(forward_kl, random.sample(students, 16))
    test("after OFSD")
