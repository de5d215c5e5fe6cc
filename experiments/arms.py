"""The plan of the evidence: every arm, and the trials that chose its settings.

The rule below says what will be called a yes. It was written, and committed, before
any test question of the evidence was read. Differences are paired by seed, and an
interval is the 95 % interval of their mean.

    yes      the interval of the area lies above 0, and that of final EM not below 0
             (its upper end is at least 0)
    no       the interval of the area lies below 0, or between -.03 and +.03
    open     anything else

Three questions are asked: search-e1 against grpo, search-e1 against rft, and ofsd
against grpo. They are asked from the base model with 20 seeds, and from the converged
policy with 10 (there without ofsd). An arm searches less where the interval of the
difference in searches lies below 0. No arm is changed or run again afterwards.

Two more parts come later, and their rule is committed before their test questions are
read. In both an agent may write the references, as an expert in the policy's own form,
or as a foreigner (foreign.py). Their settings are the best of their trials, by the
area: seven each, and three more for each of the two arms with a foreigner's references.
Ten seeds each, paired.

    agent      seven arms: grpo, search-e1 and rft with references of their own, and the
               last two with the expert's and with the foreigner's. Asked are the
               questions of AGENT_QUESTIONS in tables.py, by the rule above; also with
               the price of writing the references, as a second table without a verdict.
    retention  five arms, without the expert: they train on half of the relations, and
               are tested on these and on the others. Asked is whether EM on the others
               changes more favourably in OFSD than in fine-tuning, with own references
               and with foreign ones, after the offline stage and at the end. yes: the
               interval of the difference lies above 0. no: it lies below 0, or between
               -.03 and +.03. open: anything else.

That makes twelve verdicts (eight of the first kind, four of the second), without a
correction for their number. Reported beside them, without a verdict: EM at temperature
1, the best of five samples, answered, the policy's form (thoughts, queries, divergence
to the start), the share of right prefixes, and the deviation over seeds.
"""

from dataclasses import dataclass, replace

CONVERGED = "runs/evidence/converged"  # what `experiments.evidence converge` saves


@dataclass(frozen=True)
class Arm:
    """One way to spend a budget of tokens.

    stages: what is done in turn; the last one is repeated until the budget is spent.
    "grpo 3" is three steps of GRPO, and "grpo" all the steps that are left. "ofsd" and
    "rft" are one stage of each. Most other settings have the names of Config. Those
    that begin with ofsd_ hold for rft, too; students, clip and tau do not.
    """

    stages: str
    grpo_lr: float = 6e-4
    ofsd_lr: float = 6e-4
    ofsd_questions: int = 60
    ofsd_epochs: int = 2
    questions_per_step: int = 16
    students: int = 1  # pairs that a question gives at most
    model: str = "micro/model"
    budget: int = 400_000  # tokens
    falls: bool = True  # GRPO's learning rate, linearly to 0 over the budget
    clip: str = "none"
    tau: float = 0.05
    references: str = "own"  # siblings; or an agent's: expert or foreign (foreign.py)
    questions: str = "train"  # what the arm trains on, micro/NAME.jsonl


# ------------------------------------------------------------------ from the base model

# Each arm has four trials here and three more below, all on one development seed.
BASE_1 = {
    "grpo": {
        "lr0.0003": Arm("grpo", grpo_lr=3e-4),
        "lr0.0006": Arm("grpo", grpo_lr=6e-4),
        "lr0.0009": Arm("grpo", grpo_lr=9e-4),
        "lr0.0013": Arm("grpo", grpo_lr=1.3e-3),
    },
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
        "twice": Arm(
            "grpo 1, rft, grpo 2, rft, grpo", ofsd_questions=40, ofsd_epochs=6
        ),
    },
}

# The second round follows what the first one said. Fine-tuning gains by more passes, so
# OFSD may, too. And a few tokens of OFSD have a very large divergence, so one trial
# caps it.
BASE_2 = {
    "grpo": {
        "lr0.0007": Arm("grpo", grpo_lr=7e-4),
        "small-batch": Arm("grpo", questions_per_step=8),
        "large-batch": Arm("grpo", questions_per_step=32),
    },
    "search-e1": {
        "fast": Arm("grpo 1, ofsd, grpo", ofsd_lr=1e-3, ofsd_epochs=4, students=2),
        "fast-one": Arm("grpo 1, ofsd, grpo", ofsd_lr=1e-3, ofsd_epochs=8),
        "first-40": Arm(
            "ofsd, grpo",
            ofsd_lr=1e-3,
            ofsd_questions=40,
            ofsd_epochs=4,
            students=3,
        ),
    },
    "ofsd": {
        "fast-one": Arm("ofsd", ofsd_lr=1e-3, ofsd_epochs=8),
        "fast-40": Arm(
            "ofsd",
            ofsd_lr=1e-3,
            ofsd_questions=40,
            ofsd_epochs=4,
            students=3,
        ),
        "position": Arm(
            "ofsd",
            ofsd_lr=1e-3,
            ofsd_questions=40,
            ofsd_epochs=4,
            students=3,
            clip="position",
            tau=0.5,
        ),
    },
    "rft": {
        "early": Arm("grpo 1, rft, grpo", ofsd_epochs=8),
        "fast": Arm("grpo 1, rft, grpo", ofsd_lr=1e-3, ofsd_epochs=8),
        "first-40": Arm("rft, grpo", ofsd_lr=1e-3, ofsd_questions=40, ofsd_epochs=8),
    },
}

