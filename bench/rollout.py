"""How fast are rollouts? Four ways side by side, on the same model, questions and token counts.

    python bench/rollout.py      # micro/model, 16 questions x 5; some two minutes on 2 cores
    python bench/rollout.py --model path/to/SmolLM2-135M-Instruct --corpus passages.jsonl.gz \
        --questions questions.jsonl.gz --num-questions 8 --group-size 4 --scripted --repeats 1 \
        --ways abc

    (a) ours        rollout(): one cache through all turns, an observation is one chunk
    (b) re-encode   the common way: model.generate on the whole transcript, encoded anew each turn
    (c) one token   model.generate with one cache, but an observation fed a token a step
    (d) TRL         one whole GRPO step of TRL's GRPOTrainer against one of ours, if trl is there

(a) samples; (b) and (c) then replay its trajectories: a logits processor forces each token, so
all three run the same number of tokens. That spares (b) and (c) what (a) does pay for: looking
for closing tags and keeping log-probabilities. Tokens a second counts every token of the
responses, sampled and observed. The ways take turns, --repeats times; medians are printed.

--scripted is for a model that does not yet write the tags: its forward pass is computed as
always, and then its choice is overruled by a script of two searches and an answer for each
question, of random lengths. For (d), a model with random weights answers in one turn, so that
nearly every completion runs to the limit. Ours and TRL's steps take turns; in every second one
7 of 16 groups have no variance, the share of the default run (results/): TRL computes those too.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not bench/: it holds a rollout.py too

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LogitsProcessor, set_seed  # noqa: E402

from eval import load_questions  # noqa: E402
from grpo import frozen_copy, grpo_step  # noqa: E402
from retriever import open_index  # noqa: E402
from rollout import (  # noqa: E402
    RowCache, chat_ids, decode, encode, load_model, observation_ids, rollout, spans,
    standard_prompt,
)  # fmt: skip
from train import Config  # noqa: E402


class Scripted:
    """A model that computes as ever but says what its script says. An additional layer of the
    cache keeps the token ids, so that a row is known by its prompt wherever it is swapped to."""

    def __init__(self, model, script: dict[tuple, list[int]]):
        self.model, self.script, self.config = model, script, model.config
        self.device, self.dtype = model.device, model.dtype
        self.generation_config = model.generation_config

    def __call__(self, input_ids, position_ids, past_key_values, **kwargs):
        kwargs |= dict(position_ids=position_ids, past_key_values=past_key_values)
        output = self.model(input_ids=input_ids, **kwargs)
        kept = input_ids[:, None, :, None].double()  # (n, 1 head, S, width 1)
        history, _ = past_key_values.update(kept, kept, self.config.num_hidden_layers)
        for row in range(len(input_ids)):
            ids = history[row, 0, : int(position_ids[row, -1]) + 1, 0].long().tolist()
            prompt = next((p for p in self.script if tuple(ids[: len(p)]) == p), None)
            said = len(ids) - len(prompt or ())
            if prompt is not None and said < len(self.script[prompt]):
                output.logits[row, -1, self.script[prompt][said]] = 1e4
        return output


def write_script(tokenizer, index, questions: list[str]) -> dict[tuple, list[int]]:
    """For each prompt the ids of a response with two searches, observations included."""
    rng, script = random.Random(0), {}
    for question in questions:
        words, ids = question.rstrip("?").split(), []
        for number in range(3):
            thought = " ".join(rng.choices(words, k=rng.randrange(10, 30)))
            content = " ".join(rng.sample(words, min(4, len(words))))
            tag = "answer" if number == 2 else "search"
            ids += encode(tokenizer, f"<think> {thought} </think>\n<{tag}> {content} </{tag}>")
            if tag == "search":
                ids += observation_ids(tokenizer, index.search([content], 3)[0], 512)
        script[tuple(chat_ids(tokenizer, standard_prompt(tokenizer, question)))] = ids
    return script


class Force(LogitsProcessor):
    """Row i of the batch says tokens[i], then the end-of-sequence token."""

    def __init__(self, tokens: list[list[int]], width: int, eos: int):
        self.tokens, self.width, self.eos = tokens, width, eos

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.width
        wanted = [row[step] if step < len(row) else self.eos for row in self.tokens]
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, torch.tensor(wanted, device=scores.device)[:, None], 0.0)


def generate(model, tokenizer, texts: list[str], tokens: list[list[int]]) -> list[list[int]]:
    """model.generate on these texts, left-padded, until row i has said tokens[i]."""
    how = dict(padding=True, padding_side="left", add_special_tokens=False)
    batch = tokenizer(texts, return_tensors="pt", **how).to(model.device)
    width = batch["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=max(map(len, tokens)),
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
            logits_processor=[Force(tokens, width, tokenizer.eos_token_id)],
        )  # fmt: skip
    return [row[width : width + len(said)].tolist() for row, said in zip(out, tokens)]


def re_encode(model, tokenizer, index, record) -> None:
    texts = [decode(tokenizer, row.prompt_ids) for row in record]
    turns = [[ids for sampled, ids in spans(row) if sampled] for row in record]
    number, going = 0, list(range(len(record)))
    while going:
        tokens = [turns[i][number] for i in going]
        said = generate(model, tokenizer, [texts[i] for i in going], tokens)
        for i, ids in zip(going, said):
            texts[i] += decode(tokenizer, ids)
        number += 1
        going = [i for i in going if len(turns[i]) > number]
        found = index.search([record[i].queries[number - 1] for i in going], 3) if going else []
        for i, passages in zip(going, found):
            texts[i] += decode(tokenizer, observation_ids(tokenizer, passages, 512))


def one_token(model, tokenizer, index, record) -> None:
    texts = [decode(tokenizer, row.prompt_ids) for row in record]
    generate(model, tokenizer, texts, [row.response_ids for row in record])


class Clock:
    """Seconds spent in what it wraps."""

    def __init__(self):
        self.spent: dict = {}

    def wrap(self, function, name):
        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            key = name if isinstance(name, str) else name(*args, **kwargs)
            self.spent[key] = self.spent.get(key, 0.0) + time.perf_counter() - began
            return result

        return timed


def where_the_time_goes(sample, index) -> None:
    clock, feed = Clock(), RowCache.feed

    def kind(cache, chunks):
        return "decode" if max(map(len, chunks)) == 1 else "prefill and observations"

    RowCache.feed = clock.wrap(feed, kind)
    try:
        retriever = SimpleNamespace(search=clock.wrap(index.search, "retrieval"))
        clock.wrap(sample, "all")(retriever)
    finally:
        RowCache.feed = feed
    whole = clock.spent.pop("all")
    shares = {**clock.spent, "bookkeeping": whole - sum(clock.spent.values())}
    told = [f"{name} {seconds / whole:.1%}" for name, seconds in shares.items()]
    print("time of (a): " + ", ".join(told))


# ---------------------------------------------------------------- (d): one whole GRPO step


def grpo_steps(args, questions, index) -> None:
    """A GRPO step of ours and one of TRL's in turn: random weights of the model's shape, and one
    turn of --length tokens."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        print("(d) is skipped: trl is not installed")
        return
    base, tokenizer = load_model(args.model)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(base.config).eval()
    rows, size, steps = len(questions) * args.group_size, args.group_size, 2 * args.repeats + 2
    start, policy = frozen_copy(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    config = Config(group_size=size, micro_batch=args.micro_batch)
    clock, tokens, now = Clock(), [], {"step": 0}
    sample = clock.wrap(rollout, lambda *_, **__: ("ours", "sampling", now["step"]))

    def won(i: int) -> float:
        """Reward of trajectory i: one of a group wins, except that in every second step the first
        7 of 16 groups have no variance."""
        varies = now["step"] % 2 == 0 or i // size >= len(questions) * 7 // 16
        return float(i % size == 0 and varies)

    def step() -> None:
        how = dict(group_size=size, max_turn_tokens=args.length)
        sampled = sample(policy, tokenizer, index, questions, **how)
        rewards = torch.tensor([won(i) for i in range(rows)]).view(-1, size)  # (Q, G)
        grpo_step(policy, start, optimizer, sampled, rewards, config)
        tokens.append(sum(len(row.response_ids) for row in sampled) / rows)

    timed = clock.wrap(step, lambda: ("ours", "step", now["step"]))

    class InTurn(TrainerCallback):
        def on_step_begin(self, _, state, *args, **kwargs):
            now["step"] = state.global_step
            timed()

    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in questions]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model, processing_class=tokenizer, callbacks=[InTurn()],
            reward_funcs=lambda completions, **_: [won(i) for i in range(len(completions))],
            train_dataset=Dataset.from_list(prompts * steps),
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=args.micro_batch,
                num_generations=size, max_steps=steps, beta=0.0, temperature=1.0,
                gradient_accumulation_steps=rows // args.micro_batch,
                max_completion_length=args.length, learning_rate=1e-6, logging_steps=1,
                report_to=[], disable_tqdm=True, bf16=False, gradient_checkpointing=False,
                save_strategy="no", shuffle_dataset=False, dataloader_pin_memory=False,
            ),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        # TRL's few milliseconds between its micro-batches, and its optimiser's, are not counted.
        theirs = lambda what: lambda *_, **__: ("TRL", what, now["step"])
        trainer.training_step = clock.wrap(trainer.training_step, theirs("step"))
        model.generate = clock.wrap(model.generate, theirs("sampling"))
        trainer.train()
    name, logged = "completions/mean_length", trainer.state.log_history
    lengths = [row[name] for row in logged if name in row]
    print(f"\n(d) a whole GRPO step, {len(questions)} questions x {size}, one turn of at most "
          f"{args.length} tokens, random weights; ours wrote {sum(tokens) / steps:.1f} tokens "
          f"a response, TRL {sum(lengths) / steps:.1f}")  # fmt: skip
    print(f"{'groups with variance':26}{'ours':>9}{'sampling':>10}{'TRL':>9}{'sampling':>10}"
          f"{'ours is faster by':>19}")  # fmt: skip
    for first, kind in enumerate(["all", "9 of 16"]):  # the first two steps warm up
        one, sampling, two, theirs = (
            median(clock.spent[who, what, i] for i in range(first + 2, steps, 2))
            for who in ("ours", "TRL") for what in ("step", "sampling")
        )  # fmt: skip
        print(f"{kind:26}{one:8.2f}s{sampling:9.2f}s{two:8.2f}s{theirs:9.2f}s{two / one:18.2f}x")


