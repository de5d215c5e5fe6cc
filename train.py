"""Search-E1: GRPO and offline self-distillation in turn, until the policy searches well.

    for each round:
        GRPO   sample trajectories, reward exact answers, one clipped update a batch   (grpo.py)
        OFSD   sample again, mine pairs of a good and a worse trajectory, and pull the policy
               towards what it says itself when its prompt shows the good one          (ofsd.py)

    python train.py                                # two rounds on micro/; minutes on two cores
    python train.py --no-ofsd --out runs/grpo      # GRPO alone; every field of Config is a flag
    python train.py --config configs/paper.json    # settings from a file; flags win over it
    python train.py --resume runs/grpo             # goes on as if it had never stopped, bit for bit
    torchrun --standalone --nproc-per-node 2 train.py    # a process for each device

Read train() and its two stages; the rest is machinery. A run writes to runs/NAME: config.json;
metrics.jsonl; trajectories.jsonl, with tested answers and mined pairs; model/, which transformers
loads; and checkpoints/. If it is killed it loses only what came after the last checkpoint.

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. Sizes, learning rates and --clip are for a million parameters. configs/ has others.
    2. Before OFSD the teacher's edge is measured: its exact match (EM) minus the student's. Unless
       it is above 0 in answers that a retrieved passage supports, the stage is skipped.
    3. GRPO's learning rate falls. At a constant one the edge was gone before the second OFSD.
"""

import json
import math
import os
import random
import signal
import sys
import time
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, it would keep the group that main() has to end

from eval import batch_stats, exact_match, load_mixture, load_questions, report, rewards_of, score
from grpo import check_training, frozen_copy, gather, grpo_step, rank_and_ranks
from ofsd import Pair, merge_adapters, mine_pairs, ofsd_step, privileged_prompt, spans
from ofsd import token_divergences, trainable
from retriever import BadInput, Parser, Passage, RemoteRetriever, open_index, run_script
from rollout import Trajectory, chat_ids, decode, load_model, rollout, save_model
from rollout import standard_prompt

def setting(default, help: str, **limits):
    """limits: zero=True where a number may be 0; choices, where only these words are meant."""
    return field(default=default, metadata={"help": help, **limits})

