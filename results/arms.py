"""The plan of evidence.py: every arm that is run, and the trials that chose its settings."""

from dataclasses import dataclass, replace

# The world: three-hop questions that the base model almost never answers (micro/make.py).
WORLD = dict(questions="micro/evidence-train.jsonl", ofsd_batch=8)
BUDGET = 500_000  # tokens


@dataclass
class Arm:
    """Stages in turn, the last one repeated until the budget is spent. "grpo 3" is three steps,
    "grpo" all that are left; "ofsd" and "rft" are one stage of theirs. The rest is by the names of
    train.py's Config, where ofsd_* hold for rft, too."""

    stages: str
    grpo_lr: float = 4e-4
    ofsd_lr: float = 6e-4
    ofsd_questions: int = 60
    ofsd_epochs: int = 2
    questions_per_step: int = 16
    students: int = 1  # pairs a question at most: the student that differs most, then the next, ...
    model: str = "micro/model"
    budget: int = BUDGET
    falls: bool = True  # GRPO's learning rate, linearly to 0 over the budget


TRIALS = {
    "grpo": {f"lr{lr:g}": Arm("grpo", lr) for lr in (2e-4, 3e-4, 4e-4, 6e-4, 8e-4, 1.1e-3)},
    "search-e1": {
        "once-30": Arm("grpo 2, ofsd, grpo", ofsd_questions=30, students=4),
        "once-60": Arm("grpo 2, ofsd, grpo", students=2),
        "one-pair": Arm("grpo 2, ofsd, grpo", ofsd_epochs=4),
        "twice": Arm("grpo 1, ofsd, grpo 2, ofsd, grpo", ofsd_questions=30, students=4,
                     ofsd_epochs=1),
        "fast": Arm("grpo 2, ofsd, grpo", 6e-4, students=2),
        "fast-30": Arm("grpo 2, ofsd, grpo", 8e-4, ofsd_questions=30, students=2),
    },
    "ofsd": {
        "once-30": Arm("ofsd", ofsd_questions=30, students=4),
        "once-60": Arm("ofsd", students=2),
        "one-pair": Arm("ofsd", ofsd_epochs=4),
        "wide": Arm("ofsd", students=4),
        "fast": Arm("ofsd", students=4, ofsd_lr=1e-3),
        "fast-30": Arm("ofsd", ofsd_questions=30, students=4, ofsd_lr=1e-3),
    },
    "rft": {
        "once-30": Arm("grpo 2, rft, grpo", ofsd_questions=30, ofsd_epochs=4),
        "once-60": Arm("grpo 2, rft, grpo", ofsd_epochs=3),
        "more-passes": Arm("grpo 2, rft, grpo", ofsd_epochs=6),
        "twice": Arm("grpo 1, rft, grpo 2, rft, grpo", ofsd_questions=30, ofsd_epochs=4),
        "fast": Arm("grpo 2, rft, grpo", 6e-4, ofsd_epochs=3),
        "fast-30": Arm("grpo 2, rft, grpo", 8e-4, ofsd_questions=30, ofsd_epochs=4),
    },
}  # fmt: skip

# The best trial of each arm by the area under its curve.
BEST = {"grpo": "lr0.0006", "search-e1": "fast-30", "ofsd": "fast-30", "rft": "fast-30"}
ARMS = {kind: TRIALS[kind][best] for kind, best in BEST.items()}

# A second round. The ablations (below; validation questions) say that one pair of a question is
# too little: with three students a question a stage does twice as much. Three more trials for
# each, on two seeds.
TRIALS_2 = {
    "grpo": {
        "lr0.0005": Arm("grpo", 5e-4),
        "small-batch": Arm("grpo", 6e-4, questions_per_step=8),
        "large-batch": Arm("grpo", 6e-4, questions_per_step=32),
    },
    "search-e1": {
        "early": Arm("grpo 1, ofsd, grpo", 6e-4, 1e-3, ofsd_questions=30, students=4),
        "early-twice": Arm("grpo 1, ofsd, ofsd, grpo", 6e-4, 1e-3, ofsd_questions=30, students=4),
        "wide": Arm("grpo 2, ofsd, grpo", 8e-4, ofsd_epochs=4, students=4),
    },
    "rft": {
        "early": Arm("grpo 1, rft, grpo", 6e-4, 1e-3, ofsd_questions=30, ofsd_epochs=8),
        "early-twice": Arm("grpo 1, rft, rft, grpo", 6e-4, 1e-3, ofsd_questions=30, ofsd_epochs=8),
        "wide": Arm("grpo 2, rft, grpo", 8e-4, ofsd_epochs=8),
    },
}  # fmt: skip

BEST_2 = {"grpo": "lr0.0005", "search-e1": "early", "rft": "early"}
ARMS_2 = {kind: {**TRIALS[kind], **TRIALS_2[kind]}[best] for kind, best in BEST_2.items()}

# From a policy that GRPO, its learning rate held, improves no more on the validation questions.
CONVERGED = "runs/evidence/converged"
CONVERGE = Arm("grpo", 3e-4, falls=False, budget=1_200_000)
AFTER = dict(model=CONVERGED, budget=400_000)
PLATEAU_TRIALS = {
    "grpo": {f"lr{lr:g}": Arm("grpo", lr, **AFTER) for lr in (1e-4, 3e-4, 6e-4)},
    **{
        kind: {
            "gentle": Arm(f"{stage}, grpo", 3e-4, ofsd_lr=3e-4, **AFTER),
            "as-before": Arm(f"{stage}, grpo", 3e-4, **AFTER),
            "wide": Arm(f"{stage}, grpo", 3e-4, ofsd_questions=120, **AFTER),
        }
        for kind, stage in (("search-e1", "ofsd"), ("rft", "rft"))
    },
}  # fmt: skip
PLATEAU_BEST = {"grpo": "lr0.0001", "search-e1": "wide", "rft": "wide"}
PLATEAU = {kind: PLATEAU_TRIALS[kind][best] for kind, best in PLATEAU_BEST.items()}

# There the wide stage costs more than the budget: no GRPO follows it. The same again with room for
# both: the best trials, by final EM, of those that GRPO did follow, and half as much budget again.
PLATEAU_BEST_2 = {"grpo": "lr0.0001", "search-e1": "gentle", "rft": "as-before"}
PLATEAU_2 = {
    kind: replace(PLATEAU_TRIALS[kind][best], budget=600_000)
    for kind, best in PLATEAU_BEST_2.items()
}

# One stage of OFSD as the paper has it, one pair a question, from one policy (five gentle steps of
# GRPO) and one pool a seed; each ablation changes one thing in it.
ABLATED = Arm("grpo 5, ofsd", 3e-4, ofsd_questions=90, ofsd_epochs=4, budget=10**9)
ABLATIONS = {
    "search-e1": {},
    "shuffled reference": dict(reference="shuffled"),
    "clip entry": dict(clip="entry"),
    "clip position": dict(clip="position"),
    "random reference": dict(reference="random"),
    "random student": dict(student="random"),
    "reverse KL": dict(divergence="reverse_kl"),
    "JSD": dict(divergence="jsd"),
    "queries only": dict(tokens="queries"),
    "reference's queries": dict(reads="queries"),
    "three students": dict(students=3),
    "fine-tuning": dict(kind="rft"),
}