# The best trials by the area under the curve.
ARMS = {
    "grpo": BASE_1["grpo"]["lr0.0006"],
    "search-e1": BASE_2["search-e1"]["first-40"],
    "ofsd": BASE_2["ofsd"]["fast-40"],
    "rft": BASE_1["rft"]["first"],
}

# --------------------------------------------- from a policy that has stopped improving

# GRPO, its learning rate held, until the validation questions show no more progress.
CONVERGE = Arm("grpo", falls=False, budget=1_200_000)


def plateau_arm(
    stages: str,
    *,
    grpo_lr: float = 3e-4,
    ofsd_lr: float = 6e-4,
    ofsd_questions: int = 60,
    ofsd_epochs: int = 2,
    questions_per_step: int = 16,
    students: int = 1,
) -> Arm:
    """An arm that begins with the converged policy."""
    return Arm(
        stages,
        grpo_lr=grpo_lr,
        ofsd_lr=ofsd_lr,
        ofsd_questions=ofsd_questions,
        ofsd_epochs=ofsd_epochs,
        questions_per_step=questions_per_step,
        students=students,
        model=CONVERGED,
    )


PLATEAU_1 = {
    "grpo": {
        "lr0.0001": plateau_arm("grpo", grpo_lr=1e-4),
        "lr0.0003": plateau_arm("grpo", grpo_lr=3e-4),
        "lr0.0006": plateau_arm("grpo", grpo_lr=6e-4),
    },
    "search-e1": {
        "gentle": plateau_arm("ofsd, grpo", ofsd_lr=3e-4),
        "as-before": plateau_arm("ofsd, grpo"),
        "passes": plateau_arm("ofsd, grpo", ofsd_epochs=4),
    },
    "rft": {
        "gentle": plateau_arm("rft, grpo", ofsd_lr=3e-4),
        "as-before": plateau_arm("rft, grpo"),
        "passes": plateau_arm("rft, grpo", ofsd_epochs=4),
    },
}

# In that round no stage of OFSD ran. On the one development seed the teacher had no
# edge over its 32 pairs, so Search-E1's three trials are one and the same. Larger pools
# give more pairs.
PLATEAU_2 = {
    "grpo": {
        "lr0.0002": plateau_arm("grpo", grpo_lr=2e-4),
        "large-batch": plateau_arm("grpo", questions_per_step=32),
    },
    "search-e1": {
        "large": plateau_arm("ofsd, grpo", ofsd_questions=120, students=3),
        "large-fast": plateau_arm(
            "ofsd, grpo",
            ofsd_lr=1e-3,
            ofsd_questions=120,
            ofsd_epochs=4,
            students=3,
        ),
    },
    "rft": {
        "large": plateau_arm("rft, grpo", ofsd_questions=120, students=3),
        "large-fast": plateau_arm(
            "rft, grpo",
            ofsd_lr=1e-3,
            ofsd_questions=120,
            ofsd_epochs=4,
            students=3,
        ),
    },
}

# Again the best by the area. Search-E1's first three are equal: it is the middle one.
PLATEAU = {
    "grpo": PLATEAU_2["grpo"]["large-batch"],
    "search-e1": PLATEAU_1["search-e1"]["as-before"],
    "rft": PLATEAU_1["rft"]["as-before"],
}

# ------------------------------------------------------------ references by an agent

# With an agent's references each question has a pair. So these stages are smaller than
# those above: a stage of OFSD with three students a question would spend the budget.
# Seven trials for each, as there.
AGENT_OFSD = {
    "one": Arm("ofsd, grpo", ofsd_lr=1e-3, ofsd_questions=40, ofsd_epochs=4),
    "gentle": Arm("ofsd, grpo", ofsd_questions=40, ofsd_epochs=4),
    "wide": Arm("ofsd, grpo", ofsd_lr=1e-3, ofsd_questions=80, ofsd_epochs=2),
    "three": Arm(
        "ofsd, grpo", ofsd_lr=1e-3, ofsd_questions=20, ofsd_epochs=3, students=3
    ),
    "later": Arm("grpo 2, ofsd, grpo", ofsd_lr=1e-3, ofsd_questions=40, ofsd_epochs=4),
    "capped": Arm(
        "ofsd, grpo",
        ofsd_lr=1e-3,
        ofsd_questions=40,
        ofsd_epochs=4,
        clip="position",
        tau=0.5,
    ),
    "capped-gentle": Arm(
        "ofsd, grpo", ofsd_questions=40, ofsd_epochs=4, clip="position", tau=0.5
    ),
}
AGENT_RFT = {
    "first": Arm("rft, grpo", ofsd_epochs=6),
    "gentle": Arm("rft, grpo", ofsd_lr=3e-4, ofsd_epochs=4),
    "wide": Arm("rft, grpo", ofsd_questions=160, ofsd_epochs=2),
    "wide-fast": Arm("rft, grpo", ofsd_lr=1e-3, ofsd_questions=160, ofsd_epochs=2),
    "later": Arm("grpo 2, rft, grpo", ofsd_epochs=4),
    "first-40": Arm("rft, grpo", ofsd_lr=1e-3, ofsd_questions=40, ofsd_epochs=8),
    "short": Arm("rft, grpo", ofsd_epochs=2),
}