@dataclass
class Config:
    """Every field is a flag, and a key in a --config file."""

    model: str = setting("micro/model", "where the policy starts: a model folder or hub name")
    questions: str = setting("micro/train.jsonl", "JSON lines, or hub/dataset:config:split, or A,B")
    eval_questions: str = setting("micro/test.jsonl", "questions of the final table")
    corpus: str = setting("micro/corpus.jsonl", "passages; CORPUS.bm25 may be their saved index")
    retriever_url: str = setting("", "a server with Search-R1's protocol, in place of a corpus")
    out: str = setting("", "folder of this run, a new one (default: runs/ and the date)")
    seed: int = setting(0, "seed of everything random", zero=True)
    rounds: int = setting(2, "rounds of GRPO and then OFSD", zero=True)
    ofsd: bool = setting(True, "the OFSD stages; without them GRPO alone")
    # the search environment
    max_searches: int = setting(4, "searches a trajectory", zero=True)
    k: int = setting(3, "passages a search")
    max_tokens: int = setting(2048, "tokens of a response, observations included")
    max_turn_tokens: int = setting(256, "tokens of a turn")
    max_observation_tokens: int = setting(512, "tokens of an observation")
    prompt: str = setting("", "wording of the prompt, with {question} in it")
    date: str = setting("", "what a chat template is told, as 2026-01-31 (default: today)")
    # GRPO
    grpo_steps: int = setting(12, "steps a round", zero=True)
    questions_per_step: int = setting(16, "groups a step")
    group_size: int = setting(5, "trajectories a question: G, and K in OFSD")
    grpo_lr: float = setting(3e-4, "learning rate of GRPO, which falls linearly to 0")
    updates: int = setting(1, "updates on each batch of trajectories")
    clip_eps: float = setting(0.2, "epsilon of the clipped ratio")
    kl_coef: float = setting(0.0, "beta, the weight of the k3 penalty", zero=True)
    # OFSD
    ofsd_questions: int = setting(200, "questions sampled for a stage (0: all)", zero=True)
    ofsd_epochs: int = setting(2, "passes over the mined pairs", zero=True)
    ofsd_batch: int = setting(16, "pairs an update")
    ofsd_lr: float = setting(5e-4, "learning rate of OFSD")
    divergence: str = setting("forward_kl", "loss", choices=("forward_kl", "reverse_kl", "jsd"))
    clip: str = setting("none", "of the loss; paper: entry", choices=("none", "entry", "position"))
    tau: float = setting(0.05, "cap of that clip, in nats")
    max_privileged_tokens: int = setting(224, "tokens of the privileged prompt, cut to fit")
    lora_rank: int = setting(0, "OFSD trains adapters of this rank (0: all weights)", zero=True)
    grpo_lora_rank: int = setting(0, "GRPO trains adapters of this rank (0: all)", zero=True)
    force_ofsd: bool = setting(False, "distil even where the teacher has no supported edge")
    # hardware and evaluation
    micro_batch: int = setting(20, "sequences a forward pass in training")
    gradient_checkpointing: bool = setting(False, "less memory, a third more time")
    rollout_batch: int = setting(256, "trajectories in flight while sampling")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    save_every: int = setting(10, "steps between two checkpoints")
    eval_limit: int = setting(0, "evaluate on so many questions only (0: all)", zero=True)

    def __post_init__(self):
        for item in fields(self):
            value, limits, kind = getattr(self, item.name), item.metadata, item.type.__name__
            span = ("at least" if "zero" in limits else "above") + " 0 and below 2**32"
            wanted = limits.get("choices", span if item.type in (int, float) else "any")
            good = type(value) is item.type or (item.type, type(value)) == (float, int)
            if good and item.type in (int, float):
                good = 0 < value < 2**32 or value == 0 and "zero" in limits
            if not good or value not in limits.get("choices", [value]):
                raise BadInput(f"{item.name} must be {kind}, {wanted}, not {value!r}")
        if self.prompt and "{question}" not in self.prompt:
            raise BadInput("prompt must hold {question}, where the question goes")

def train(config: Config, resume: bool = False) -> Path:
    """All of Search-E1: two stages in turn, with a test after each. Returns the run's folder."""
    run = Run(config, resume)
    done = [row["stage"] for row in run.evaluations]
    try:
        if "base" not in done:
            print(f"{run.folder}: {len(run.test_set)} questions test what {config.model} can do")
            run.test("base")
        for number in range(1, config.rounds + 1):
            if f"grpo-{number}" not in done:
                grpo_stage(run, number)
                run.test(f"grpo-{number}")
            if f"ofsd-{number}" not in done and config.ofsd:
                edge = ofsd_stage(run, number)
                run.test(f"ofsd-{number}", **edge)
    except (BadInput, OSError, KeyboardInterrupt) as error:  # no server, no room, Ctrl-C
        error.add_note(f"train.py --resume {run.folder} goes on from the last checkpoint")
        raise
    if run.rank == 0:
        report(run.folder, run.evaluations)
    return run.folder

COLUMNS = """reward zero_var kl clip_frac entropy grad_norm length searches no_answer repeats
logprob_gap""".split()

