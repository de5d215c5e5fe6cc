"""Search-E1: GRPO and offline self-distillation in turn, until the policy searches well.

    for each round:
        GRPO   rollouts, exact-match rewards, one clipped policy update a batch        (grpo.py)
        OFSD   re-sample, mine (reference, student) pairs, measure the teacher's edge,
               pull the student towards the teacher                                    (ofsd.py)

    python train.py                               # two rounds on the micro world; minutes on 2 cores
    python train.py --seed 1 --out runs/seed1     # every field of Config is a flag
    python train.py --resume runs/seed1           # goes on where it stood, to the same weights, bit for bit
    torchrun --standalone --nproc-per-node 2 train.py   # a process a device; the gradient is that of one

It writes to runs/NAME: config.json; metrics.jsonl, a line a step, a mining and an evaluation
(kind says which); trajectories.jsonl, every evaluation's answers and every mined pair; model/,
which transformers loads; and checkpoints/, the last two, each one file that is there as a whole
or not at all. Ctrl-C finishes the step, saves, and says how to go on; a second one does not wait.

What a step's line says: reward; zero_var, the share of groups with equal rewards (they teach
nothing); kl to the start policy (k3); clip_frac; entropy; grad_norm; length of a response in
tokens; searches; no_answer and repeats, shares of trajectories (repeats: asks a query twice);
logprob_gap, the largest difference between the rollout's log-probability of a token and the
training pass's before any update: a bug in mask, cache or temperature shows here first;
no_update, true where the gradient was not finite and nothing was changed.

Deviations from the paper
    1. Sizes and learning rates are those of a model of a million parameters on two cores; the
       README has the paper's.
    2. Before a stage of distillation the teacher's edge is measured on fresh samples, and a
       stage without a positive supported edge is skipped (--force-ofsd runs it): a teacher
       that is no better, or that only copies the reference's answer, does harm.
    3. GRPO's learning rate falls over the run (the paper states no schedule): at a constant one the
       teacher's supported edge before the second distillation was -.08 to +.07 on validation.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import set_seed

from eval import load_mixture, load_questions, report, rewards_of, score
from grpo import batch_stats, frozen_copy, grpo_step, knows_output_layer, rank_and_ranks, same_on_all_ranks
from ofsd import Adapters, mine_pairs, ofsd_step, token_divergences
from retriever import BadInput, Parser, RemoteRetriever, SearchFailed, checksum, open_index, run_script
from rollout import Trajectory, decode, load_model, rollout, save_model, spans


def setting(default, help: str, **limits):
    """limits: zero=True where a number may be 0, choices where only these words are meant."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class Config:
    model: str = setting("micro/model", "where the policy starts: a model folder or hub name")
    questions: str = setting("micro/train.jsonl", "training questions: JSON lines or hub/dataset:config:split; or several, with commas")
    eval_questions: str = setting("micro/test.jsonl", "questions of the final table")
    corpus: str = setting("micro/corpus.jsonl", "passages to search: JSON lines; CORPUS.bm25 is their saved index, if it is newer")
    retriever_url: str = setting("", "a server that speaks Search-R1's protocol, in place of a corpus")
    on_search_failure: str = setting("stop", "where the server fails, asked again: stop, or nothing (the searches find nothing)", choices=("stop", "nothing"))
    out: str = setting("", "folder of this run; must not exist (default: runs/ and the date)")
    seed: int = setting(0, "seed of Python, numpy, torch and sampling", zero=True)
    rounds: int = setting(2, "rounds of GRPO and then OFSD", zero=True)
    # the search environment
    max_searches: int = setting(4, "searches a question", zero=True)
    k: int = setting(3, "passages a search")
    max_tokens: int = setting(2048, "tokens of a response, observations included")
    max_turn_tokens: int = setting(256, "tokens of a turn")
    max_observation_tokens: int = setting(512, "tokens of an observation")
    prompt: str = setting("", "wording of the prompt, with {question} in it (default: the tokenizer's, or PROMPT)")
    # GRPO
    grpo_steps: int = setting(20, "steps a round", zero=True)
    questions_per_step: int = setting(16, "groups a step")
    group_size: int = setting(5, "G, trajectories a question; also K, OFSD's")
    grpo_lr: float = setting(1.5e-4, "learning rate of AdamW at the start; it falls linearly, to 0 at the last round's end")
    updates: int = setting(1, "updates on each batch of rollouts")
    clip_eps: float = setting(0.2, "epsilon of the clipped ratio")
    kl_coef: float = setting(0.0, "beta, the weight of the k3 penalty to the start policy", zero=True)
    # OFSD
    ofsd_questions: int = setting(360, "training questions re-sampled before distillation (0: all)", zero=True)
    ofsd_epochs: int = setting(2, "passes over the mined pairs", zero=True)
    ofsd_batch: int = setting(16, "pairs an update")
    ofsd_lr: float = setting(2e-4, "learning rate of AdamW")
    divergence: str = setting("forward_kl", "forward_kl, reverse_kl or jsd", choices=("forward_kl", "reverse_kl", "jsd"))
    clip: str = setting("none", "none, entry (the paper's) or position", choices=("none", "entry", "position"))
    tau: float = setting(0.05, "cap of the clip, in nats")
    max_privileged_tokens: int = setting(224, "tokens of the privileged prompt; passages of the reference are cut to fit")
    lora_rank: int = setting(0, "distil into adapters of this rank, then merge them, as the paper does (0: all weights)", zero=True)
    grpo_lora_rank: int = setting(0, "the same in a GRPO stage, for a card too small for all weights", zero=True)
    force_ofsd: bool = setting(False, "distil even where the teacher has no supported edge")
    # hardware and evaluation
    micro_batch: int = setting(20, "sequences a forward pass in training")
    gradient_checkpointing: bool = setting(False, "keep only each layer's input for the backward pass: less memory, a third more time")
    rollout_batch: int = setting(256, "trajectories in flight while sampling")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    save_every: int = setting(10, "steps between two checkpoints in a stage")
    eval_limit: int = setting(0, "evaluate on the first so many questions only (0: all)", zero=True)

    def __post_init__(self):
        if self.prompt and "{question}" not in self.prompt:
            raise BadInput("prompt must hold {question}, where the question goes")
        for item in fields(self):
            value, choices, zero = getattr(self, item.name), item.metadata.get("choices"), "zero" in item.metadata
            if choices and value not in choices:
                raise BadInput(f"{item.name} is one of {', '.join(choices)}, not {value!r}")
            if item.type in (int, float) and not (value > 0 or (value == 0 and zero)):
                raise BadInput(f"{item.name} must be {'at least 0' if zero else 'above 0'}, not {value}")