def with_references(arms: dict[str, Arm], references: str) -> dict[str, Arm]:
    return {name: replace(arm, references=references) for name, arm in arms.items()}


AGENT_TRIALS = {
    "search-e1-expert": with_references(AGENT_OFSD, "expert"),
    "search-e1-foreign": with_references(AGENT_OFSD, "foreign"),
    "rft-expert": with_references(AGENT_RFT, "expert"),
    "rft-foreign": with_references(AGENT_RFT, "foreign"),
}

# In that round fine-tuning on the foreigner's references ended at an EM of .08 or less
# in each trial, and OFSD's stage was skipped in five of seven, since the teacher had no
# edge. So both have three more trials with them: smaller steps, and a later stage.
AGENT_TRIALS_2 = {
    "search-e1-foreign": with_references(
        {
            "later-gentle": Arm("grpo 2, ofsd, grpo", ofsd_lr=3e-4, ofsd_questions=40),
            "later-wide": Arm("grpo 2, ofsd, grpo", ofsd_lr=3e-4, ofsd_questions=80),
            "later-capped": Arm(
                "grpo 2, ofsd, grpo",
                ofsd_lr=1e-3,
                ofsd_questions=40,
                ofsd_epochs=4,
                clip="position",
                tau=0.5,
            ),
        },
        "foreign",
    ),
    "rft-foreign": with_references(
        {
            "touch": Arm("rft, grpo", ofsd_lr=1e-4),
            "touch-wide": Arm(
                "rft, grpo", ofsd_lr=1e-4, ofsd_questions=160, ofsd_epochs=1
            ),
            "touch-later": Arm("grpo 2, rft, grpo", ofsd_lr=1e-4),
        },
        "foreign",
    ),
}

# The best trials by the area. Four of OFSD's with the foreigner's references are equal,
# since the stage was skipped: it is the one that is best with the expert's.
AGENT = {
    "grpo": ARMS["grpo"],
    "search-e1": ARMS["search-e1"],
    "rft": ARMS["rft"],
    "search-e1-expert": AGENT_TRIALS["search-e1-expert"]["one"],
    "rft-expert": AGENT_TRIALS["rft-expert"]["first"],
    "search-e1-foreign": AGENT_TRIALS["search-e1-foreign"]["one"],
    "rft-foreign": AGENT_TRIALS_2["rft-foreign"]["touch-later"],
}
RETENTION = {
    name: replace(arm, questions="evidence-retention-train")
    for name, arm in AGENT.items()
    if not name.endswith("-expert")
}

# --------------------------------------------------------- one stage, one thing changed

# One stage of OFSD with one pair a question, and without the paper's clip (ofsd.py says
# why). All variants of a seed start from one policy (two steps of GRPO) and share one
# pool. The stage ends the run, so no budget does.
ABLATED = Arm("grpo 2, ofsd", ofsd_questions=120, budget=10**9)


@dataclass(frozen=True)
class Variant:
    """A stage of OFSD with at most one thing changed, or fine-tuning in its place."""

    reference: str = "own"  # that the teacher reads: own, none, shuffled or random
    student: str = "most different"  # the trajectory that is corrected; or random
    students: int = 1  # pairs that a question gives at most
    shown: str = "all"  # of the reference; or queries, that is queries and answer
    tokens: str = "all"  # of the student that are aligned; or queries
    divergence: str = "forward_kl"
    clip: str = "none"
    stage: str = "ofsd"  # or rft: fine-tuning on the references in its place


ABLATIONS = {
    "search-e1": Variant(),
    "no reference": Variant(reference="none"),
    "shuffled reference": Variant(reference="shuffled"),
    "random reference": Variant(reference="random"),
    "random student": Variant(student="random"),
    "three students": Variant(students=3),
    "clip entry": Variant(clip="entry"),
    "clip position": Variant(clip="position"),
    "reverse KL": Variant(divergence="reverse_kl"),
    "JSD": Variant(divergence="jsd"),
    "queries only": Variant(tokens="queries"),
    "reference's queries": Variant(shown="queries"),
    "fine-tuning": Variant(stage="rft"),
}