def compare_sampling(args, questions, index) -> None:
    model, tokenizer = load_model(args.model)
    speaker = Scripted(model, write_script(tokenizer, index, questions)) if args.scripted else model
    how = dict(group_size=args.group_size, seed=0)
    sample = lambda retriever: rollout(speaker, tokenizer, retriever, questions, **how)

    record = sample(index)  # also warms up
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        sample(index)
        print(f"peak GPU memory of (a): {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    total = sum(len(row.response_ids) for row in record)
    print(json.dumps({
        "model": args.model, "trajectories": len(record), "tokens": total,
        "sampled": sum(sum(row.loss_mask) for row in record),
        "searches": sum(len(row.queries) for row in record) / len(record),
        "threads": torch.get_num_threads(), "device": str(model.device),
        "torch": torch.__version__,
    }))  # fmt: skip
    ways = {
        "(a) ours": lambda: sample(index),
        "(b) re-encode each turn": lambda: re_encode(model, tokenizer, index, record),
        "(c) one token a step": lambda: one_token(model, tokenizer, index, record),
    }
    ways = {name: way for name, way in ways.items() if name[1] in args.ways + "a"}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    ours = median(times["(a) ours"])
    print(f"\n{'way':26}{'seconds':>9}{'range':>16}{'tokens/s':>11}{'(a) is faster by':>19}")
    for name, took in times.items():
        typical, spread = median(took), f"{min(took):.2f}-{max(took):.2f}"
        print(f"{name:26}{typical:9.2f}{spread:>16}{total / typical:11.0f}{typical / ours:18.2f}x")
    where_the_time_goes(sample, index)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of rollouts, side by side.")
    parser.add_argument("--model", default="micro/model")
    parser.add_argument("--questions", default="micro/validation.jsonl")
    parser.add_argument("--corpus", default="micro/corpus.jsonl")
    parser.add_argument("--num-questions", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", default="abcd", help="which of (a) to (d) to run")
    parser.add_argument("--length", type=int, default=128, help="(d): tokens of a completion")
    parser.add_argument("--micro-batch", type=int, default=20, help="(d): sequences a forward pass")
    parser.add_argument("--scripted", action="store_true", help="the model says what a script says")
    args = parser.parse_args()
    index = open_index(args.corpus)
    questions = [row["question"] for row in load_questions(args.questions)[: args.num_questions]]
    if set(args.ways) & set("abc"):
        compare_sampling(args, questions, index)
    if "d" in args.ways:
        grpo_steps(args, questions, index)


if __name__ == "__main__":
    main()
