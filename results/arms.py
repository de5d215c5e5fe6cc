"""The plan of evidence.py: every arm that is run, and the trials that chose its settings.

What will be called a yes. This was written, and committed, before a test question of the evidence
was read. Differences are paired by seed; an interval is the 95 % interval of their mean.

    yes      the interval of the area lies above 0, and that of final EM not below 0
    no       the interval of the area lies below 0, or between -.03 and +.03
    open     anything else

It is asked of search-e1 against grpo, of search-e1 against rft, and of ofsd against grpo: from the
base with 20 seeds, and from the converged policy with 10 (there without ofsd). Searches are fewer
where the interval of their difference lies below 0. No arm is changed or run again afterwards.
"""

from dataclasses import dataclass

WORLD = dict(questions="micro/train.jsonl", ofsd_batch=8)
BUDGET = 400_000  # tokens


@dataclass
class Arm:
    """Stages in turn, the last one repeated until the budget is spent. "grpo 3" is three steps,
    "grpo" all that are left; "ofsd" and "rft" are one stage of theirs. The rest is by the names of
    train.py's Config, where ofsd_* hold for rft, too."""

    stages: str
    grpo_lr: float = 6e-4
    ofsd_lr: float = 6e-4
    ofsd_questions: int = 60
    ofsd_epochs: int = 2
    questions_per_step: int = 16
    students: int = 1  # pairs a question at most: the student that differs most, then the next, ...
    model: str = "micro/model"
    budget: int = BUDGET
    falls: bool = True  # GRPO's learning rate, linearly to 0 over the budget
    clip: str = "none"
    tau: float = 0.05


# Each arm has four trials here and three more below, all on one development seed.
TRIALS = {
    "grpo": {f"lr{lr:g}": Arm("grpo", lr) for lr in (3e-4, 6e-4, 9e-4, 1.3e-3)},
    "search-e1": {
        "one-pair": Arm("grpo 2, ofsd, grpo", ofsd_epochs=4),
        "three": Arm("grpo 2, ofsd, grpo", students=3),
        "first": Arm("ofsd, grpo", students=3),
        "twice": Arm("grpo 1, ofsd, grpo 2, ofsd, grpo", ofsd_questions=40, students=3),
    },
    "ofsd": {
        "one-pair": Arm("ofsd", ofsd_epochs=4),
        "three": Arm("ofsd", students=3),
        "fast": Arm("ofsd", students=3, ofsd_lr=1e-3),
        "small": Arm("ofsd", students=3, ofsd_questions=40),
    },
    "rft": {
        "four": Arm("grpo 2, rft, grpo", ofsd_epochs=4),
        "eight": Arm("grpo 2, rft, grpo", ofsd_epochs=8),
        "first": Arm("rft, grpo", ofsd_epochs=6),
        "twice": Arm("grpo 1, rft, grpo 2, rft, grpo", ofsd_questions=40, ofsd_epochs=6),
    },
}  # fmt: skip

# This second round follows what the first said: fine-tuning gains by more passes, so OFSD may, too.
# And single tokens of OFSD have a very large divergence, so one trial caps it.
TRIALS_2 = {
    "grpo": {
        "lr0.0007": Arm("grpo", 7e-4),
        "small-batch": Arm("grpo", questions_per_step=8),
        "large-batch": Arm("grpo", questions_per_step=32),
    },
    "search-e1": {
        "fast": Arm("grpo 1, ofsd, grpo", ofsd_lr=1e-3, ofsd_epochs=4, students=2),
        "fast-one": Arm("grpo 1, ofsd, grpo", ofsd_lr=1e-3, ofsd_epochs=8),
        "first-40": Arm("ofsd, grpo", ofsd_lr=1e-3, ofsd_questions=40, ofsd_epochs=4, students=3),
    },
    "ofsd": {
        "fast-one": Arm("ofsd", ofsd_lr=1e-3, ofsd_epochs=8),
        "fast-40": Arm("ofsd", ofsd_lr=1e-3, ofsd_questions=40, ofsd_epochs=4, students=3),
        "position": Arm("ofsd", ofsd_lr=1e-3, ofsd_questions=40, ofsd_epochs=4, students=3,
                        clip="position", tau=0.5),
    },
    "rft": {
        "early": Arm("grpo 1, rft, grpo", ofsd_epochs=8),
        "fast": Arm("grpo 1, rft, grpo", ofsd_lr=1e-3, ofsd_epochs=8),
        "first-40": Arm("rft, grpo", ofsd_lr=1e-3, ofsd_questions=40, ofsd_epochs=8),
    },
}  # fmt: skip


