"""Do the tests notice? Breaks each loss in one small way at a time and runs its tests.

    python tests/mutate.py           # some eight minutes; exit status 1 if a mutant survives

A mutant is one replacement in a copy of the repository; it is caught if a test fails. The last
line counts. (Not collected by pytest: it runs pytest.)
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = {"grpo.py": ["tests/test_grpo.py", "tests/test_train.py"], "ofsd.py": ["tests/test_ofsd.py", "tests/test_train.py"], "train.py": ["tests/test_train.py"]}

MUTANTS = [  # file, what is broken, the line's text, what it becomes
    ("grpo.py", "ddof 0", "rewards.std(dim=1, keepdim=True)", "rewards.std(dim=1, keepdim=True, correction=0)"),
    ("grpo.py", "eps outside the sum", "(rewards.std(dim=1, keepdim=True) + eps)", "rewards.std(dim=1, keepdim=True)"),
    ("grpo.py", "mean over the whole batch", "rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
    ("grpo.py", "always divides by the deviation", "if by_std:", "if True:"),
    ("grpo.py", "rounding of equal rewards", "torch.where(equal, 0.0, centred)", "centred"),
    ("grpo.py", "sign of the loss", "losses = -torch.minimum", "losses = torch.minimum"),
    ("grpo.py", "clip on the wrong side", "torch.minimum(ratio * signal", "torch.maximum(ratio * signal"),
    ("grpo.py", "clip of one side only", "ratio.clamp(1 - clip_eps, 1 + clip_eps)", "ratio.clamp(max=1 + clip_eps)"),
    ("grpo.py", "no clip", "torch.minimum(ratio * signal, clipped * signal)", "(ratio * signal)"),
    ("grpo.py", "ratio upside down", "logprobs - old_logprobs, 0.0", "old_logprobs - logprobs, 0.0"),
    ("grpo.py", "ratio detached", "ratio = log_ratio.exp()", "ratio = log_ratio.exp().detach() + 0 * log_ratio"),
    ("grpo.py", "k3 upside down", "ref_logprobs - logprobs, 0.0", "logprobs - ref_logprobs, 0.0"),
    ("grpo.py", "k3 without its 1", "x.exp() - x - 1", "x.exp() - x"),
    ("grpo.py", "k3 detached", "losses + kl_coef * k3", "losses + kl_coef * k3.detach()"),
    ("grpo.py", "mask not applied", "losses = torch.where(inside, losses, 0.0)", "losses = losses + 0.0"),
    ("grpo.py", "denominator counts information", "losses.sum() / (num_tokens or count)", "losses.sum() / (num_tokens or losses.numel())"),
    ("grpo.py", "num_tokens ignored", "(num_tokens or count)", "count"),
    ("grpo.py", "a mean of means without the mask", "inside.sum(1).clamp(min=1)).mean()", "inside.shape[1]).mean()"),
    ("grpo.py", "L off by one", "(max_len or losses.shape[1])", "(max_len or losses.shape[1] + 1)"),
    ("grpo.py", "log-probability unnormalised", "[..., 0] - logits.logsumexp(-1)", "[..., 0] - 0 * logits.logsumexp(-1)"),
    ("grpo.py", "sign of the entropy", "return -logp.exp()", "return logp.exp()"),
    ("grpo.py", "off by one position", "(b, len(prompts[b]) + i - 1)", "(b, len(prompts[b]) + i)"),
    ("grpo.py", "only the last chunk's gradient", "torch.cat(gradients)", "torch.cat([0 * g for g in gradients[:-1]] + gradients[-1:])"),
    ("grpo.py", "scale upside down", 'getattr(config, "logit_scale", None) or 1.0) / (', 'getattr(config, "logit_scale", None) or 1.0) * ('),
    ("ofsd.py", "forward is reverse", "return term(log_t, log_s)", "return term(log_s, log_t)"),
    ("ofsd.py", "reverse is forward", "return term(log_s, log_t)", "return term(log_t, log_s)"),
    ("ofsd.py", "sign of the divergence", "log_p.masked_fill(absent, 0.0) - log_q", "log_q.masked_fill(absent, 0.0) - log_p"),
    ("ofsd.py", "mixture not halved", " - math.log(2)  # (N, V)", "  # (N, V)"),
    ("ofsd.py", "jsd lopsided", "0.5 * term(log_t, log_m) + 0.5", "0.4 * term(log_t, log_m) + 0.6"),
    ("ofsd.py", "0 log 0", "absent = log_p == -torch.inf ", "absent = log_p == torch.inf "),
    ("ofsd.py", "teacher not detached", "teacher_logits.detach()", "teacher_logits"),
    ("ofsd.py", "student detached", "torch.log_softmax(student_logits, dim=-1)", "torch.log_softmax(student_logits.detach() + 0 * student_logits, dim=-1)"),
    ("ofsd.py", "entry clips from below", "terms.clamp(max=tau)", "terms.clamp(min=tau)"),
    ("ofsd.py", "entry clips the sum", "terms = terms.clamp(max=tau)", "terms = terms.sum(-1, keepdim=True).clamp(max=tau)"),
    ("ofsd.py", "position without detach", "divergence.detach().clamp(min=tau)", "divergence.clamp(min=tau)"),
    ("ofsd.py", "position clips small ones", "clamp(min=tau)", "clamp(max=tau)"),
    ("ofsd.py", "mask ignored", "divergences(student_logits[inside], teacher_logits[inside]", "divergences(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)"),
    ("ofsd.py", "mask inverted", "inside = loss_mask.bool()", "inside = ~loss_mask.bool()"),
    ("ofsd.py", "denominator off by one", "max(len(divergence), 1))", "(len(divergence) + 1))"),
    ("ofsd.py", "num_tokens ignored", "(num_tokens or max(len(divergence), 1))", "max(len(divergence), 1)"),
    ("ofsd.py", "adapters begin at random", "torch.zeros(linear.out_features, rank", "torch.randn(linear.out_features, rank"),
    ("ofsd.py", "teacher with adapters", "        self.on = False\n", "        self.on = True\n"),
    ("ofsd.py", "merged by half", "linear.weight += 2 * (b @ a)", "linear.weight += (b @ a)"),
    ("ofsd.py", "hooks stay after the merge", "            hook.remove()\n", ""),
    ("ofsd.py", "reads the teacher's prompt", "hidden = policy_hidden(model, students)", "hidden = policy_hidden(model, students, prompts)"),
    ("ofsd.py", "divides by the micro-batch", ".sum() / num_tokens", ".mean()"),
    ("grpo.py", "advantages per step, not group", "group_advantages(rewards).flatten()", "group_advantages(rewards.view(1, -1)).flatten()"),
    ("train.py", "adapters never merged", "        adapters.merge()\n", "        pass\n"),
]  # fmt: skip


def main() -> None:
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "results"))
        for file, what, old, new in MUTANTS:
            text = (ROOT / file).read_text()
            assert text.count(old) >= 1, f"{file} no longer holds {old!r}"
            (copy / file).write_text(text.replace(old, new, 1))
            run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES[file]]
            done = subprocess.run(run, cwd=copy, capture_output=True, text=True)
            (copy / file).write_text(text)
            failed = [line.split("::", 1)[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
            survivors += done.returncode != 1 or not failed
            print(f"{file:9}{what:36}{'caught by ' + failed[0] if failed else 'SURVIVED'}", flush=True)
    print(f"{len(MUTANTS)} mutants, {survivors} survived")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