def grpo_stage(run: "Run", number: int) -> None:
    """config.grpo_steps updates of the policy, each on fresh trajectories."""
    config, stage = run.config, f"grpo-{number}"
    optimizer = trainable(run.model, config.grpo_lora_rank, config.grpo_lr)
    saved = run.resume_stage(stage, {"optimizer": optimizer})
    waiting = saved.get("waiting", [])  # questions whose turn comes, by number
    columns = " ".join(f"{name:>8}" for name in COLUMNS)
    print(f"\n{stage}: {config.grpo_steps} steps\n step {columns}  seconds")
    for step in range(saved.get("step", 0) + 1, config.grpo_steps + 1):
        # 1. A batch of questions. Each pass over all of them has an order of its own.
        began = time.time()
        while len(waiting) < config.questions_per_step:
            waiting += run.rng.sample(range(len(run.train_set)), len(run.train_set))
        questions = [run.train_set[i] for i in waiting[: config.questions_per_step]]
        waiting = waiting[config.questions_per_step :]

        # 2. A group of trajectories for each, and their rewards.
        trajectories = run.sample(questions, group_size=config.group_size, progress="rollout")
        rewards = torch.tensor(rewards_of(questions, trajectories)).view(-1, config.group_size)
        sampled_s = time.time() - began

        # 3. Updates. The learning rate falls to 0 over all rounds. Before the first update sampling
        #    and training must agree on log-probabilities: a gap in the column logprob_gap is a bug.
        past = ((number - 1) * config.grpo_steps + step - 1) / (config.rounds * config.grpo_steps)
        optimizer.param_groups[0]["lr"] = config.grpo_lr * (1 - past)
        updates = [grpo_step(run.model, run.ref_model, optimizer, trajectories, rewards, config)
                   for _ in range(config.updates)]  # fmt: skip
        stats = updates[-1] | {"logprob_gap": updates[0]["logprob_gap"]}
        stats["grad_norm"] = sum(one["grad_norm"] for one in updates) / config.updates

        # 4. Say how it went, and save it.
        stats |= batch_stats(trajectories, rewards)
        row = " ".join(f"{stats[name]:{max(8, len(name))}.3g}" for name in COLUMNS)
        print(f"{step:5d} {row} {time.time() - began:8.1f}")
        stats |= {"rollout_s": sampled_s, "step_s": time.time() - began}
        run.end_step(stage, step, stats, {"optimizer": optimizer}, waiting=waiting)
    merge_adapters(run.model)

def ofsd_stage(run: "Run", number: int) -> dict:
    """Mine pairs, and pull the student towards the teacher on them. Returns the teacher's edge."""
    config, stage = run.config, f"ofsd-{number}"
    # 1. Mine pairs, or none if the stage is skipped. In batches: a fresh order each epoch.
    mined = run.saved.get("mined")  # if the run was stopped in this stage
    if not mined:
        pairs, edge = mine_stage(run, stage)
        orders = [run.rng.sample(pairs, len(pairs)) for _ in range(config.ofsd_epochs)]
        size = config.ofsd_batch
        batches = [order[i : i + size] for order in orders for i in range(0, len(order), size)]
        mined = {"batches": batches, "edge": edge}
        run.checkpoint(stage, 0, mined=mined)
    if mined["batches"]:
        # 2. The teacher is the policy as it is now, and reads the prompt that shows the reference.
        #    Where adapters are trained it is the same model, with them off.
        optimizer = trainable(run.model, config.lora_rank, config.ofsd_lr)
        teacher = run.model if config.lora_rank else frozen_copy(run.model)
        objects = {"optimizer": optimizer, "teacher": teacher}
        saved = run.resume_stage(stage, objects)

        # 3. One update for each batch of pairs.
        print(" step        loss   grad_norm")
        for step in range(saved.get("step", 0), len(mined["batches"])):
            batch = mined["batches"][step]
            stats = ofsd_step(run.model, teacher, optimizer, batch, config)
            print(f"{step + 1:5d} {stats['loss']:11.4g} {stats['grad_norm']:11.4g}")
            run.end_step(stage, step + 1, stats, objects, mined=mined)
        merge_adapters(run.model)
    return mined["edge"]

