"""Do the tests notice? Breaks one small thing at a time and runs the tests of its file.

    python -m tests.mutate              # all: half an hour; status 1 if one survives
    python -m tests.mutate clip ofsd    # those whose file or mistake holds such a word

A mutant is one replacement in a copy of the repository. It is caught if a test, or a
fixture of one, fails. The last line counts. (pytest does not collect this file, which
runs pytest.)
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# The tests of a file, those of the mathematics first.
FILES = {
    "retriever.py": ["tests/test_retriever.py"],
    "rollout.py": ["tests/test_rollout.py"],
    "eval.py": ["tests/test_eval.py"],
    "grpo.py": [
        "tests/test_grpo.py",
        "tests/test_forward.py",
        "tests/test_grpo_step.py",
    ],
    "ofsd.py": ["tests/test_ofsd.py", "tests/test_ofsd_step.py"],
    "train.py": ["tests/test_train.py", "tests/system/test_runs.py"],
    "machinery/adapters.py": ["tests/test_adapters.py", "tests/test_ofsd_step.py"],
    "machinery/run.py": ["tests/test_train.py", "tests/system/test_runs.py"],
    "machinery/text.py": ["tests/test_rollout.py", "tests/test_families.py"],
}


class Mutant(NamedTuple):
    """One mistake: `text` in the file becomes `wrong`."""

    file: str
    mistake: str
    text: str
    wrong: str


MUTANTS = [
    Mutant(*mutant)
    for mutant in (
        (
            "retriever.py",
            "multiplicity lost",
            "        for word in words(query):\n            number = self",
            "        for word in set(words(query)):\n            number = self",
        ),
        (
            "retriever.py",
            "idf without its 1",
            "idf = np.log(1 + (self.size",
            "idf = np.log((self.size",
        ),
        (
            "retriever.py",
            "tf counted once",
            "tf = np.diff(first, append=len(pairs)).astype(np.int32)",
            "tf = np.ones(len(first), np.int32)",
        ),
        (
            "retriever.py",
            "the plain formula without its norm",
            "score += idf * tf / (tf + norm)",
            "score += idf * tf / (tf + k1)",
        ),
        (
            "rollout.py",
            "only the rows are swapped",
            "        cache.reorder(order)\n",
            "",
        ),
        (
            "rollout.py",
            "only the cache is swapped",
            "        rows[:sampling] = [rows[row] for row in order]\n",
            "",
        ),
        (
            "rollout.py",
            "lengths not swapped",
            "self.lengths[: len(order)] = [self.lengths[row] for row in order]",
            "pass",
        ),
        (
            "rollout.py",
            "temperature ignored",
            "logits / (temperature or 1.0)",
            "logits",
        ),
        (
            "rollout.py",
            "a token of probability 0",
            "torch.searchsorted(cumulative, level, right=True)",
            "torch.searchsorted(cumulative, level, right=False)",
        ),
        (
            "rollout.py",
            "information counts as sampled",
            "self.loss_mask += [0] * len(ids)",
            "self.loss_mask += [1] * len(ids)",
        ),
        (
            "rollout.py",
            "padding is seen",
            "device=device) <= self.slots",
            "device=device) < self.used + 0 * self.slots",
        ),
        (
            "rollout.py",
            "keys stay in float32",
            "keys = keys.to(values.dtype)",
            "keys = keys + 0",
        ),
        (
            "rollout.py",
            "logits that are NaN",
            "if math.isnan(sum(values)):",
            "if False:",
        ),
        (
            "rollout.py",
            "an observation that does not fit",
            "reached_limit(trajectory, added=len(ids))",
            "reached_limit(trajectory)",
        ),
        (
            "rollout.py",
            "the longest is not cut first",
            "        longest -= 1\n",
            "        longest = room // len(lines) - 1\n",
        ),
        (
            "rollout.py",
            "all turns are parsed as one",
            "trajectory.response_ids[-turn_length:]",
            "trajectory.response_ids",
        ),
        (
            "rollout.py",
            "sampling keeps a gradient",
            "@torch.no_grad()\ndef rollout(",
            "def rollout(",
        ),
        (
            "machinery/text.py",
            "a character cut in two",
            "kept.pop()",
            "break",
        ),
        (
            "machinery/text.py",
            "tags in full-width characters pass",
            "if pattern.search(as_read):",
            "if False:",
        ),
        (
            "eval.py",
            "a wrong answer counts as supported",
            "right_and_supported.append(em == 1.0 and supported(trajectory))",
            "right_and_supported.append(supported(trajectory))",
        ),
        (
            "eval.py",
            "F1 forgets how often a word stands",
            "golden_words = Counter(normalize_answer(golden_answer).split())",
            "golden_words = Counter(set(normalize_answer(golden_answer).split()))",
        ),
        (
            "eval.py",
            "nothing is right",
            "    if not answer:\n        return 0.0\n    for golden_answer",
            "    for golden_answer",
        ),
        (
            "eval.py",
            "support by a part of a word",
            'f" {answer} " in f" {text} "',
            "answer in text",
        ),
        (
            "eval.py",
            "F1 of the last answer",
            "best = max(best, 2 * precision * recall / (precision + recall))",
            "best = 2 * precision * recall / (precision + recall)",
        ),
        (
            "eval.py",
            "recall of the answer",
            "recall = shared / golden_words.total()",
            "recall = shared / answer_words.total()",
        ),
        (
            "eval.py",
            "punctuation stays",
            ".translate(NO_PUNCTUATION)",
            "",
        ),
        (
            "eval.py",
            "articles within words",
            'r"\\b(a|an|the)\\b"',
            'r"(a|an|the)"',
        ),
        (
            "eval.py",
            "rewards of another question",
            "question = questions[number // group_size]",
            "question = questions[number % len(questions)]",
        ),
        (
            "eval.py",
            "sampled tests",
            "temperature: float = 0.0",
            "temperature: float = 1.0",
        ),
        (
            "eval.py",
            "only those that answered",
            'em_supported": mean(right_and_supported)',
            'em_supported": mean(ems)',
        ),
        (
            "grpo.py",
            "ddof 0",
            "max(rewards.shape[1] - 1, 1)",
            "rewards.shape[1]",
        ),
        (
            "grpo.py",
            "eps outside the sum",
            "(variance.sqrt() + eps)",
            "variance.sqrt()",
        ),
        (
            "grpo.py",
            "mean over the whole batch",
            "rewards.mean(dim=1, keepdim=True)",
            "rewards.mean()",
        ),
        (
            "grpo.py",
            "rounding of equal rewards",
            "torch.where(equal, 0.0, advantages)",
            "advantages",
        ),
        (
            "grpo.py",
            "sign of the loss",
            "loss = -torch.minimum",
            "loss = torch.minimum",
        ),
        (
            "grpo.py",
            "clip on the wrong side",
            "-torch.minimum(objective, clipped_objective)",
            "-torch.maximum(objective, clipped_objective)",
        ),
        (
            "grpo.py",
            "clip of one side only",
            "ratio.clamp(1 - clip_eps, 1 + clip_eps)",
            "ratio.clamp(max=1 + clip_eps)",
        ),
        (
            "grpo.py",
            "no clip",
            "-torch.minimum(objective, clipped_objective)",
            "-objective",
        ),
        (
            "grpo.py",
            "ratio upside down",
            "(logprobs - old_logprobs).clamp(max=80)",
            "(old_logprobs - logprobs).clamp(max=80)",
        ),
        (
            "grpo.py",
            "ratio detached",
            "ratio = log_ratio.exp()",
            "ratio = log_ratio.exp().detach() + 0 * log_ratio",
        ),
        (
            "grpo.py",
            "k3 upside down",
            "(ref_logprobs - logprobs).clamp(max=80)",
            "(logprobs - ref_logprobs).clamp(max=80)",
        ),
        (
            "grpo.py",
            "k3 without its x",
            "kl = torch.expm1(x) - x",
            "kl = torch.expm1(x)",
        ),
        (
            "grpo.py",
            "k3 not exact",
            "torch.expm1(x) - x",
            "x.exp() - x - 1",
        ),
        (
            "grpo.py",
            "k3 detached",
            "loss + kl_coef * kl",
            "loss + kl_coef * kl.detach()",
        ),
        (
            "grpo.py",
            "a ratio that overflows",
            "(logprobs - old_logprobs).clamp(max=80)",
            "(logprobs - old_logprobs)",
        ),
        (
            "grpo.py",
            "mask not applied",
            "    mask = loss_mask.bool()  # (B, T), M of them true\n    weights",
            "    mask = torch.ones_like(loss_mask).bool()\n    weights",
        ),
        (
            "grpo.py",
            "denominator counts information",
            "mask.sum() if num_tokens is None",
            "torch.tensor(mask.numel()) if num_tokens is None",
        ),
        (
            "grpo.py",
            "num_tokens ignored",
            "else torch.as_tensor(num_tokens)",
            "else mask.sum()",
        ),
        (
            "grpo.py",
            "a mean of means without the mask",
            "sequences * mask.sum(dim=1, keepdim=True)",
            "torch.as_tensor(sequences * length)",
        ),
        (
            "grpo.py",
            "a sum of means",
            "divisor = sequences * mask.sum(dim=1, keepdim=True)",
            "divisor = mask.sum(dim=1, keepdim=True)",
        ),
        (
            "grpo.py",
            "L off by one",
            "(max_len or length)",
            "(max_len or length + 1)",
        ),
        (
            "grpo.py",
            "log-probability unnormalised",
            "return chosen - logits.logsumexp(-1)",
            "return chosen - 0 * logits.logsumexp(-1)",
        ),
        (
            "grpo.py",
            "sign of the entropy",
            "return -(logprobs.exp() * finite)",
            "return (logprobs.exp() * finite)",
        ),
        (
            "grpo.py",
            "0 log 0 of the entropy",
            "finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)",
            "finite = logprobs",
        ),
        (
            "grpo.py",
            "off by one position",
            "[0] * (len(prompt) - 1) + trajectory.loss_mask + [0]",
            "[0] * len(prompt) + trajectory.loss_mask",
        ),
        (
            "grpo.py",
            "the oracle off by one position",
            "logits[len(trajectory.prompt_ids) - 1 : -1]",
            "logits[len(trajectory.prompt_ids) :]",
        ),
        (
            "grpo.py",
            "the decoder without a gradient",
            "        hidden.backward(leaf.grad)",
            "        hidden.backward(0 * leaf.grad)",
        ),
        (
            "grpo.py",
            "scale upside down",
            "(scale / divisor)",
            "(divisor / scale)",
        ),
        (
            "grpo.py",
            "step with zero norm taken",
            "if 0 < grad_norm < math.inf:",
            "if grad_norm < math.inf:",
        ),
        (
            "grpo.py",
            "step with infinite norm taken",
            "if 0 < grad_norm < math.inf:",
            "if grad_norm != 0:",
        ),
        (
            "grpo.py",
            "gradients stay after the step",
            "    optimizer.zero_grad()\n",
            "",
        ),
        (
            "grpo.py",
            "advantages per step, not group",
            "group_advantages(rewards).flatten()",
            "group_advantages(rewards.view(1, -1)).flatten()",
        ),
        (
            "grpo.py",
            "the norm ignored",
            "token_weights(loss_mask, norm=norm, max_len=max_len)",
            "token_weights(loss_mask)",
        ),
        (
            "grpo.py",
            "weights of other trajectories",
            "policy_tokens(batch, advantages[rows], weights[rows]",
            "policy_tokens(batch, advantages[rows], weights[: len(rows)]",
        ),
        (
            "ofsd.py",
            "forward is reverse",
            "terms = kl_terms(log_t, log_s)",
            "terms = kl_terms(log_s, log_t)",
        ),
        (
            "ofsd.py",
            "reverse is forward",
            "terms = kl_terms(log_s, log_t)",
            "terms = kl_terms(log_t, log_s)",
        ),
        (
            "ofsd.py",
            "sign of the divergence",
            "return log_p.exp() * log_ratio",
            "return -log_p.exp() * log_ratio",
        ),
        (
            "ofsd.py",
            "mixture not halved",
            "log_m = log_sum - math.log(2)",
            "log_m = log_sum",
        ),
        (
            "ofsd.py",
            "jsd lopsided",
            "0.5 * kl_terms(log_t, log_m) + 0.5",
            "0.4 * kl_terms(log_t, log_m) + 0.6",
        ),
        (
            "ofsd.py",
            "jsd of entries impossible for both",
            "torch.logaddexp(log_s.clamp(min=lowest), log_t.clamp(min=lowest))",
            "torch.logaddexp(log_s, log_t)",
        ),
        (
            "ofsd.py",
            "0 log 0",
            "absent = log_p == -torch.inf ",
            "absent = log_p == torch.inf ",
        ),
        (
            "ofsd.py",
            "teacher not detached",
            "teacher_logits.detach()",
            "teacher_logits",
        ),
        (
            "ofsd.py",
            "student detached",
            "torch.log_softmax(student_logits, dim=-1)",
            "torch.log_softmax(student_logits.detach() + 0 * student_logits, dim=-1)",
        ),
        (
            "ofsd.py",
            "entry clips from below",
            "terms.clamp(max=tau)",
            "terms.clamp(min=tau)",
        ),
        (
            "ofsd.py",
            "entry clips the sum",
            "terms.clamp(max=tau).sum(-1)",
            "terms.sum(-1).clamp(max=tau)",
        ),
        (
            "ofsd.py",
            "position without detach",
            "divergence.detach().clamp(min=tau)",
            "divergence.clamp(min=tau)",
        ),
        (
            "ofsd.py",
            "position clips small ones",
            "divergence.detach().clamp(min=tau)",
            "divergence.detach().clamp(max=tau)",
        ),
        (
            "ofsd.py",
            "mask ignored",
            "        student_logits[mask], teacher_logits[mask], kind",
            "        student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), kind",
        ),
        (
            "ofsd.py",
            "mask inverted",
            "mask = loss_mask.bool()",
            "mask = ~loss_mask.bool()",
        ),
        (
            "ofsd.py",
            "num_tokens ignored",
            "num_tokens=num_tokens, dtype",
            "dtype",
        ),
        (
            "machinery/adapters.py",
            "adapters begin at random",
            "zeros = linear.weight.new_zeros(linear.out_features, rank)",
            "zeros = torch.randn(linear.out_features, rank)",
        ),
        (
            "machinery/adapters.py",
            "one A for all layers",
            "manual_seed(seed)",
            "manual_seed(0)",
        ),
        (
            "machinery/adapters.py",
            "adapters beside other matrices",
            "if parameter.ndim > 1 and",
            "if parameter.ndim > 9 and",
        ),
        (
            "machinery/adapters.py",
            "merged by half",
            "adapter.linear.weight += 2 * adapter.B @ adapter.A",
            "adapter.linear.weight += adapter.B @ adapter.A",
        ),
        (
            "machinery/adapters.py",
            "adapters stay after the merge",
            "        setattr(parent, name, adapter.linear)\n",
            "",
        ),
        (
            "machinery/adapters.py",
            "adapters stay off",
            "            adapter.on = True\n",
            "            pass\n",
        ),
        (
            "ofsd.py",
            "teacher with adapters",
            "with torch.no_grad(), adapters_off(teacher):",
            "with torch.no_grad():",
        ),
        (
            "ofsd.py",
            "reads the teacher's prompt",
            " hidden = policy_hidden(model, students)",
            " hidden = policy_hidden(model, students, prompts)",
        ),
        (
            "ofsd.py",
            "divides by the micro-batch",
            "weights[rows][loss_mask[rows]]",
            "token_weights(loss_mask[rows])[loss_mask[rows]]",
        ),
        (
            "ofsd.py",
            "the decoder without a gradient",
            "        hidden.backward(leaf.grad)",
            "        hidden.backward(0 * leaf.grad)",
        ),
        (
            "ofsd.py",
            "step with infinite norm taken",
            "if 0 < grad_norm < math.inf:",
            "if grad_norm != 0:",
        ),
        (
            "ofsd.py",
            "gradients stay after the step",
            "    optimizer.zero_grad()\n",
            "",
        ),
        (
            "ofsd.py",
            "privileged prompt not shortened",
            "    best = privileged_ids(tokenizer, question, reference, budget=0)\n",
            "    return None\n",
        ),
        (
            "ofsd.py",
            "privileged prompt too short",
            "    while fails - fits > 1:",
            "    while fails - fits > 5:",
        ),
        (
            "ofsd.py",
            "room for the response ignored",
            "context_length(model) - len(student.response_ids)",
            "context_length(model)",
        ),
        (
            "ofsd.py",
            "max_tokens ignored",
            "room = min(max_tokens, ",
            "room = max(0, ",
        ),
        (
            "ofsd.py",
            "correct by reward",
            "correct = [exact_match(t.answer, answers) == 1 for t in group]",
            "correct = [reward > 0 for reward in group_rewards]",
        ),
        (
            "ofsd.py",
            "the student that differs least",
            "    wrong.sort(key=lambda t: difference(reference, t), reverse=True)",
            "    wrong.sort(key=lambda t: difference(reference, t))",
        ),
        (
            "ofsd.py",
            "right students first",
            "candidates = wrong + different",
            "candidates = different + wrong",
        ),
        (
            "train.py",
            "the control reads its own reference",
            "[*pairs[1:], pairs[0]]",
            "pairs",
        ),
        (
            "train.py",
            "an edge without support",
            'teacher["em_supported"] - student["em_supported"]',
            'teacher["em"] - student["em"]',
        ),
        (
            "train.py",
            "OFSD's adapters never merged",
            "    merge_adapters(run.model)\n\n\ndef mine_stage",
            "\n\ndef mine_stage",
        ),
        (
            "train.py",
            "GRPO's adapters never merged",
            "    merge_adapters(run.model)\n\n\ndef new_optimizer",
            "\n\ndef new_optimizer",
        ),
        (
            "train.py",
            "the learning rate one step ahead",
            "(round_number - 1) * config.grpo_steps + step - 1",
            "(round_number - 1) * config.grpo_steps + step",
        ),
        (
            "train.py",
            "one order in all passes",
            "order = run.rng.sample(pairs, len(pairs))",
            "order = pairs",
        ),
        (
            "machinery/run.py",
            "all ranks draw by one seed",
            "seed=self.rng.randrange(2**32) + rank()",
            "seed=self.rng.randrange(2**32)",
        ),
        (
            "machinery/run.py",
            "the test is sampled",
            "self.test_set, temperature=0.0, progress",
            "self.test_set, progress",
        ),
        (
            "machinery/run.py",
            "one order of questions for ever",
            "self.waiting += self.rng.sample(range(size), size)",
            "self.waiting += list(range(size))",
        ),
    )
]


def caught_by(folder: Path, mutant: Mutant) -> str:
    """The first test that fails with this mistake, or "". The file is put back."""
    file = folder / mutant.file
    text = file.read_text(encoding="utf-8")
    assert mutant.text in text, f"{mutant.file} no longer holds {mutant.text!r}"
    file.write_text(text.replace(mutant.text, mutant.wrong, 1), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *FILES[mutant.file]], cwd=folder, capture_output=True, text=True
    )
    file.write_text(text, encoding="utf-8")
    if done.returncode != 1:
        return ""
    for line in done.stdout.splitlines():
        if re.match("(FAILED|ERROR).*::", line):
            return line.split("::", 1)[1].split(" ")[0]
    return ""


def main() -> None:
    wanted = []
    for mutant in MUTANTS:
        description = f"{mutant.file} {mutant.mistake}"
        if not sys.argv[1:] or any(word in description for word in sys.argv[1:]):
            wanted.append(mutant)
    survivors = 0
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "results")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=ignored)
        for mutant in wanted:
            test = caught_by(copy, mutant)
            if not test:
                survivors += 1
            verdict = f"caught by {test}" if test else "SURVIVED"
            print(f"{mutant.file:22}{mutant.mistake:38}{verdict}", flush=True)
    print(f"{len(wanted)} mutants, {survivors} survived")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
