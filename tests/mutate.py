"""Do the tests notice? Breaks one small thing at a time and runs the tests of its file.

    python tests/mutate.py              # all: a quarter of an hour; status 1 if one survives
    python tests/mutate.py clip ofsd    # those whose description or file holds one of these words

A mutant is one replacement in a copy of the repository; it is caught if a test, or a fixture of
one, fails. The last line counts. (Not collected by pytest: it runs pytest.)
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "retriever.py": ["tests/test_retriever.py"],
    "rollout.py": ["tests/test_rollout.py"],
    "grpo.py": ["tests/test_grpo.py", "tests/test_train.py", "tests/system/test_runs.py"],
    "ofsd.py": ["tests/test_ofsd.py", "tests/test_train.py", "tests/system/test_runs.py"],
    "train.py": ["tests/test_train.py", "tests/system/test_runs.py"],
}

MUTANTS = [  # file, what is broken, text in the file, what it becomes
    ("retriever.py", "multiplicity lost",
        "for word in words(query) if", "for word in set(words(query)) if"),
    ("retriever.py", "idf without its 1",
        "idf = np.log(1 + (size - df + 0.5)", "idf = np.log((size - df + 0.5)"),
    ("rollout.py", "only the rows are swapped",
        "cache.reorder(order)\n", "pass\n"),
    ("rollout.py", "only the cache is swapped",
        "rows[: len(order)] = [rows[i] for i in order]\n", "pass\n"),
    ("rollout.py", "lengths not swapped",
        "self.lengths[: len(order)] = [self.lengths[row] for row in order]\n", "pass\n"),
    ("rollout.py", "temperature ignored",
        "logits / (temperature or 1.0)", "logits"),
    ("rollout.py", "a word of probability 0",
        "cumulative[:, -1:], right=True)", "cumulative[:, -1:], right=False)"),
    ("rollout.py", "information counts as sampled",
        "[0 if logprobs is None else 1]", "[1]"),
    ("rollout.py", "turn_start not moved",
        "row.turn_start = len(row.response_ids)\n", "pass\n"),
    ("rollout.py", "one search too many",
        "len(row.queries) >= max_searches", "len(row.queries) > max_searches"),
    ("rollout.py", "an observation that does not fit",
        "row.full(more=len(ids))", "row.full()"),
    ("rollout.py", "padding is seen",
        "device=device) <= self.slots", "device=device) < self.used + 0 * self.slots"),
    ("rollout.py", "keys stay in float32",
        "new = new.to(values.dtype)", "new = new + 0"),
    ("rollout.py", "a character cut in two",
        "kept.pop()", "break"),
    ("rollout.py", "logits that are no numbers",
        "if any(map(math.isnan, values)):", "if False:"),
    ("rollout.py", "the longest is not cut first",
        "max(fit - 1, 0)", "max(room, 0) // len(lines)"),
    ("grpo.py", "ddof 0",
        "max(rewards.shape[1] - 1, 1)", "rewards.shape[1]"),
    ("grpo.py", "eps outside the sum",
        "(variance.sqrt() + eps)", "variance.sqrt()"),
    ("grpo.py", "mean over the whole batch",
        "rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
    ("grpo.py", "rounding of equal rewards",
        "torch.where(equal, 0.0, advantages)", "advantages"),
    ("grpo.py", "sign of the loss",
        "losses = -torch.minimum", "losses = torch.minimum"),
    ("grpo.py", "clip on the wrong side",
        "torch.minimum(rho * A", "torch.maximum(rho * A"),
    ("grpo.py", "clip of one side only",
        "rho.clamp(1 - clip_eps, 1 + clip_eps)", "rho.clamp(max=1 + clip_eps)"),
    ("grpo.py", "no clip",
        "torch.minimum(rho * A, clipped * A)", "(rho * A)"),
    ("grpo.py", "ratio upside down",
        "logprobs - old_logprobs, 0.0", "old_logprobs - logprobs, 0.0"),
    ("grpo.py", "ratio detached",
        "rho = log_rho.exp()", "rho = log_rho.exp().detach() + 0 * log_rho"),
    ("grpo.py", "k3 upside down",
        "ref_logprobs - logprobs, 0.0", "logprobs - ref_logprobs, 0.0"),
    ("grpo.py", "k3 without its 1",
        "x.exp() - x - 1", "x.exp() - x"),
    ("grpo.py", "k3 detached",
        "losses + kl_coef * k3", "losses + kl_coef * k3.detach()"),
    ("grpo.py", "a ratio that overflows",
        "old_logprobs, 0.0).clamp(max=80)", "old_logprobs, 0.0)"),
    ("grpo.py", "mask not applied",
        "losses = torch.where(mask, losses, 0.0)", "losses = losses + 0.0"),
    ("grpo.py", "denominator counts information",
        "losses.sum() / (num_tokens or count)", "losses.sum() / (num_tokens or losses.numel())"),
    ("grpo.py", "num_tokens ignored",
        "(num_tokens or count)", "count"),
    ("grpo.py", "a mean of means without the mask",
        "mask.sum(1).clamp(min=1)).sum()", "mask.shape[1]).sum()"),
    ("grpo.py", "L off by one",
        "(max_len or losses.shape[1])", "(max_len or losses.shape[1] + 1)"),
    ("grpo.py", "log-probability unnormalised",
        "[..., 0] - logits.logsumexp(-1)", "[..., 0] - 0 * logits.logsumexp(-1)"),
    ("grpo.py", "sign of the entropy",
        "return -(logp.exp() * finite)", "return (logp.exp() * finite)"),
    ("grpo.py", "0 log 0 of the entropy",
        "finite = logp.clamp(min=torch.finfo(logp.dtype).min)", "finite = logp"),
    ("grpo.py", "off by one position",
        "[0] * (len(p) - 1) + t.loss_mask + [0]", "[0] * len(p) + t.loss_mask"),
    ("grpo.py", "the oracle off by one position",
        "logits[len(trajectory.prompt_ids) - 1 : -1]", "logits[len(trajectory.prompt_ids) :]"),
    ("grpo.py", "only the last chunk's gradient",
        "torch.cat(gradients)", "torch.cat([0 * g for g in gradients[:-1]] + gradients[-1:])"),
    ("grpo.py", "scale upside down",
        "* (up / down)", "* (down / up)"),
    ("grpo.py", "step with zero norm taken",
        "if 0 < norm < math.inf:", "if norm < math.inf:"),
    ("grpo.py", "step with infinite norm taken",
        "if 0 < norm < math.inf:", "if norm != 0:"),
    ("grpo.py", "gradients stay after the step",
        "    optimizer.zero_grad()\n", ""),
    ("grpo.py", "advantages per step, not group",
        "group_advantages(rewards).flatten()", "group_advantages(rewards.view(1, -1)).flatten()"),
    ("ofsd.py", "forward is reverse",
        "terms = kl_terms(log_t, log_s)", "terms = kl_terms(log_s, log_t)"),
    ("ofsd.py", "reverse is forward",
        "terms = kl_terms(log_s, log_t)", "terms = kl_terms(log_t, log_s)"),
    ("ofsd.py", "sign of the divergence",
        "(log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0))",
        "(log_q.masked_fill(absent, 0.0) - log_p.masked_fill(absent, 0.0))"),
    ("ofsd.py", "mixture not halved",
        " - math.log(2)\n", "\n"),
    ("ofsd.py", "jsd lopsided",
        "0.5 * kl_terms(log_t, log_m) + 0.5", "0.4 * kl_terms(log_t, log_m) + 0.6"),
    ("ofsd.py", "jsd of words impossible for both",
        "torch.logaddexp(log_s.clamp(min=lowest), log_t.clamp(min=lowest))",
        "torch.logaddexp(log_s, log_t)"),
    ("ofsd.py", "0 log 0",
        "absent = log_p == -torch.inf ", "absent = log_p == torch.inf "),
    ("ofsd.py", "teacher not detached",
        "teacher_logits.detach()", "teacher_logits"),
    ("ofsd.py", "student detached",
        "torch.log_softmax(student_logits, dim=-1)",
        "torch.log_softmax(student_logits.detach() + 0 * student_logits, dim=-1)"),
    ("ofsd.py", "entry clips from below",
        "terms.clamp(max=tau)", "terms.clamp(min=tau)"),
    ("ofsd.py", "entry clips the sum",
        "terms.clamp(max=tau).sum(-1)", "terms.sum(-1).clamp(max=tau)"),
    ("ofsd.py", "position without detach",
        "divergence.detach().clamp(min=tau)", "divergence.clamp(min=tau)"),
    ("ofsd.py", "position clips small ones",
        "divergence.detach().clamp(min=tau)", "divergence.detach().clamp(max=tau)"),
    ("ofsd.py", "mask ignored",
        "divergences(student_logits[mask], teacher_logits[mask]",
        "divergences(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)"),
    ("ofsd.py", "mask inverted",
        "mask = loss_mask.bool()", "mask = ~loss_mask.bool()"),
    ("ofsd.py", "denominator off by one",
        "max(len(divergence), 1))", "(len(divergence) + 1))"),
    ("ofsd.py", "num_tokens ignored",
        "(num_tokens or max(len(divergence), 1))", "max(len(divergence), 1)"),
    ("ofsd.py", "adapters begin at random",
        "linear.weight.new_zeros(linear.out_features, rank)",
        "torch.randn(linear.out_features, rank)"),
    ("ofsd.py", "one A for all layers",
        "manual_seed(seed)", "manual_seed(0)"),
    ("ofsd.py", "adapters beside other matrices",
        "if parameter.ndim > 1 and", "if parameter.ndim > 9 and"),
    ("ofsd.py", "teacher with adapters",
        "LoRA.on = False  # the", "pass  # the"),
    ("ofsd.py", "student without adapters",
        "        LoRA.on = True", "        pass"),
    ("ofsd.py", "merged by half",
        "lora.linear.weight += 2 * lora.B @ lora.A", "lora.linear.weight += lora.B @ lora.A"),
    ("ofsd.py", "adapters stay after the merge",
        "        setattr(parent, name, lora.linear)\n", ""),
    ("ofsd.py", "reads the teacher's prompt",
        " hidden = policy_hidden(model, students)",
        " hidden = policy_hidden(model, students, prompts)"),
    ("ofsd.py", "divides by the micro-batch",
        ".sum() / max(num_tokens, 1)", ".mean()"),
    ("ofsd.py", "privileged prompt not shortened",
        "return write(fits - 1) if fits else None", "return None"),
    ("ofsd.py", "privileged prompt too short",
        "return write(fits - 1) if fits", "return write(max(fits - 2, 0)) if fits"),
    ("ofsd.py", "room for the response ignored",
        "context_length(model) - len(student.response_ids)", "context_length(model)"),
    ("ofsd.py", "max_tokens ignored",
        "room = min(max_tokens, ", "room = max(0, "),
    ("train.py", "the control reads its own reference",
        "pairs[1:] + pairs[:1]", "pairs"),
    ("train.py", "an edge without support",
        'teacher["em_supported"] - student["em_supported"]', 'teacher["em"] - student["em"]'),
    ("train.py", "OFSD's adapters never merged",
        "        merge_adapters(run.model)\n", "        pass\n"),
    ("train.py", "GRPO's adapters never merged",
        "\n    merge_adapters(run.model)\n", "\n"),
]  # fmt: skip


def main() -> None:
    asked, survivors = sys.argv[1:], 0
    wanted = [m for m in MUTANTS if not asked or any(word in f"{m[0]} {m[1]}" for word in asked)]
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "results")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=ignored)
        for file, what, old, new in wanted:
            text = (copy / file).read_text()
            assert old in text, f"{file} no longer holds {old!r}"
            (copy / file).write_text(text.replace(old, new, 1))
            run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
            done = subprocess.run([*run, *FILES[file]], cwd=copy, capture_output=True, text=True)
            (copy / file).write_text(text)
            lines = done.stdout.splitlines()
            failed = [line for line in lines if re.match("(FAILED|ERROR).*::", line)]
            caught = done.returncode == 1 and failed
            survivors += not caught
            how = f"caught by {failed[0].split('::', 1)[1].split(' ')[0]}" if caught else "SURVIVED"
            print(f"{file:13}{what:36}{how}", flush=True)
    print(f"{len(wanted)} mutants, {survivors} survived")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