def mine_stage(run: "Run", stage: str) -> tuple[list[Pair], dict]:
    """The pairs to distil, none where the stage is to be skipped, and the teacher's edge."""
    config, began = run.config, time.time()
    questions = run.rng.sample(run.train_set, len(run.train_set))[: config.ofsd_questions or None]
    pool = run.sample(questions, group_size=config.group_size, progress="pool")
    rewards, room = rewards_of(questions, pool), config.max_privileged_tokens
    pairs, counts = mine_pairs(run.model, run.tokenizer, questions, pool, rewards, room)
    counted = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"\n{stage}: {len(questions)} questions, {counted}")
    edge = teacher_edge(run, pairs) if pairs else {"edge": None, "edge_supported": None}
    if pairs:
        print("the teacher's " + ", ".join(f"{name} {gain:+.3f}" for name, gain in edge.items()))
    skipped = not pairs or not (config.force_ofsd or edge["edge_supported"] > 0)
    if skipped:
        print("skipped: no " + ("supported edge (--force-ofsd)" if pairs else "pair to learn from"))
    run.log("mining", stage, **counts, **edge, skipped=skipped, mining_s=time.time() - began)
    for number, pair in enumerate(pairs):  # to look at; the first twenty token by token
        values = token_divergences(run.model, pair) if number < 20 else []
        tokens = [decode(run.tokenizer, [token]) for token in pair.student.response_ids]
        told = {name: run.as_json(getattr(pair, name)) for name in ("reference", "student")}
        told |= {"rewards": pair.rewards, "divergence": [*zip(tokens, values)]}
        run.append("trajectories.jsonl", "pair", stage, id=pair.question["id"], **told)
    return ([] if skipped else pairs), edge

def teacher_edge(run: "Run", pairs: list[Pair]) -> dict:
    """EM of the teacher, who reads the pairs' prompts, minus EM of the student: by fresh samples,
    since the old ones chose the pairs. edge_supported: the same with supported EM. edge_control:
    with the next pair's reference (its own where that does not fit): does it matter whose it is?"""
    questions, room = [pair.question for pair in pairs], run.config.max_privileged_tokens
    prompts = {"student": None, "teacher": [pair.prompt for pair in pairs], "control": []}
    for pair, other in zip(pairs, pairs[1:] + pairs[:1]):
        shown = pair.question["question"], other.reference
        prompts["control"].append(privileged_prompt(run.tokenizer, *shown, room) or pair.prompt)
    sampled = [run.sample(questions, prompts=prompts[who], progress=who) for who in prompts]
    student, teacher, control = (score(questions, trajectories) for trajectories in sampled)
    edge = {"edge": teacher["em"] - student["em"], "edge_control": control["em"] - student["em"]}
    return edge | {"edge_supported": teacher["em_supported"] - student["em_supported"]}

# ---------------------------------------------------------------- machinery

