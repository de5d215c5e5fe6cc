"""Search-E1: GRPO and offline self-distillation in turn, until the policy searches well.

    for each round:
        GRPO   rollouts, exact-match rewards, one clipped policy update a batch        (grpo.py)
        OFSD   re-sample, mine (reference, student) pairs, measure the teacher's edge,
               distil the privileged policy into the standard one                      (ofsd.py)

    python train.py                               # two rounds on the micro world; minutes on 2 cores
    python train.py --seed 1 --out runs/seed1     # every field of Config is a flag
    torchrun --standalone --nproc-per-node 2 train.py   # a process a device; the gradient is that of one

It writes to runs/NAME: config.json; metrics.jsonl, a line a step, a mining and an evaluation
(kind says which); trajectories.jsonl, every evaluation's answers and every mined pair; and
model/, which transformers loads.

What a step's line says: reward; zero_var, the share of groups with equal rewards (they teach
nothing); kl to the start policy (k3); clip_frac; entropy; grad_norm; length of a response in
tokens; searches; no_answer and repeats, shares of trajectories (repeats: asks a query twice);
logprob_gap, the largest difference between the rollout's log-probability of a token and the
training pass's before any update: a bug in mask, cache or temperature shows here first.

Deviations from the paper
    1. Sizes and learning rates are those of a model of a million parameters on two cores; the
       README has the paper's.
    2. Before a stage of distillation the teacher's edge is measured on fresh samples, and a
       stage without a positive supported edge is skipped (--force-ofsd runs it): a teacher
       that is no better, or that only copies the reference's answer, does harm.
    3. GRPO's learning rate falls over the run (the paper states no schedule): at a constant one the
       teacher's supported edge before the second distillation was -.08 to +.07 on validation.
"""

import copy
import json
import os
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import set_seed

from eval import exact_match, load_mixture, load_questions, score
from grpo import (
    backward_in_chunks, grpo_step, knows_output_layer, micro_batches, output_layer, over_ranks, policy_hidden, rank_and_ranks,
    same_on_all_ranks, update,
)  # fmt: skip
from ofsd import Adapters, divergences, mine_pair, privileged_prompt, spans
from retriever import BadInput, Parser, RemoteRetriever, open_index, run_script
from rollout import Trajectory, autocast, context_length, decode, load_model, rollout


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    model: str = setting("micro/model", "where the policy starts: a model folder or hub name")
    questions: str = setting("micro/train.jsonl", "training questions: JSON lines or hub/dataset:config:split; or several, with commas")
    eval_questions: str = setting("micro/test.jsonl", "questions of the final table")
    corpus: str = setting("micro/corpus.jsonl", "passages to search: JSON lines; CORPUS.bm25 is their saved index, if it is newer")
    retriever_url: str = setting("", "a server that speaks Search-R1's protocol, in place of a corpus")
    out: str = setting("", "folder of this run; must not exist (default: runs/ and the date)")
    seed: int = setting(0, "seed of Python, numpy, torch and sampling")
    rounds: int = setting(2, "rounds of GRPO and then OFSD")
    # the search environment
    max_searches: int = setting(4, "searches a question")
    k: int = setting(3, "passages a search")
    max_tokens: int = setting(2048, "tokens of a response, observations included")
    max_turn_tokens: int = setting(256, "tokens of a turn")
    max_observation_tokens: int = setting(512, "tokens of an observation")
    prompt: str = setting("", "wording of the prompt, with {question} in it (default: the tokenizer's, or PROMPT)")
    # GRPO
    grpo_steps: int = setting(20, "steps a round")
    questions_per_step: int = setting(16, "groups a step")
    group_size: int = setting(5, "G, trajectories a question; also K, OFSD's")
    grpo_lr: float = setting(1.5e-4, "learning rate of AdamW at the start; it falls in a line to 0 at the last round's end")
    updates: int = setting(1, "updates on each batch of rollouts")
    clip_eps: float = setting(0.2, "epsilon of the clipped ratio")
    kl_coef: float = setting(0.0, "beta, the weight of the k3 penalty to the start policy")
    # OFSD
    ofsd_questions: int = setting(360, "training questions re-sampled before distillation (0: all)")
    ofsd_epochs: int = setting(2, "passes over the mined pairs")
    ofsd_batch: int = setting(16, "pairs an update")
    ofsd_lr: float = setting(2e-4, "learning rate of AdamW")
    divergence: str = setting("forward_kl", "forward_kl, reverse_kl or jsd")
    clip: str = setting("none", "none, entry (the paper's) or position")
    tau: float = setting(0.05, "cap of the clip, in nats")
    max_reference_tokens: int = setting(224, "tokens of the privileged prompt; passages of the reference are cut to fit")
    lora_rank: int = setting(0, "distil into adapters of this rank, then merge them, as the paper does (0: all weights)")
    grpo_lora_rank: int = setting(0, "the same in a GRPO stage, for a card too small for all weights")
    force_ofsd: bool = setting(False, "distil even where the teacher has no supported edge")
    # hardware and evaluation
    micro_batch: int = setting(20, "sequences a forward pass in training")
    gradient_checkpointing: bool = setting(False, "keep only each layer's input for the backward pass: less memory, a third more time")
    rollout_batch: int = setting(256, "trajectories in flight while sampling")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    eval_limit: int = setting(0, "evaluate on the first so many questions only (0: all)")

    def __post_init__(self):
        for name, allowed in {"divergence": ("forward_kl", "reverse_kl", "jsd"), "clip": ("none", "entry", "position")}.items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.prompt and "{question}" not in self.prompt:
            raise BadInput("prompt must hold {question}, where the question goes")
        zero_allowed = {"seed", "rounds", "max_searches", "grpo_steps", "kl_coef", "ofsd_questions", "ofsd_epochs", "eval_limit"}
        zero_allowed |= {"lora_rank", "grpo_lora_rank"}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type in (int, float) and not (value > 0 or (value == 0 and item.name in zero_allowed)):
                raise BadInput(f"{item.name} must be {'at least 0' if item.name in zero_allowed else 'above 0'}, not {value}")


