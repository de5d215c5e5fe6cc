"""Search-E1 on one page: a language model, the policy, learns to search. Read it first.
Run it with a seed (some fifteen minutes on one core), or turn it into a notebook:
    python -m lessons.plain 0
    jupytext --to notebook --output plain.ipynb lessons/plain.py
"""

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
# **A trajectory.** The policy thinks, searches and reads, and at last it answers. The
# reward is exact match (EM): 1 if the answer is right but for capitals, punctuation and
# articles, else 0. The mask says which tokens the policy wrote: only these are trained.
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
        logprobs=[],  # of those that it wrote
        searches=0,
        words=set(),  # that it searched for
        reward=0.0,
    )
    turn = []
    while len(trajectory.prompt + trajectory.response) < 1024:
        # 1. From all tokens so far the policy predicts the next one, and it is drawn.
        tokens = torch.tensor([trajectory.prompt + trajectory.response])
        logprobs = model(tokens).logits[0, -1].log_softmax(dim=-1)  # (V,)
        token = torch.multinomial(logprobs.exp(), 1).item()
        if greedy:
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
        trajectory.words.update(words(content))
        turn = []
    return trajectory


# %% [markdown]
# **GRPO.** Five trajectories are sampled for a question, and each reward is compared
# with the mean of the five. All that the policy wrote becomes likelier in a better one,
# and less likely in a worse one. The clip stops a token that has moved by a fifth.
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
    logits = model(tokens).logits[0, len(prompt) - 1 : -1]  # (T, V) one place before
    return logits[trajectory.mask].log_softmax(dim=-1)  # (N, V) where the policy wrote


def grpo_losses(trajectory):
    predicted = policy_logprobs(trajectory.prompt, trajectory)  # (N, V)
    written = torch.tensor(trajectory.response)[trajectory.mask]  # (N,)
    logprobs = predicted[range(len(written)), written]  # (N,)
    ratio = torch.exp(logprobs - torch.tensor(trajectory.logprobs))
    gain = ratio * trajectory.advantage
    clipped = ratio.clamp(0.8, 1.2) * trajectory.advantage
    return -torch.minimum(gain, clipped)


def update(losses_of, trajectories):
    num_tokens = sum(sum(trajectory.mask) for trajectory in trajectories)
    for trajectory in trajectories:
        loss = losses_of(trajectory).sum() / num_tokens
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# %% [markdown]
# **OFSD.** The right trajectory with the fewest searches is the reference. The one that
# differs most from it, a wrong one if there is any, is the student's. The policy is its
# own teacher: with the reference in its prompt, it predicts the student's tokens again,
# and learns to predict so without it. The teacher is frozen, for it predicts only once,
# before training. If it learned, too, the two could agree on the student's mistakes.
# %%
def mine(group):
    reference = min(group, key=lambda other: (-other.reward, other.searches))
    for other in group:
        searches = abs(other.searches - reference.searches)
        apart = len(other.words ^ reference.words)
        together = len(other.words | reference.words)
        other.difference = (-other.reward, searches, apart / max(together, 1))
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


def divergences(student):
    predicted = policy_logprobs(student.prompt, student)  # (N, V)
    teacher = student.teacher  # (N, V)
    return (teacher.exp() * (teacher - predicted)).sum(dim=-1)  # (N,)


# %% [markdown]
# **The loop.** The paper goes through it twice.
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
            student.teacher = policy_logprobs(prompt, student).detach()
            if len(prompt) <= 224:  # the policy cannot read longer ones
                students.append(student)
    for _ in range(16):
        update(divergences, random.sample(students, 16))
    test("after OFSD")
