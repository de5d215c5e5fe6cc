"""Do the tests notice? Breaks one small thing at a time and runs the tests of its file.

    python -m tests.mutate              # all: an hour or more; status 1 if one survives
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
    "train.py": [
        "tests/test_stages.py",
        "tests/test_train.py",
        "tests/system/test_runs.py",
    ],
    "machinery/adapters.py": ["tests/test_adapters.py", "tests/test_ofsd_step.py"],
    "machinery/benchmarks.py": ["tests/test_questions.py", "tests/test_eval.py"],
    "machinery/devices.py": ["tests/test_devices.py"],
    "machinery/hints.py": ["tests/test_hints.py"],
    "machinery/json_lines.py": ["tests/test_files.py"],
    "machinery/metrics.py": ["tests/test_tables.py"],
    "machinery/models.py": ["tests/test_models.py"],
    "machinery/passages.py": ["tests/test_files.py"],
    "machinery/questions.py": ["tests/test_questions.py"],
    "machinery/ranks.py": ["tests/test_run.py"],
    "machinery/records.py": ["tests/test_records.py"],
    "machinery/remote.py": ["tests/test_remote.py"],
    "machinery/run.py": [
        "tests/test_run.py",
        "tests/test_train.py",
        "tests/system/test_runs.py",
    ],
    "machinery/saved_index.py": ["tests/test_saved_index.py"],
    "machinery/settings.py": ["tests/test_settings.py", "tests/test_train.py"],
    "machinery/tables.py": ["tests/test_tables.py"],
    "machinery/terminal.py": ["tests/test_terminal.py"],
    "machinery/text.py": ["tests/test_rollout.py", "tests/test_families.py"],
    "machinery/token_statistics.py": ["tests/test_tables.py"],
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
            "machinery/devices.py",
            "frozen weights rounded for each token",
            "        weight.requires_grad_(True)\n",
            "        pass\n",
        ),
        (
            "machinery/devices.py",
            "frozen weights trained after sampling",
            "            weight.requires_grad_(False)\n",
            "            pass\n",
        ),
        (
            "machinery/models.py",
            "norms without their weights",
            "                fused.weight = norm.weight\n",
            "",
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
        (
            "eval.py",
            "letter case stays",
            "text.lower().translate",
            "text.translate",
        ),
        (
            "eval.py",
            "articles leave no space",
            'ARTICLES.sub(" ", text)',
            'ARTICLES.sub("", text)',
        ),
        (
            "eval.py",
            "a word that both have twice is one",
            "(answer_words & golden_words).total()",
            "len(answer_words & golden_words)",
        ),
        (
            "eval.py",
            "a title supports nothing",
            'f"{passage.title} {passage.text}"',
            "passage.text",
        ),
        (
            "eval.py",
            "an empty answer is supported",
            "    if not answer:\n        return False\n",
            "",
        ),
        (
            "eval.py",
            "10-hop before 2-hop",
            "sorted(ems_by_kind, key=by_number)",
            "sorted(ems_by_kind)",
        ),
        (
            "eval.py",
            "who has searched has answered",
            "trajectory.answer is not None for",
            "bool(trajectory.queries) for",
        ),
        (
            "eval.py",
            "the seed is not passed on",
            "        seed=seed,\n",
            "",
        ),
        (
            "eval.py",
            "the interval of F1",
            'interval(result["em"], result["n"])',
            'interval(result["f1"], result["n"])',
        ),
        (
            "eval.py",
            "results are kept at the end only",
            "            if flags.out:  # after",
            "        if flags.out:  # after",
        ),
        (
            "eval.py",
            "a file is tried too late",
            "        check_out(flags.out)\n",
            "        pass\n",
        ),
        (
            "machinery/benchmarks.py",
            "trying a file empties it",
            'with open(path, "a"):',
            'with open(path, "w"):',
        ),
        (
            "machinery/benchmarks.py",
            "a file that was tried stays",
            "    if is_new:\n",
            "    if False:\n",
        ),
        (
            "machinery/benchmarks.py",
            "the limit is ignored",
            "[: flags.limit]",
            "[:]",
        ),
        (
            "machinery/benchmarks.py",
            "packed before plain",
            "packed.is_file() and not path.is_file()",
            "packed.is_file()",
        ),
        (
            "machinery/benchmarks.py",
            "the limits of training are forgotten",
            'tokenizer.init_kwargs.get("search_limits", {})',
            "{}",
        ),
        (
            "machinery/benchmarks.py",
            "0 searches are no wish",
            "    if flags.max_searches is not None:\n        limits",
            "    if flags.max_searches:\n        limits",
        ),
        (
            "machinery/questions.py",
            "times stay as they are",
            "to_question(plain_values(row))",
            "to_question(row)",
        ),
        (
            "machinery/questions.py",
            "a number for each id",
            'str(question.get("id", number))',
            "str(number)",
        ),
        (
            "machinery/questions.py",
            "leaks by other letters pass",
            "if normalize(text) in test_texts",
            "if text in test_texts",
        ),
        (
            "machinery/questions.py",
            "the last set alone is trained on",
            "training_questions += questions",
            "training_questions = questions",
        ),
        (
            "machinery/questions.py",
            "an answer of spaces",
            "isinstance(value, str) and value.strip() for",
            "isinstance(value, str) for",
        ),
        (
            "machinery/tables.py",
            "an interval of 2 deviations",
            "z = 1.96",
            "z = 2.0",
        ),
        (
            "machinery/tables.py",
            "the last test is the second one",
            "answers[-n:]",
            "answers[n : 2 * n]",
        ),
        (
            "machinery/tables.py",
            "what became wrong is shown",
            "gain > best_gain",
            "gain < best_gain",
        ),
        (
            "machinery/tables.py",
            "cells by their place",
            'row.get(name, "") for name in names',
            "value for value in row.values()",
        ),
        (
            "machinery/tables.py",
            "rounding leaves the share outside",
            "low = min(share, max(0.0, (centre - half_width) / scale))",
            "low = max(0.0, (centre - half_width) / scale)",
        ),
        (
            "machinery/metrics.py",
            "letter case makes another query",
            "query.lower() for",
            "query for",
        ),
        (
            "machinery/metrics.py",
            "equal across questions",
            "rewards[:, :1]",
            "rewards[:1, :]",
        ),
        (
            "machinery/devices.py",
            "emulated bfloat16",
            "including_emulation=False",
            "including_emulation=True",
        ),
        (
            "machinery/devices.py",
            "a caller's autocast is ended",
            "return contextlib.nullcontext()",
            "return torch.autocast(device, enabled=False)",
        ),
        (
            "machinery/adapters.py",
            "adapters beside the head, too",
            "for parent in model.base_model.modules():",
            "for parent in model.modules():",
        ),
        (
            "machinery/remote.py",
            "pauses do not grow",
            "self.pause * 2 ** (attempt - 2)",
            "self.pause",
        ),
        (
            "machinery/remote.py",
            "one attempt too few",
            "range(1, self.retries + 2)",
            "range(1, self.retries + 1)",
        ),
        (
            "machinery/remote.py",
            "429 is a refusal",
            " and error.code != 429",
            "",
        ),
        (
            "machinery/remote.py",
            "more than k passages",
            "for hit in hits[:k]",
            "for hit in hits",
        ),
        (
            "machinery/remote.py",
            "a server may drip",
            "within(self.timeout, post, self.url, body, self.timeout)",
            "post(self.url, body, self.timeout)",
        ),
        (
            "machinery/remote.py",
            "a redirect loses the request",
            "Request(url, request.data, request.headers)",
            "Request(url)",
        ),
        (
            "machinery/remote.py",
            "the thread keeps the script",
            "daemon=True",
            "daemon=False",
        ),
        (
            "machinery/saved_index.py",
            "not on the disk when it is named",
            "    os.fsync(file.fileno())",
            "    ()",
        ),
        (
            "machinery/saved_index.py",
            "a longer file is taken",
            'if len(content) != head["size"]',
            'if len(content) < head["size"]',
        ),
        (
            "machinery/saved_index.py",
            "another's save is removed",
            "> DAY:",
            "> 0:",
        ),
        (
            "machinery/saved_index.py",
            "all save under one name",
            "{uuid.uuid4().hex}.new",
            "one.new",
        ),
        (
            "machinery/saved_index.py",
            "a strided array as it lies",
            "np.ascontiguousarray(array)",
            "array.base if array.base is not None else array",
        ),
        (
            "machinery/terminal.py",
            "the status of Ctrl-C",
            "end(error, 130)",
            "end(error, 2)",
        ),
        (
            "machinery/terminal.py",
            "text may turn around",
            '.startswith("C")',
            '== "Cc"',
        ),
        (
            "machinery/terminal.py",
            "half a line is lost in silence",
            "        main()\n        sys.stdout.flush()\n",
            "        main()\n",
        ),
        (
            "machinery/json_lines.py",
            "lines are counted from 0",
            "enumerate(file, start=1)",
            "enumerate(file)",
        ),
        (
            "machinery/json_lines.py",
            "a byte-order mark is text",
            "utf-8-sig",
            "utf-8",
        ),
        (
            "machinery/json_lines.py",
            "an empty file is a set",
            "        if empty:\n",
            "        if False:\n",
        ),
        (
            "machinery/passages.py",
            "titles keep their quotation marks",
            're.sub(r\'^"(.*)"$\', r"\\1", title.strip())',
            "title.strip()",
        ),
        (
            "machinery/settings.py",
            "0 is always taken",
            "(value == 0 and zero)",
            "value == 0",
        ),
        (
            "machinery/settings.py",
            "True is a number",
            "good = type(value) is item.type",
            "good = isinstance(value, item.type)",
        ),
        (
            "machinery/settings.py",
            "the file wins over the flags",
            "return replace(config, **flags), False",
            "return config, False",
        ),
        (
            "machinery/hints.py",
            "told at every step",
            "if len(history) != HOPELESS_STEPS:",
            "if len(history) < HOPELESS_STEPS:",
        ),
        (
            "machinery/ranks.py",
            "every device does all",
            "items[rank() :: rank_count()]",
            "items[:]",
        ),
        (
            "machinery/token_statistics.py",
            "the gap of the last chunk",
            "max(self.largest_gap, gap)",
            "gap",
        ),
        (
            "machinery/token_statistics.py",
            "a sum of KLs",
            "sum(part.kl for part in ranks) / tokens",
            "sum(part.kl for part in ranks)",
        ),
        (
            "machinery/run.py",
            "questions left over are lost",
            "self.waiting = self.waiting[count:]",
            "self.waiting = []",
        ),
        (
            "machinery/run.py",
            "the last questions go to nobody",
            "math.ceil(len(questions)",
            "math.floor(len(questions)",
        ),
        (
            "machinery/run.py",
            "prompts of other questions",
            "            prompts = prompts[share]\n",
            "            prompts = prompts[: len(questions[share])]\n",
        ),
        (
            "machinery/run.py",
            "saved one step late",
            "step % self.config.save_every == 0",
            "step % self.config.save_every == 1",
        ),
        (
            "machinery/run.py",
            "lines after the checkpoint stay",
            "file.truncate(sizes.get(name, 0))",
            "file.truncate(path.stat().st_size)",
        ),
        (
            "machinery/run.py",
            "a torn log is taken",
            " or path.stat().st_size < size",
            "",
        ),
        (
            "machinery/run.py",
            "every stage goes on there",
            'if saved.get("stage") != stage or',
            'if "stage" not in saved or',
        ),
        (
            "machinery/run.py",
            "observations count as sampled",
            "sum(sum(t.loss_mask) for t in everyones)",
            "sum(len(t.loss_mask) for t in everyones)",
        ),
        (
            "machinery/records.py",
            "a group without variance is kept",
            "if len(set(group_rewards)) > 1:",
            "if group_rewards:",
        ),
        (
            "machinery/records.py",
            "the tokens that the student prefers",
            "p_t.topk(3)",
            "p_s.topk(3)",
        ),
        (
            "machinery/run.py",
            "a name is no part of the weights",
            "zlib.crc32(name.encode(), value)",
            "value",
        ),
        (
            "train.py",
            "one rate a round",
            "(config.rounds * config.grpo_steps)",
            "config.grpo_steps",
        ),
        (
            "train.py",
            "the gap after the updates",
            'updates[0]["logprob_gap"]',
            'updates[-1]["logprob_gap"]',
        ),
        (
            "train.py",
            "the last step is made again",
            "range(steps_done + 1, config",
            "range(max(steps_done, 1), config",
        ),
        (
            "train.py",
            "weights decay",
            "lr=lr, weight_decay=0.0",
            "lr=lr",
        ),
        (
            "train.py",
            "the penalty without its policy",
            "ref_model=run.ref_model,",
            "ref_model=None,",
        ),
        (
            "train.py",
            "the teacher learns, too",
            "teacher = frozen_copy(run.model)",
            "teacher = run.model",
        ),
        (
            "train.py",
            "the cap of the clip ignored",
            "            tau=config.tau,\n",
            "",
        ),
        (
            "train.py",
            "the rest of a pass is dropped",
            "range(0, len(order), config",
            "range(0, len(order) - config.ofsd_batch + 1, config",
        ),
        (
            "train.py",
            "an edge of nothing is enough",
            'edges["edge_supported"] <= 0',
            'edges["edge_supported"] < 0',
        ),
        (
            "train.py",
            "an edge on every pair",
            "if not first or pair.question is not first[-1].question:",
            "if pair:",
        ),
        (
            "train.py",
            "questions in their order",
            "run.rng.sample(run.train_set, count)",
            "run.train_set[:count]",
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
            print(f"{mutant.file:31}{mutant.mistake:38}{verdict}", flush=True)
    print(f"{len(wanted)} mutants, {survivors} survived")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