class Run:
    """What both stages need at hand: the policy and its tools, and the files of the run."""

    def __init__(self, config: Config):
        # Everything that can be wrong with the input is found before the folder is made.
        self.config = config
        self.rank, self.ranks = rank_and_ranks()
        self.folder = Path(config.out or time.strftime("runs/%Y%m%d-%H%M%S-seed") + str(config.seed))
        if self.folder.exists() and self.rank == 0:
            raise BadInput(f"{self.folder} exists already: choose another --out, or remove it")
        test_set = load_questions(config.eval_questions)
        self.train_set = load_mixture(config.questions, test_set)
        self.test_set = test_set[: config.eval_limit or None]
        self.retriever = RemoteRetriever(config.retriever_url) if config.retriever_url else open_index(config.corpus)
        self.retriever.search([self.train_set[0]["question"]], config.k)  # is the server there?
        self.model, self.tokenizer = load_model(config.model)
        if not knows_output_layer(self.model):
            raise BadInput(f"{config.model}: its output layer does more than a product, which training here does not know")
        if config.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        if config.prompt:  # kept in the tokenizer's files, so that the trained model carries it
            self.tokenizer.init_kwargs["search_prompt"] = config.prompt
        set_seed(config.seed)  # Python, numpy and torch; rollouts draw from torch's state
        if self.rank:  # the others sample differently; what stages draw from rng is the same on all
            torch.manual_seed(config.seed + 1_000_003 * self.rank)
        self.rng = random.Random(config.seed)
        self.start = frozen_copy(self.model)
        self.evaluations: list[dict] = []
        self.began = time.time()
        if self.rank:
            return
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise BadInput(f"cannot make the run's folder: {error}") from None
        (self.folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")

    def log(self, kind: str, stage: str, **metrics) -> None:
        self.append("metrics.jsonl", {"kind": kind, "stage": stage, **metrics, "time_s": time.time() - self.began})

    def append(self, name: str, row: dict) -> None:
        if self.rank:
            return
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def sample(self, questions: list[dict], *, prompts: list | None = None, group_size: int = 1, **how) -> list[Trajectory]:
        """rollout() by this run's settings. Every rank samples its share and gets the whole."""
        mine = slice(self.rank, None, self.ranks)
        trajectories = rollout(
            self.model, self.tokenizer, self.retriever, [q["question"] for q in questions[mine]],
            prompts=prompts and prompts[mine], group_size=group_size, **self.sampling(), **how,
        )  # fmt: skip
        if self.ranks == 1:
            return trajectories
        parts: list = [None] * self.ranks
        dist.all_gather_object(parts, trajectories)
        groups = [(i % self.ranks, i // self.ranks * group_size) for i in range(len(questions))]
        return [t for rank, first in groups for t in parts[rank][first : first + group_size]]

    def sampling(self) -> dict:
        names = "max_searches", "k", "max_tokens", "max_turn_tokens", "max_observation_tokens"
        return {name: getattr(self.config, name) for name in names} | {"batch_size": self.config.rollout_batch}

    def evaluate(self, stage: str, **edge) -> None:
        """Test the policy greedily; log it with every answer; save the model."""
        trajectories = self.sample(self.test_set, temperature=0.0, progress=f"test {stage}")
        metrics = score(self.test_set, trajectories) | edge
        self.log("eval", stage, **metrics)
        self.evaluations.append({"stage": stage, **metrics, "time_s": time.time() - self.began})
        for question, trajectory in zip(self.test_set, trajectories):
            em = exact_match(trajectory.answer, question["golden_answers"])
            self.append("trajectories.jsonl", {"kind": "eval", "stage": stage, "id": question["id"], "em": em}
                        | self.as_json(trajectory) | {"golden_answers": question["golden_answers"]})  # fmt: skip
        if self.rank == 0:
            self.model.save_pretrained(self.folder / "model")
            self.tokenizer.save_pretrained(self.folder / "model")
        print(f"test, {stage}: EM {metrics['em']:.3f}, {metrics['searches']:.2f} searches, "
              f"{metrics['answered']:.3f} answered, {(time.time() - self.began) / 60:.1f} min")  # fmt: skip

    def as_json(self, trajectory: Trajectory) -> dict:
        """text: [[who, text], ...], who is 1 for the policy and 0 for the environment."""
        text = [[int(sampled), decode(self.tokenizer, ids)] for sampled, ids in spans(trajectory)]
        names = "question", "answer", "queries", "finish_reason"
        return {name: getattr(trajectory, name) for name in names} | {"text": text}


def frozen_copy(model):
    """On a GPU in bfloat16, in half the memory: autocast computes in it anyway."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return frozen.bfloat16() if model.device.type == "cuda" else frozen


def trainable(model, lora_rank: int) -> tuple[Adapters | None, list]:
    """Adapters, if a rank is given, and the parameters that a stage trains."""
    adapters = Adapters(model, lora_rank) if lora_rank else None
    parameters = list((adapters or model).parameters())
    same_on_all_ranks(parameters)  # adapters begin with random numbers
    return adapters, parameters


# ---------------------------------------------------------------- GRPO


COLUMNS = "reward zero_var kl clip_frac entropy grad_norm length searches no_answer repeats logprob_gap".split()


def grpo_stage(run: Run, number: int) -> None:
    """Stage grpo-<number>; number counts the rounds from 1."""
    config, stage = run.config, f"grpo-{number}"
    adapters, trained = trainable(run.model, config.grpo_lora_rank)
    optimizer = torch.optim.AdamW(trained, lr=config.grpo_lr, weight_decay=0.0)
    print(f"\n{stage}: {config.grpo_steps} steps\n step " + " ".join(f"{name:>8}" for name in COLUMNS) + "  seconds")
    waiting: list[dict] = []  # each pass over the questions is a fresh shuffle
    for step in range(1, config.grpo_steps + 1):
        began = time.time()
        done = (number - 1) * config.grpo_steps + step - 1
        optimizer.param_groups[0]["lr"] = config.grpo_lr * (1 - done / (config.rounds * config.grpo_steps))
        while len(waiting) < config.questions_per_step:
            waiting += run.rng.sample(run.train_set, len(run.train_set))
        questions, waiting = waiting[: config.questions_per_step], waiting[config.questions_per_step :]
        trajectories = run.sample(questions, group_size=config.group_size, progress="rollout")
        golds = [q["golden_answers"] for q in questions for _ in range(config.group_size)]
        rewards = torch.tensor([exact_match(t.answer, gold) for t, gold in zip(trajectories, golds)])
        rewards = rewards.view(-1, config.group_size)  # (Q, G)
        sampled_s = time.time() - began
        stats = grpo_step(run.model, run.start, optimizer, trajectories, rewards, config)
        count = len(trajectories)
        stats |= {
            "reward": rewards.mean().item(),
            "zero_var": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
            "length": sum(len(t.response_ids) for t in trajectories) / count,
            "searches": sum(len(t.queries) for t in trajectories) / count,
            "no_answer": sum(t.answer is None for t in trajectories) / count,
            "repeats": sum(len(set(map(str.lower, t.queries))) < len(t.queries) for t in trajectories) / count,
        }
        run.log("step", stage, step=step, **stats, rollout_s=sampled_s, step_s=time.time() - began)
        values = " ".join(f"{stats[name]:{max(8, len(name))}.3g}" for name in COLUMNS)
        print(f"{step:5d} {values} {time.time() - began:8.1f}")
    if adapters:
        adapters.merge()


# ---------------------------------------------------------------- OFSD


def mine(run: Run, questions: list[dict], trajectories: list[Trajectory]) -> tuple[list[tuple], dict]:
    """Pairs as (question, reference, student, privileged prompt), and what was counted."""
    pairs, counts = [], dict(pairs=0, no_correct=0, no_contrast=0, too_long=0)
    size = run.config.group_size
    for i, question in enumerate(questions):
        group = trajectories[i * size : (i + 1) * size]
        rewards = [exact_match(t.answer, question["golden_answers"]) for t in group]
        pair = mine_pair(group, rewards)
        if pair is None:
            counts["no_contrast" if any(rewards) else "no_correct"] += 1
            continue
        room = min(run.config.max_reference_tokens, context_length(run.model) - len(pair[1].response_ids))
        prompt = privileged_prompt(run.tokenizer, question["question"], pair[0], room)
        if prompt is None:
            counts["too_long"] += 1
            continue
        pairs.append((question, *pair, prompt))
    return pairs, counts | {"pairs": len(pairs)}


def teacher_edge(run: Run, pairs: list[tuple]) -> dict:
    """On fresh samples for the mined questions: EM under the privileged prompt minus EM under
    the standard one, and the same counting only answers a retrieved passage supports."""
    questions = [question for question, *_ in pairs]
    with_reference = score(questions, run.sample(questions, prompts=[prompt for *_, prompt in pairs], progress="teacher"))
    without = score(questions, run.sample(questions, progress="student"))
    return {
        "edge": with_reference["em"] - without["em"],
        "edge_supported": with_reference["em_supported"] - without["em_supported"],
        "teacher_em": with_reference["em"],
        "student_em": without["em"],
    }


def ofsd_step(model, teacher, optimizer, pairs: list[tuple], config: Config, adapters: Adapters | None = None) -> dict:
    """One update on a batch of pairs. With adapters the teacher is the model itself, without them."""
    num_tokens = sum(sum(student.loss_mask) for _, _, student, _ in pairs)
    taught_head = output_layer(teacher)

    def loss(logits, taught):
        with torch.no_grad():
            taught_logits = taught_head(taught)  # (n, V)
        how = dict(kind=config.divergence, clip=config.clip, tau=config.tau)
        return divergences(logits, taught_logits, **how).sum() / num_tokens

    total = 0.0
    rank, ranks = rank_and_ranks()
    for group in micro_batches(pairs, config.micro_batch, lambda pair: len(pair[2].response_ids))[rank::ranks]:
        # The same ids for both readers.
        texts = [student.response_ids for _, _, student, _ in group], [student.loss_mask for _, _, student, _ in group]
        with autocast(model.device):
            with torch.no_grad(), adapters.off() if adapters else nullcontext():
                taught = policy_hidden(teacher, [prompt for *_, prompt in group], *texts)  # (N, H)
            hidden = policy_hidden(model, [student.prompt_ids for _, _, student, _ in group], *texts)  # (N, H)
            total += backward_in_chunks(model, loss, hidden, taught)
    return {"loss": over_ranks(total), "grad_norm": update(optimizer, config.max_grad_norm)}


def ofsd_stage(run: Run, stage: str) -> dict:
    """Returns the teacher's edge, for the table."""
    config = run.config
    began = time.time()
    questions = run.rng.sample(run.train_set, min(config.ofsd_questions or len(run.train_set), len(run.train_set)))
    pool = run.sample(questions, group_size=config.group_size, progress="pool")
    pairs, counts = mine(run, questions, pool)
    edge = teacher_edge(run, pairs) if pairs else {"edge": None, "edge_supported": None}
    skipped = not pairs or (edge["edge_supported"] <= 0 and not config.force_ofsd)
    run.log("mining", stage, **counts, **edge, skipped=skipped, mining_s=time.time() - began)
    for question, reference, student, _ in pairs:
        run.append("trajectories.jsonl", {
            "kind": "pair", "stage": stage, "id": question["id"],
            "reference": run.as_json(reference), "student": run.as_json(student),
        })  # fmt: skip
    print(f"\n{stage}: {counts['pairs']} pairs of {len(questions)} questions ({counts['no_correct']} without a correct "
          f"trajectory, {counts['no_contrast']} without contrast, {counts['too_long']} too long)")  # fmt: skip
    if not pairs:
        print("no pair to learn from: this stage is skipped")
        return edge
    print(f"teacher's edge {edge['edge']:+.3f} EM, supported {edge['edge_supported']:+.3f}")
    if skipped:
        print("the teacher has no supported edge over the student: this stage is skipped (--force-ofsd runs it)")
        return edge
    adapters, trained = trainable(run.model, config.lora_rank)
    teacher = run.model if adapters else frozen_copy(run.model)
    optimizer = torch.optim.AdamW(trained, lr=config.ofsd_lr, weight_decay=0.0)
    batches = []
    for _ in range(config.ofsd_epochs):
        shuffled = run.rng.sample(pairs, len(pairs))
        batches += [shuffled[i : i + config.ofsd_batch] for i in range(0, len(pairs), config.ofsd_batch)]
    print(" step        loss   grad_norm")
    for step, batch in enumerate(tqdm(batches, desc="distillation", disable=None, leave=False), start=1):
        stats = ofsd_step(run.model, teacher, optimizer, batch, config, adapters)
        run.log("step", stage, step=step, **stats)
        tqdm.write(f"{step:5d} {stats['loss']:11.4g} {stats['grad_norm']:11.4g}")
    if adapters:
        adapters.merge()
    return edge


# ---------------------------------------------------------------- the loop


def train(config: Config) -> Path:
    """The whole of Search-E1; returns the run's folder."""
    run = Run(config)
    run.evaluate("base")
    for number in range(1, config.rounds + 1):
        grpo_stage(run, number)
        run.evaluate(f"grpo-{number}")
        edge = ofsd_stage(run, f"ofsd-{number}")
        run.evaluate(f"ofsd-{number}", **edge)
    if run.rank == 0:
        report(run)
    return run.folder


def report(run: Run) -> None:
    """The table, and one question before and after."""
    kinds = sorted({kind for row in run.evaluations for kind in row["em_by"]})
    print(f"\n{len(run.test_set)} test questions, greedy; edge: the teacher's, sampled, before the stage")
    print(f"{'stage':8}{'EM':>8}{'F1':>8}" + "".join(f"{'EM ' + kind:>{len(kind) + 5}}" for kind in kinds)
          + f"{'searches':>10}{'answered':>10}{'edge':>8}{'supported':>11}{'minutes':>9}")  # fmt: skip
    for row in run.evaluations:
        edges = [f"{row[name]:+.3f}" if row.get(name) is not None else "" for name in ("edge", "edge_supported")]
        print(f"{row['stage']:8}{row['em']:8.3f}{row['f1']:8.3f}"
              + "".join(f"{row['em_by'].get(kind, float('nan')):{len(kind) + 5}.3f}" for kind in kinds)
              + f"{row['searches']:10.2f}{row['answered']:10.3f}{edges[0]:>8}{edges[1]:>11}{row['time_s'] / 60:9.1f}")  # fmt: skip
    rows = [json.loads(line) for line in open(run.folder / "trajectories.jsonl", encoding="utf-8")]
    first, last = run.evaluations[0]["stage"], run.evaluations[-1]["stage"]
    before, after = ([r for r in rows if r["kind"] == "eval" and r["stage"] == stage] for stage in (first, last))
    # The longest road to a right answer among those that went wrong before, if there is one.
    chosen = max(range(len(after)), key=lambda i: (after[i]["em"] - before[i]["em"], len(after[i]["queries"])))
    for title, row in (("before", before[chosen]), ("after", after[chosen])):
        print(f"\n{title}: {row['question']}  (answer: {' / '.join(row['golden_answers'])})")
        print("".join(text for _, text in row["text"]).strip())
    print(f"\nmetrics, trajectories and the model are in {run.folder}")


def parse_config() -> Config:
    parser = Parser(description="Search-E1: GRPO and offline self-distillation in turn.")
    for item in fields(Config):
        flag = "--" + item.name.replace("_", "-")
        text = f"{item.metadata['help']} (default: {item.default!r})".replace("%", "%%")
        if item.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=item.type, default=item.default, help=text)
    return Config(**vars(parser.parse_args()))


def main() -> None:
    config = parse_config()
    if "LOCAL_RANK" not in os.environ:
        train(config)
        return
    # One of torchrun's processes: rank 0 speaks and writes.
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    train(config)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