def chosen(best: dict[str, str], first: dict, second: dict) -> dict[str, Arm]:
    """The arms by kind, from the names of their best trials in two rounds."""
    return {kind: {**first[kind], **second[kind]}[name] for kind, name in best.items()}


# These were the best trials, by the area under the curve.
BEST = {"grpo": "lr0.0006", "search-e1": "first-40", "ofsd": "fast-40", "rft": "first"}
ARMS = chosen(BEST, TRIALS, TRIALS_2)

# From a policy that GRPO, its learning rate held, improves no more on the validation questions.
CONVERGED = "runs/evidence/converged"
CONVERGE = Arm("grpo", falls=False, budget=1_200_000)
AFTER = dict(model=CONVERGED, budget=400_000)
PLATEAU_TRIALS = {
    "grpo": {f"lr{lr:g}": Arm("grpo", lr, **AFTER) for lr in (1e-4, 3e-4, 6e-4)},
    **{
        kind: {
            "gentle": Arm(f"{stage}, grpo", 3e-4, 3e-4, **AFTER),
            "as-before": Arm(f"{stage}, grpo", 3e-4, **AFTER),
            "passes": Arm(f"{stage}, grpo", 3e-4, ofsd_epochs=4, **AFTER),
        }
        for kind, stage in (("search-e1", "ofsd"), ("rft", "rft"))
    },
}  # fmt: skip
# In that round no stage of OFSD ran: among the 32 pairs of the one development seed the teacher had
# no edge, so Search-E1's three trials are one and the same. Larger pools give more pairs.
PLATEAU_TRIALS_2 = {
    "grpo": {
        "lr0.0002": Arm("grpo", 2e-4, **AFTER),
        "large-batch": Arm("grpo", 3e-4, questions_per_step=32, **AFTER),
    },
    **{
        kind: {
            "large": Arm(f"{stage}, grpo", 3e-4, ofsd_questions=120, students=3, **AFTER),
            "large-fast": Arm(f"{stage}, grpo", 3e-4, 1e-3, 120, 4, students=3, **AFTER),
        }
        for kind, stage in (("search-e1", "ofsd"), ("rft", "rft"))
    },
}  # fmt: skip
# Again the best by the area. Search-E1's first three are equal: of these it is the middle one.
PLATEAU_BEST = {"grpo": "large-batch", "search-e1": "as-before", "rft": "as-before"}
PLATEAU = chosen(PLATEAU_BEST, PLATEAU_TRIALS, PLATEAU_TRIALS_2)

# One stage of OFSD as the paper has it, one pair a question, from one policy (two steps of GRPO)
# and one pool a seed; each ablation changes one thing in it.
ABLATED = Arm("grpo 2, ofsd", ofsd_questions=120, budget=10**9)
ABLATIONS = {
    "search-e1": {},
    "no reference": dict(reference="none"),
    "shuffled reference": dict(reference="shuffled"),
    "random reference": dict(reference="random"),
    "random student": dict(student="random"),
    "three students": dict(students=3),
    "clip entry": dict(clip="entry"),
    "clip position": dict(clip="position"),
    "reverse KL": dict(divergence="reverse_kl"),
    "JSD": dict(divergence="jsd"),
    "queries only": dict(tokens="queries"),
    "reference's queries": dict(reads="queries"),
    "fine-tuning": dict(kind="rft"),
}