class Run:
    """What both stages need at hand: the policy and its tools, and the files of the run."""

    def __init__(self, config: Config, resume: bool = False):
        # Everything that can be wrong with the input is found before the folder is made.
        config = replace(config, date=config.date or time.strftime("%Y-%m-%d"))
        self.config, self.began, url = config, time.time(), config.retriever_url
        self.rank, self.ranks = rank_and_ranks()
        self.folder = Path(config.out or time.strftime(f"runs/%Y%m%d-%H%M%S-seed{config.seed}"))
        if self.folder.exists() and self.rank == 0 and not resume:
            raise BadInput(f"{self.folder} exists already: choose another --out, or remove it")
        test_set = load_questions(config.eval_questions)
        self.train_set = load_mixture(config.questions, test_set)
        self.test_set = test_set[: config.eval_limit or None]
        self.retriever = RemoteRetriever(url) if url else open_index(config.corpus)
        self.retriever.search([self.train_set[0]["question"]], config.k)  # is the server there?
        self.model, self.tokenizer = load_model(config.model, config.date)
        try:
            if config.gradient_checkpointing:
                self.model.activation_checkpointing_enable()
            trainable(self.model, max(config.lora_rank, config.grpo_lora_rank), lr=0.0)
            check_training(self.model)
            merge_adapters(self.model)
        except Exception as error:  # families of models fail in ways of their own
            raise BadInput(f"{config.model} cannot be trained like this: {error}") from None
        if config.prompt:  # kept in the tokenizer's files, so that the trained model brings it
            self.tokenizer.init_kwargs["search_prompt"] = config.prompt
        self.ref_model = frozen_copy(self.model)  # pi_ref of GRPO's kl
        self.rng = random.Random(config.seed)  # gives all that is random, but adapters' fixed start
        self.evaluations, self.saved = [], {}  # saved: a checkpoint to go on from
        self.inputs = {  # what must be the same when the run is resumed
            "the settings": asdict(replace(config, out="")),
            "the questions": sha256(repr((self.train_set, test_set)).encode()).hexdigest(),
            "the corpus": getattr(self.retriever, "source", url),
            "the prompt": chat_ids(self.tokenizer, standard_prompt(self.tokenizer, "?")),
            "the number of devices": self.ranks,
        }
        if resume:
            self.restore()
        elif self.rank == 0:
            self.folder.mkdir(parents=True)
            (self.folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")

    def sample(self, questions: list[dict], *, prompts=None, **how) -> list[Trajectory]:
        """rollout() by this run's settings. Each device samples its share, and gets the whole."""
        names = "max_searches", "k", "max_tokens", "max_turn_tokens", "max_observation_tokens"
        how |= {name: getattr(self.config, name) for name in names}
        how["batch_size"], seed = self.config.rollout_batch, self.rng.randrange(2**32) + self.rank
        size = math.ceil(len(questions) / self.ranks)
        share = slice(self.rank * size, (self.rank + 1) * size)
        asked = [question["question"] for question in questions[share]]
        how |= {"seed": seed, "prompts": prompts and prompts[share]}
        found = rollout(self.model, self.tokenizer, self.retriever, asked, **how)
        return sum(gather(found), [])

    def test(self, stage: str, **edge) -> None:
        """Test the policy greedily. Log the result and every answer; save model and checkpoint."""
        trajectories = self.sample(self.test_set, temperature=0.0, progress=f"test {stage}")
        row = self.log("eval", stage, **score(self.test_set, trajectories), **edge)
        self.evaluations.append(row)
        for question, t in zip(self.test_set, trajectories):
            golden = question["golden_answers"]
            told = {"em": exact_match(t.answer, golden), "golden_answers": golden} | self.as_json(t)
            self.append("trajectories.jsonl", "eval", stage, id=question["id"], **told)
        if self.rank == 0:
            save_model(self.model, self.tokenizer, self.folder / "model")
        self.checkpoint("", 0)  # last: if it is killed before, the test and model/ are made again
        print(f"{stage}: EM {row['em']:.3f}, {row['searches']:.2f} searches, {row['time_s']:.0f} s")

    def end_step(self, stage: str, step: int, stats: dict, objects: dict, **more) -> None:
        """Log a step, and save it where that is due."""
        self.log("step", stage, step=step, **stats, no_update=not math.isfinite(stats["grad_norm"]))
        if step % self.config.save_every == 0:
            self.checkpoint(stage, step, objects, **more)

    def log(self, kind: str, stage: str, **metrics) -> dict:
        """Add a line to metrics.jsonl, and return it."""
        return self.append("metrics.jsonl", kind, stage, **metrics, time_s=time.time() - self.began)

    def append(self, name: str, kind: str, stage: str, **row) -> dict:
        """Add a line to a log, and return it. JSON knows no NaN: one that stands alone is null."""
        row = {"kind": kind, "stage": stage, **row}
        bad = [key for key, x in row.items() if isinstance(x, float) and not math.isfinite(x)]
        if self.rank == 0:
            with open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(row | dict.fromkeys(bad), ensure_ascii=False) + "\n")
        return row

    def as_json(self, trajectory: Trajectory) -> dict:
        """text: [[who, text], ...], where who is 1 for the policy and 0 for the environment."""
        text = [[int(sampled), decode(self.tokenizer, ids)] for sampled, ids in spans(trajectory)]
        names = "question", "answer", "queries", "finish_reason"
        return {name: getattr(trajectory, name) for name in names} | {"text": text}

    def checkpoint(self, stage: str, step: int, objects: dict = {}, **more) -> None:
        """Save, as a whole or not at all, that `step` steps are done; ("", 0): between stages."""
        if self.rank:
            return
        state = {
            "stage": stage, "step": step, "model": self.model.state_dict(), **more,
            **{name: value.state_dict() for name, value in objects.items()},
            "rng": self.rng.getstate(), "inputs": self.inputs, "evaluations": self.evaluations,
            "sizes": {path.name: path.stat().st_size for path in self.folder.glob("*.jsonl")},
            "time_s": time.time() - self.began,
        }  # fmt: skip
        new = self.folder / "checkpoints/new.pt"
        new.parent.mkdir(exist_ok=True)
        with open(new, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch hides what the file said
                raise OSError(str(error.__context__ or error)) from None
            file.flush()
            os.fsync(file.fileno())
        new.replace(new.with_name("last.pt"))

    def restore(self) -> None:
        """Go back to the last checkpoint: the policy, the random state, the length of the logs.
        A run that was stopped before its first one begins at the beginning."""
        path, saved = self.folder / "checkpoints/last.pt", {"sizes": {}}
        if path.exists():
            try:  # weights_only: a file of somebody else's holds numbers and text, but no code
                with torch.serialization.safe_globals([Pair, Trajectory, Passage]):
                    saved = self.saved = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many kinds for what it cannot read
                raise BadInput(f"{path} is no whole checkpoint: {error}") from None
            for name, value in self.inputs.items():
                if saved.get("inputs", {}).get(name) != value:
                    raise BadInput(f"{self.folder}: {name} changed since this run began")
            self.evaluations = saved["evaluations"]
            self.began -= saved["time_s"]
            self.rng.setstate(saved["rng"])
            if not saved["step"]:  # else resume_stage does it, once trainable() has added adapters
                self.model.load_state_dict(saved["model"])
        for path in self.folder.glob("*.jsonl") if self.rank == 0 else ():
            os.truncate(path, min(path.stat().st_size, saved["sizes"].get(path.name, 0)))

    def resume_stage(self, stage: str, objects: dict) -> dict:
        """Put back the objects, and the policy, as they were saved in this stage. Returns all that
        was saved, or {} where the stage begins."""
        saved, self.saved = self.saved, {}
        if saved.get("stage") != stage:
            return {}
        for name, value in {"model": self.model, **objects}.items() if saved["step"] else ():
            value.load_state_dict(saved[name])
        return saved

def read_settings(path) -> Config:
    """From a JSON file. BadInput is raised for another file, and for a setting unknown here."""
    try:
        return Config(**json.loads(Path(path).read_text(encoding="utf-8-sig")))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: {error}") from None

def parse_flags() -> tuple[Config, bool]:
    """The settings, and whether they are those of a run that goes on."""
    parser = Parser(description="Search-E1: GRPO and offline self-distillation in turn.")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--config", metavar="FILE", help="settings in JSON; flags win over them")
    start.add_argument("--resume", metavar="FOLDER", help="go on with this run, by its settings")
    for item in fields(Config):
        how = {"action": BooleanOptionalAction} if item.type is bool else {"type": item.type}
        text = f"{item.metadata['help']} (default: {item.default!r})".replace("%", "%%")
        flag = "--" + item.name.replace("_", "-")
        parser.add_argument(flag, default=SUPPRESS, help=text, **how)
    given = vars(parser.parse_args())
    file, folder = given.pop("config"), given.pop("resume")
    if folder is None:
        return replace(Config() if file is None else read_settings(file), **given), False
    config = replace(read_settings(f"{folder}/config.json"), out=folder)
    for name in [name for name in given if given[name] != getattr(config, name)]:
        raise BadInput(f"{folder} has {name} {getattr(config, name)!r}, and is resumed as it is")
    return config, True

def main() -> None:
    config, resume = parse_flags()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    if "LOCAL_RANK" in os.environ:  # one of torchrun's processes: rank 0 speaks and writes
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    train(config, resume)
    if dist.is_initialized():  # its threads must end before Python does, or it may abort
        dist.destroy_process_group()

if __name__ == "__main__":
    run_script(main)