HEAT = 20  # pairs of a stage whose divergence is written down token by token
BAD_UPDATES = 3  # without a finite gradient, one after the other, end a run


class Run:
    """What both stages need at hand: the policy and its tools, and the files of the run."""

    def __init__(self, config: Config, resume: bool = False):
        # Everything that can be wrong with the input is found before the folder is made.
        self.config = config
        self.rank, self.ranks = rank_and_ranks()
        self.folder = Path(config.out or time.strftime("runs/%Y%m%d-%H%M%S-seed") + str(config.seed))
        if self.folder.exists() and self.rank == 0 and not resume:
            raise BadInput(f"{self.folder} exists already: choose another --out, or remove it")
        test_set = load_questions(config.eval_questions)
        self.train_set = load_mixture(config.questions, test_set)
        self.test_set = test_set[: config.eval_limit or None]
        self.retriever = RemoteRetriever(config.retriever_url, on_failure=config.on_search_failure) if config.retriever_url else open_index(config.corpus)
        self.retriever.search([self.train_set[0]["question"]], config.k)  # is the server there?
        self.model, self.tokenizer = load_model(config.model)
        if not knows_output_layer(self.model):
            raise BadInput(f"{config.model}: its logits are more than a product with the last hidden state, which training here cannot do")
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
        self.fingerprint = zlib.crc32(repr((self.train_set, self.test_set)).encode(errors="replace"))
        for parameter in self.model.parameters():
            self.fingerprint = zlib.crc32(parameter.detach().cpu().numpy(), self.fingerprint)
        self.saved: dict = {}  # the checkpoint to go on from, until its stage has begun; then only the stage's name
        self.bad_updates, self.unsaved, self.stopping = 0, False, 0
        if resume:
            self.restore()
        elif self.rank == 0:
            try:
                self.folder.mkdir(parents=True)
            except OSError as error:
                raise BadInput(f"cannot make the run's folder: {error}") from None
            (self.folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")

    def log(self, kind: str, stage: str, **metrics) -> None:
        row = {"kind": kind, "stage": stage, **metrics, "time_s": time.time() - self.began}
        finite = {name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in row.items()}
        self.append("metrics.jsonl", finite)

    def gather(self, value) -> list:
        """Every rank's value."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def append(self, name: str, row: dict) -> None:
        if self.rank:
            return
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def sample(self, questions: list[dict], *, prompts: list | None = None, group_size: int = 1, **how) -> list[Trajectory]:
        """rollout() by this run's settings. Every rank samples its share and gets the whole."""
        share = slice(self.rank, None, self.ranks)
        names = "max_searches", "k", "max_tokens", "max_turn_tokens", "max_observation_tokens"
        budgets = {name: getattr(self.config, name) for name in names}
        trajectories = rollout(
            self.model, self.tokenizer, self.retriever, [q["question"] for q in questions[share]], group_size=group_size,
            prompts=prompts and prompts[share], batch_size=self.config.rollout_batch, **budgets, **how,
        )  # fmt: skip
        parts = self.gather(trajectories)
        groups = [(i % self.ranks, i // self.ranks * group_size) for i in range(len(questions))]
        return [t for rank, first in groups for t in parts[rank][first : first + group_size]]

    def evaluate(self, stage: str, **edge) -> None:
        """Test the policy greedily; log it with every answer; save the model."""
        trajectories = self.sample(self.test_set, temperature=0.0, progress=f"test {stage}")
        metrics = score(self.test_set, trajectories) | edge
        self.log("eval", stage, **metrics)
        self.evaluations.append({"stage": stage, **metrics, "time_s": time.time() - self.began})
        for question, trajectory, em in zip(self.test_set, trajectories, rewards_of(self.test_set, trajectories)):
            self.append("trajectories.jsonl", {"kind": "eval", "stage": stage, "id": question["id"], "em": em}
                        | self.as_json(trajectory) | {"golden_answers": question["golden_answers"]})  # fmt: skip
        if self.rank == 0:
            save_model(self.model, self.tokenizer, self.folder / "model")
        print(f"test, {stage}: EM {metrics['em']:.3f}, {metrics['searches']:.2f} searches, "
              f"{metrics['answered']:.3f} answered, {(time.time() - self.began) / 60:.1f} min")  # fmt: skip

    def as_json(self, trajectory: Trajectory) -> dict:
        """text: [[who, text], ...], who is 1 for the policy and 0 for the environment."""
        text = [[int(sampled), decode(self.tokenizer, ids)] for sampled, ids in spans(trajectory)]
        names = "question", "answer", "queries", "finish_reason"
        return {name: getattr(trajectory, name) for name in names} | {"text": text}

    def checkpoint(self, stage: str, step: int, **more) -> None:
        """Save that so many steps of a stage are done; more: what this stage wants back. Nothing draws
        from numpy's or Python's global random states, so they are not in it."""
        state = {
            "stage": stage, "step": step, **more, "fingerprint": self.fingerprint, "model": self.model.state_dict(),
            "rng": self.rng.getstate(), "torch": self.gather(random_states()), "bad_updates": self.bad_updates,
            "evaluations": self.evaluations, "time_s": time.time() - self.began,
            "sizes": {path.name: path.stat().st_size for path in self.folder.glob("*.jsonl")},
        }  # fmt: skip
        if self.rank == 0:
            save_checkpoint(self.folder / "checkpoints", state)
        self.saved, self.unsaved = {"stage": stage}, False

    def restore(self) -> None:
        """Policy, random states, and the logs as long as they were at the last whole checkpoint."""
        saved = self.saved = load_checkpoint(self.folder / "checkpoints")
        if saved is None:
            raise BadInput(f"{self.folder} holds no whole checkpoint to resume from")
        if saved["fingerprint"] != self.fingerprint or len(saved["torch"]) != self.ranks:
            raise BadInput(f"{self.folder}: the model, the questions or the number of processes is another than when it began")
        self.evaluations, self.bad_updates = saved["evaluations"], saved["bad_updates"]
        self.began -= saved["time_s"]
        self.model.load_state_dict(saved["model"])
        self.rng.setstate(saved["rng"])
        set_random_states(saved["torch"][self.rank])
        for path in self.folder.glob("*.jsonl") if self.rank == 0 else ():
            os.truncate(path, saved["sizes"].get(path.name, 0))

    def restore_stage(self, optimizer, teacher=None) -> dict:
        """What this stage saved after a step, once all is put back; {} where the stage begins."""
        saved, self.saved = self.saved, {}
        if not saved.get("step"):
            return {}
        optimizer.load_state_dict(saved["optimizer"])
        for parameter, value in zip(optimizer.param_groups[0]["params"], saved.get("adapters", [])):
            parameter.data.copy_(value)
        if "teacher" in saved:
            teacher.load_state_dict(saved["teacher"])
        set_random_states(saved["torch"][self.rank])  # adapters have drawn from it
        return saved

    def stop(self, number: int, _frame=None) -> None:
        """A signal's handler."""
        if self.stopping or not self.unsaved:
            raise Stopped(number)
        self.stopping = number
        print("finishing this step, then saving (once more: stop at once)", file=sys.stderr)

    def end_step(self, stage: str, step: int, steps: int, stats: dict, **saved) -> None:
        """Log a step; save it where that is due, it is the last, or a signal came."""
        no_update = not math.isfinite(stats["grad_norm"])
        self.bad_updates = self.bad_updates + 1 if no_update else 0
        self.log("step", stage, step=step, **stats, no_update=no_update)
        if self.bad_updates == BAD_UPDATES:
            raise BadInput(f"{stage}, step {step}: the {BAD_UPDATES} last updates had no finite gradient and were skipped. "
                           f"The checkpoint before them is whole; a lower learning rate may help")  # fmt: skip
        stopping = max(self.gather(self.stopping))  # a signal reaches the ranks at different times
        if stopping or step == steps or step % self.config.save_every == 0:
            self.checkpoint(stage, step, **saved)
        if stopping:
            raise Stopped(stopping)


class Stopped(Exception):
    """By a signal, whose number it carries."""


def random_states() -> list[torch.Tensor]:
    """torch's, of the CPU and of every GPU."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states[1:])


def save_checkpoint(folder: Path, state: dict) -> None:
    """One file, NUMBER-CHECKSUM.pt: flushed and then renamed, so it is there as a whole or not at
    all. The last two are kept. Raises OSError where it cannot be written."""
    folder.mkdir(exist_ok=True)
    old, new = sorted(folder.glob("*.pt")), folder / "new"
    try:
        with open(new, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        number = int(old[-1].name[:6]) + 1 if old else 1
        os.replace(new, folder / f"{number:06d}-{checksum(new):08x}.pt")
    except (OSError, RuntimeError) as error:  # torch's own complaint hides what the file said
        new.unlink(missing_ok=True)
        raise OSError(f"cannot write a checkpoint to {folder}: {error.__context__ or error}") from None
    for path in old[:-1]:
        path.unlink()


def load_checkpoint(folder: Path) -> dict | None:
    """The last one that is whole; one that is not is put aside, and said so. weights_only: a
    file of someone else's can hold numbers and text, but no code."""
    for path in sorted(folder.glob("*.pt"), reverse=True):
        try:
            if path.stem.endswith(f"{checksum(path):08x}"):
                return torch.load(path, map_location="cpu", weights_only=True)
            error = "it is cut off or changed"
        except Exception as caught:  # whatever a file that is no checkpoint makes torch raise
            error = " ".join(str(caught).split())[:200]
        print(f"{path} is left out: {error}", file=sys.stderr)
        if path.exists():  # of several processes the first does it
            path.replace(path.with_suffix(".damaged"))
    return None


def training_state(optimizer, adapters: Adapters | None, teacher=None) -> dict:
    """What a checkpoint inside a stage holds beside the policy."""
    state = {"optimizer": optimizer.state_dict()}
    if adapters:
        return state | {"adapters": [parameter.data for parameter in adapters.parameters()]}
    return state | {"teacher": teacher.state_dict()} if teacher else state


def trainable(model, lora_rank: int) -> tuple[Adapters | None, list]:
    """Adapters, if a rank is given, and the parameters that a stage trains."""
    adapters = Adapters(model, lora_rank) if lora_rank else None
    parameters = list((adapters or model).parameters())
    same_on_all_ranks(parameters)  # adapters begin with random numbers
    return adapters, parameters


# ---------------------------------------------------------------- GRPO


COLUMNS = "reward zero_var kl clip_frac entropy grad_norm length searches no_answer repeats logprob_gap".split()


def grpo_stage(run: Run, stage: str, number: int) -> None:
    """Stage grpo-<number>; number counts the rounds from 1."""
    config = run.config
    adapters, trained = trainable(run.model, config.grpo_lora_rank)
    optimizer = torch.optim.AdamW(trained, lr=config.grpo_lr, weight_decay=0.0)
    print(f"\n{stage}: {config.grpo_steps} steps\n step " + " ".join(f"{name:>8}" for name in COLUMNS) + "  seconds")
    saved = run.restore_stage(optimizer)
    waiting: list[int] = saved.get("waiting", [])  # each pass over the questions is a fresh shuffle
    for step in range(saved.get("step", 0) + 1, config.grpo_steps + 1):
        run.unsaved, began = True, time.time()
        done = (number - 1) * config.grpo_steps + step - 1
        optimizer.param_groups[0]["lr"] = config.grpo_lr * (1 - done / (config.rounds * config.grpo_steps))
        while len(waiting) < config.questions_per_step:
            waiting += run.rng.sample(range(len(run.train_set)), len(run.train_set))
        questions = [run.train_set[i] for i in waiting[: config.questions_per_step]]
        waiting = waiting[config.questions_per_step :]
        trajectories = run.sample(questions, group_size=config.group_size, progress="rollout")
        rewards = torch.tensor(rewards_of(questions, trajectories)).view(-1, config.group_size)  # (Q, G)
        sampled_s = time.time() - began
        stats = grpo_step(run.model, run.start, optimizer, trajectories, rewards, config)
        stats |= batch_stats(trajectories, rewards) | {"rollout_s": sampled_s, "step_s": time.time() - began}
        values = " ".join(f"{stats[name]:{max(8, len(name))}.3g}" for name in COLUMNS)
        print(f"{step:5d} {values} {time.time() - began:8.1f}")
        run.end_step(stage, step, config.grpo_steps, stats, waiting=waiting, **training_state(optimizer, adapters))
    if adapters:
        adapters.merge()


# ---------------------------------------------------------------- OFSD


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


def mine_stage(run: Run, stage: str) -> tuple[list[tuple], dict]:
    """The pairs to distil, none where the stage is to be skipped, and the teacher's edge."""
    config = run.config
    began = time.time()
    questions = run.rng.sample(run.train_set, min(config.ofsd_questions or len(run.train_set), len(run.train_set)))
    pool = run.sample(questions, group_size=config.group_size, progress="pool")
    rewards = rewards_of(questions, pool)
    pairs, counts = mine_pairs(run.model, run.tokenizer, questions, pool, rewards, config.max_privileged_tokens)
    edge = teacher_edge(run, pairs) if pairs else {"edge": None, "edge_supported": None}
    skipped = not pairs or (edge["edge_supported"] <= 0 and not config.force_ofsd)
    run.log("mining", stage, **counts, **edge, skipped=skipped, mining_s=time.time() - began)
    groups = {id(question): rewards[i * config.group_size : (i + 1) * config.group_size] for i, question in enumerate(questions)}
    for number, (question, reference, student, prompt) in enumerate(pairs):
        heat = token_divergences(run.model, student, prompt) if number < HEAT else []
        run.append("trajectories.jsonl", {
            "kind": "pair", "stage": stage, "id": question["id"], "rewards": groups[id(question)],
            "reference": run.as_json(reference), "student": run.as_json(student),
            "divergence": [[decode(run.tokenizer, [token]), value and round(value, 4)] for token, value in heat],
        })  # fmt: skip
    print(f"\n{stage}: {counts['pairs']} pairs of {len(questions)} questions ({counts['no_correct']} without a correct "
          f"trajectory, {counts['no_contrast']} without contrast, {counts['too_long']} too long)")  # fmt: skip
    if not pairs:
        print("no pair to learn from: this stage is skipped")
        return [], edge
    print(f"teacher's edge {edge['edge']:+.3f} EM, supported {edge['edge_supported']:+.3f}")
    if skipped:
        print("the teacher has no supported edge over the student: this stage is skipped (--force-ofsd runs it)")
        return [], edge
    return pairs, edge


def ofsd_stage(run: Run, stage: str) -> dict:
    """Returns the teacher's edge, for the table."""
    config = run.config
    mined = {name: run.saved[name] for name in ("pairs", "batches", "edge") if name in run.saved}
    if not mined:
        pairs, edge = mine_stage(run, stage)
        shuffled = [run.rng.sample(range(len(pairs)), len(pairs)) for _ in range(config.ofsd_epochs)]
        batches = [order[i : i + config.ofsd_batch] for order in shuffled for i in range(0, len(order), config.ofsd_batch)]
        ids = [(student.prompt_ids, student.response_ids, student.loss_mask, prompt) for _, _, student, prompt in pairs]
        mined = dict(pairs=ids, batches=batches, edge=edge)
        run.checkpoint(stage, 0, **mined)
    pairs = [(Trajectory("", *ids), prompt) for *ids, prompt in mined["pairs"]]
    batches = mined["batches"]
    if not batches:
        return mined["edge"]
    adapters, trained = trainable(run.model, config.lora_rank)
    teacher = run.model if adapters else frozen_copy(run.model)
    optimizer = torch.optim.AdamW(trained, lr=config.ofsd_lr, weight_decay=0.0)
    first = run.restore_stage(optimizer, teacher).get("step", 0)
    print(" step        loss   grad_norm")
    for step in tqdm(range(first + 1, len(batches) + 1), desc="distillation", disable=None, leave=False):
        run.unsaved = True
        stats = ofsd_step(run.model, teacher, optimizer, [pairs[i] for i in batches[step - 1]], config, adapters)
        tqdm.write(f"{step:5d} {stats['loss']:11.4g} {stats['grad_norm']:11.4g}")
        run.end_step(stage, step, len(batches), stats, **mined, **training_state(optimizer, adapters, teacher))
    if adapters:
        adapters.merge()
    return mined["edge"]


# ---------------------------------------------------------------- the loop


def train(config: Config) -> Path:
    """The whole of Search-E1; returns the run's folder."""
    return loop(Run(config))


def loop(run: Run) -> Path:
    """From where the run stands to its end."""
    stages = ["base", *(f"{kind}-{n}" for n in range(1, run.config.rounds + 1) for kind in ("grpo", "ofsd")), "end"]
    try:
        if not run.saved:
            run.checkpoint("base", 0)
        for stage, following in pairwise(stages[stages.index(run.saved["stage"]) :]):
            kind, _, number = stage.partition("-")
            if kind == "grpo":
                grpo_stage(run, stage, int(number))
            edge = ofsd_stage(run, stage) if kind == "ofsd" else {}
            run.evaluate(stage, **edge)
            run.checkpoint(following, 0)
    except (OSError, SearchFailed) as error:  # a full disk, say
        raise BadInput(f"{error}. The last checkpoint is whole: train.py --resume {run.folder} goes on from there") from None
    if run.rank == 0:
        report(run.folder, run.evaluations)
    return run.folder


def parse_config() -> tuple[Config, bool]:
    """The settings, and whether they are those of a run that goes on."""
    parser = Parser(description="Search-E1: GRPO and offline self-distillation in turn.")
    for item in fields(Config):
        flag = "--" + item.name.replace("_", "-")
        text = f"{item.metadata['help']} (default: {item.default!r})".replace("%", "%%")
        if item.type is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=item.type, default=argparse.SUPPRESS, help=text)
    parser.add_argument("--resume", metavar="FOLDER", default=argparse.SUPPRESS, help="go on with this run, by its own settings")
    given = vars(parser.parse_args())
    folder = given.pop("resume", None)
    if folder is None:
        return Config(**given), False
    try:
        config = replace(Config(**json.loads((Path(folder) / "config.json").read_text())), out=folder)
    except (OSError, TypeError, ValueError) as error:
        raise BadInput(f"{folder} holds no run to resume ({error})") from None
    for name, value in given.items():
        if value != getattr(config, name):
            raise BadInput(f"--{name.replace('_', '-')} {value}: the run has {getattr(config, name)!r}, and is resumed as it is")
    return config, True


def main() -> None:
    config, resume = parse_config()
    if "LOCAL_RANK" in os.environ:  # one of torchrun's processes: rank 0 speaks and writes
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    run = Run(config, resume)
    signal.signal(signal.SIGINT, run.stop)
    signal.signal(signal.SIGTERM, run.stop)
    try:
        loop(run)
    except Stopped as stopped:
        print(f"stopped: train.py --resume {run.folder} goes on from here", file=sys.stderr)
        sys.exit(128 + stopped.args[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
