"""Change one line at a time, and see whether the tests notice.

    python bench/mutate.py [--only=WORD] [--workers=2] [--check=0]

Each edit below is a mistake that somebody could make. It is made in a copy of the tracked files,
where the tests that cover the file then run until one fails. An edit that no test notices survives:
it is printed, and a test is missing. The tests must pass without an edit, which is checked first.
The check also tells which tests are the fastest; they then come first. --check=0 skips it.
"""

import ast
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import ROOT, flags, record

# File: {names of tests: [(before, after), ...]}. A text before must occur in the file once.
EDITS = {
    "gpt.py": {
        "training settings": [
            # Dropout, seeds and rows
            ("dropout_seed(self.settings.seed, row))", "dropout_seed(self.settings.seed, 0))"),
            ("dropout_seed(self.settings.seed, row))", "dropout_seed(0, row))"),
            ("dropout_seed(self.settings.seed, row))", "dropout_seed(self.settings.seed, first))"),
            ("np.random.SeedSequence((seed, row))", "np.random.SeedSequence(seed + row)"),
            ("    torch.manual_seed(settings.seed)\n    if state", "    if state"),
            ("first_row + self.machine.rank * self.rows_per_process", "first_row"),
            ("progress.next_row += trainer.rows_per_step", "progress.next_row += 1"),
            ("float(w.sum()) / weight)", "1 / len(micro_batches))"),
            ("weight = self.machine.mean(batch[2].sum())", "weight = batch[2].sum()"),
            ("{following: self.read_rows(following)}", "{following: self.read_rows(first)}"),
            # Evaluation
            ("        model.train(was_training)\n", "        pass\n"),
            ("    was_training = model.training\n    model.eval()", "    was_training = True"),
            (
                "np.linspace(0, end - 1, min(n_batches, end))",
                "np.arange(min(n_batches, end), dtype=float)",
            ),
            (
                "            with machine.autocast():\n                _, loss = model(x, y, weights=w",
                "            if True:\n                _, loss = model(x, y, weights=w",
            ),
            ("@torch.no_grad()\ndef evaluate(", "def evaluate("),
            (
                "evaluate(trainer.eval_model, data, machine, n_batches",
                "evaluate(trainer.wrapped_model, data, machine, n_batches",
            ),
            ("nats += loss.item() * batch_weight", "nats += loss.item()"),
            ("return nats / weight\n", "return nats / max(1, weight)\n"),
            (
                "    drawn = [int(next_id) for next_id in drawn]\n    model.train()",
                "    drawn = [int(next_id) for next_id in drawn]",
            ),
            # The loop
            (
                "if val_loss < progress.best_val_loss and",
                "if val_loss <= progress.best_val_loss and",
            ),
            (
                "if progress.step > 0:\n                progress.stale += 1",
                "if True:\n                progress.stale += 1",
            ),
            ("(progress.step > 0 or finished)", "True"),
            ("                progress.stale = 0\n", ""),
            (
                "if 0 < settings.early_stop <= progress.stale",
                "if 0 < settings.early_stop < progress.stale",
            ),
            (
                "lr_decay_iters and not settings.max_minutes:\n            schedule",
                "lr_decay_iters:\n            schedule",
            ),
            (
                "schedule_done = min(1, progress.step / settings.lr_decay_iters)",
                "schedule_done = progress.step / settings.lr_decay_iters",
            ),
            (
                "set_learning_rates(trainer.optimizers, scale)",
                "set_learning_rates(trainer.optimizers[:1], scale)",
            ),
            ("            clock.exclude(time.monotonic() - pause_began)\n", ""),
            ("progress.trained_s = clock.trained_s()", "progress.trained_s = clock.spent_s()"),
            (
                "progress.reserve_s = 2 * pause_s + eval_s * more_batches",
                "progress.reserve_s = 0.0",
            ),
            ("log(val_loss=val_loss)", "log()"),
            # Updates
            ('            self.scaler.load_state_dict(state["scaler"])', "            pass"),
            ("        if math.isfinite(norm):  # the", "        if True:  # the"),
            ("            self.scaler.unscale_(o)\n        most", "            pass\n        most"),
            ("most = self.settings.grad_clip or math.inf", "most = math.inf"),
            ("most = self.settings.grad_clip or math.inf", "most = self.settings.grad_clip"),
            ("        loss = loss * share\n", ""),
            ("o.zero_grad()\n        x, y, w", "pass\n        x, y, w"),
            ("if is_first:\n", "if True:\n"),
            (
                "elif self.machine.fsdp:\n            self.model.set_requires_gradient_sync(now)",
                "elif False:\n            pass",
            ),
            ("self.wrapped_model = plain_model\n", "pass\n"),
            ('groups = o.state_dict()["param_groups"]\n', 'groups = saved["param_groups"]\n'),
            (
                'path = run_folder(settings, folder) / "best.pt"',
                'path = run_folder(settings, folder) / "ckpt.pt"',
            ),
            ("max(1.0, trained + self.left_s())", "max(1e-9, trained + self.left_s())"),
            ("os.fsync(file.fileno())", "pass"),
            ("while not self.micro_batch_fits():", "while False:"),
            ("for _ in range(2)]\n        try", "for _ in range(0)]\n        try"),
        ],
        "faults": [
            ("        part.replace(path)\n    except", "        part.unlink()\n    except"),
            ("line[name] = None  # JSON", "pass  # JSON"),
            ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
            (
                "if not resumed:\n            keep_earlier_files(out)",
                "if False:\n            keep_earlier_files(out)",
            ),
            (
                "            if out_of_memory(e):\n                return  # get_ready",
                "            if False:\n                return  # get_ready",
            ),
            ("bad_steps = 0\n        else", "pass\n        else"),
            ("failing = bad_steps > settings.max_bad_steps", "failing = bad_steps > 10**9"),
            ("progress.best_val_loss = math.inf\n\n", "pass\n\n"),
        ],
        "optimizer training": [
            ("min_lr / settings.learning_rate\n", "min_lr\n"),
            ("(step + 1) / (settings.warmup_iters + 1)", "step / (settings.warmup_iters + 1)"),
            ("min(1, 5 * (1 - share_done))", "min(1, 4 * (1 - share_done))"),
            ("return warm * (lowest + (1 - lowest) * shapes", "return warm * (lowest + shapes"),
            ('"initial_lr": lr})\n    return groups', '"initial_lr": 0.02})\n    return groups'),
            ("scale = max(1, rows / cols) ** 0.5", "scale = 1"),
            ('updates.split(group["parts"], dim=1)', "[updates]"),
            ('grad.lerp(mean, group["momentum"])', "mean.clone()"),
            ('1 - group["lr"] * group["weight_decay"])', '1 - group["weight_decay"])'),
            ("torch._foreach_mul_(params, 1 -", "torch._foreach_mul_(params, 1 +"),
            (
                'torch._foreach_lerp_(means, grads, 1 - group["momentum"])',
                'torch._foreach_lerp_(means, grads, group["momentum"])',
            ),
            ("range(0, len(params), n)", "range(0, n, n)"),
            ("for _ in range(5):\n        A", "for _ in range(4):\n        A"),
            ("X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)", "X = X / (X.norm() + 1e-7)"),
            (
                '[p for p in rest if p.ndim < 2], "weight_decay": 0.0',
                '[p for p in rest if p.ndim < 2], "weight_decay": decay',
            ),
        ],
        "model generation": [
            (
                "logits = logits / config.train_temperature",
                "logits = logits * config.train_temperature",
            ),
            ("if training and config.train_temperature != 1", "if config.train_temperature != 1"),
            ("targets.clamp(min=0), reduction", "targets.clamp(min=1), reduction"),
            ("weights = (targets >= 0) * ", "weights = (targets > 0) * "),
            ("weights.sum().clamp(min=1e-6)", "weights.sum().clamp(min=2)"),
            ("dtype = torch.float32 if exact else x.dtype", "dtype = x.dtype"),
            ("grad_x * grad, grad_head * grad", "grad_x, grad_head"),
            ('LOGITS_AT_ONCE = {"cpu": 2**25', 'LOGITS_AT_ONCE = {"cpu": 2**60'),
            (
                "            x = x.to(dtype)\n        x = self.drop(x)",
                "            pass\n        x = self.drop(x)",
            ),
            (
                "if dtype == torch.bfloat16:  # the residual",
                "if dtype != torch.float32:  # the residual",
            ),
            ("        x = self.drop(x)\n        rotary", "        rotary"),
            ("x = x + self.drop(self.mlp(", "x = x + (self.mlp("),
            ("x = x + self.drop(self.attn(", "x = x + (self.attn("),
            ("return super().forward(x.mT).mT", "return F.dropout(x, self.p, self.training)"),
            (
                'dtype = torch.float32 if device.type == "cpu" else self.ln_f.weight.dtype',
                "dtype = self.ln_f.weight.dtype",
            ),
            ("return distances >= 0\n", "return distances > -2\n"),
            (
                "block_size // 2 + 1 + (n - block_size - 1) %",
                "block_size // 2 + (n - block_size - 1) %",
            ),
            ("any(now <= then for", "any(now < then - 1 for"),
            ("cache.pos.copy_(lengths)  # forgets", "pass  # forgets"),
            ("before < top_p", "before <= top_p"),
            ("(probs >= min_p * probs[:, :1])", "(probs >= min_p)"),
            (
                "k = min(top_k or logits.size(-1), logits.size(-1))",
                "k = min(top_k + 1 or 1, logits.size(-1))",
            ),
            ("exponential_(generator=generator)", "exponential_()"),
            ("alpha=d**-0.5", "alpha=1.0"),
            ("triu(1 + start)", "triu(2 + start)"),
            ("config.rope_theta**-exponents", "config.rope_theta**exponents"),
            (
                "proj_std = 0.02 / math.sqrt(2 * self.config.n_layer) if tied else 0.0",
                "proj_std = 0.02",
            ),
            (
                "nn.init.normal_(embedding.weight, std=0.01 if tied else 0.3)",
                "nn.init.normal_(embedding.weight)",
            ),
            ("+ 12 * self.n_layer * channels", "+ 6 * self.n_layer * channels"),
            ("+ self.vocab_size * self.n_embd\n        return 6", "\n        return 6"),
            ("hidden = F.silu(gate) * up", "hidden = F.silu(up) * gate"),
            ('approximate="tanh"', 'approximate="none"'),
        ],
        "data training": [
            ("np.random.default_rng((self.seed, epoch))", "np.random.default_rng(self.seed)"),
            ("np.random.default_rng((self.seed, epoch))", "np.random.default_rng(epoch)"),
            ("offset = int(rng.integers(n_offsets))", "offset = 0"),
            ("w *= ~example_ended * ", "w *= "),
            (
                "np.arange(self.block_size + 1)\n        inside",
                "np.arange(self.block_size + 1) + 1\n        inside",
            ),
            ("w = inside[:, 1:]", "w = inside[:, :-1]"),
            ("if sums[last + 1] > sums[start + 1]", "if sums[last + 1] > sums[start]"),
        ],
        "fitting training": [
            (
                "share = max(share, epochs / self.settings.max_epochs)",
                "share = epochs / self.settings.max_epochs",
            ),
            ("1.05e6 * (flops / 2e13) ** 0.47", "1.05e6 * (flops / 2e13) ** 0.9"),
            ("min(best_size(flops), 3 * n_tokens)", "best_size(flops)"),
            ("epochs = min(epochs, settings.max_epochs)", "pass"),
            (
                'return min(UNFITTED["block_size"], state',
                'return max(UNFITTED["block_size"], state',
            ),
        ],
    },
    "sample.py": {
        "sample chat generation": [
            ("torch.where(logits > 0, logits / penalty, logits * penalty)", "logits / penalty"),
            ("seen.scatter_(1, drawn[:, None], True)", "pass"),
            (
                "        if token in ends:\n            break",
                "        if False:\n            break",
            ),
            ("yield text[: min(found)]", "yield text[: max(found)]"),
            ("beginnings = [s[:n] for s in stop for n in range(len(s))]", "beginnings = []"),
            ("turns = turns[2:]", "turns = turns[1:]"),
            ("abs().amax(1).clamp(min=1e-12) / 127", "abs().amax(1).clamp(min=1e-12) / 128"),
            ("return best if best in found else newest", "return newest"),
        ],
    },
    "extras/chat.py": {
        "chat sample": [
            ("sorted(tokenizer.special_tokens, reverse=True)", "sorted(tokenizer.special_tokens)"),
            ("parts += [(before, True), (text, False)", "parts += [(before, True), (text, True)"),
            ("    return with_begin(tokenizer, encode_parts(", "    return (encode_parts("),
            ("prompt, ids[: ids.index(tokenizer.end_id) + 1]", "prompt, ids"),
            ("prompt, [*ids, tokenizer.end_id]", "prompt, ids"),
        ],
    },
    "evaluate.py": {
        "evaluate": [
            ("weights[rows > 0, :n_seen] = 0", "weights[:, :n_seen] = 0"),
            ("np.arange(0, n - 1 - n_seen, stride)", "np.arange(0, n - n_seen, stride)"),
            ("nats += float(loss) * weight", "nats += float(loss) * len(x)"),
            ("    model.eval()\n    for batch", "    for batch"),
        ],
    },
    "extras/lora.py": {
        "lora finetune": [
            ("/ math.sqrt(columns))", ")"),
            ("    scale = 2.0", "    scale = 1.0"),
            ("    model.requires_grad_(False)\n    for", "    for"),
            ('if name.startswith("h.") and type(module)', "if type(module)"),
        ],
    },
    "extras/fsdp.py": {
        "distributed": [
            ("MixedPrecisionPolicy(dtype, torch.float32", "MixedPrecisionPolicy(dtype, dtype"),
            ("for part in (*model.h, model)", "for part in (model,)"),
        ],
    },
    "extras/bpe.py": {
        "bpe": [
            ("if n_now > 0:\n", "if n_now > 1:\n"),
            ("if token not in ids:", "if True:"),
            ("self.pair_counts[old_pair] -= count", "self.pair_counts[old_pair] -= 1"),
        ],
    },
    "hub.py": {
        "hub": [
            ("if window and window < block_size:", "if window and window > block_size:"),
            ('**(values.get("rope_scaling") or {}),', ""),
            ('"activation_function": "gelu_new"', '"activation_function": "gelu"'),
            ('"rope_theta": config.rope_theta,', ""),
        ],
    },
}


class Copy:
    """A copy of the tracked files in which edits are made and undone."""

    def __init__(self, folder):
        self.folder = Path(folder)
        names = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split("\n")
        for name in filter(None, names):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, target)

    def failing_test(self, tests, order=None):
        """Return the first line that reports a failing test, or "" if all pass.

        order: {tests: the names of the single tests, in the order in which to run them}.
        """
        files = [f"tests/test_{name}.py" for name in tests.split()]
        names = (order or {}).get(tests, files)
        command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider"]
        try:
            result = subprocess.run(
                [*command, "--durations=0", "-vv", *names],
                check=False,
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=900,
            )
        except subprocess.TimeoutExpired:
            return "no end after 900 s"
        lines = result.stdout.splitlines()
        if result.returncode == 0:
            self.seconds = durations(lines)
            return ""
        return next((x for x in lines if x.startswith(("FAILED", "ERROR"))), lines[-1])

    def try_edit(self, file, tests, before, after, order):
        """Return what failing_test returns after an edit, and undo the edit."""
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(before, after), encoding="utf-8")
        try:
            return self.failing_test(tests, order)
        finally:
            path.write_text(text, encoding="utf-8")


def durations(lines):
    """Return {name of a test: its seconds} by what pytest --durations=0 -vv printed."""
    seconds = {}
    for line in lines:
        found = re.fullmatch(r"([\d.]+)s (?:setup|call|teardown) +(tests/.*)", line)
        if found:
            seconds[found[2]] = seconds.get(found[2], 0.0) + float(found[1])
    return seconds


def all_edits(only):
    """Return [(file, tests, before, after), ...]. Raises ValueError for one that does not apply."""
    found = []
    for file, groups in EDITS.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        for tests, edits in groups.items():
            for before, after in edits:
                if text.count(before) != 1:
                    raise ValueError(f"{before!r} occurs {text.count(before)} times in {file}")
                ast.parse(text.replace(before, after))
                if only in f"{file} {tests} {before} {after}":
                    found.append((file, tests, before, after))
    return found


def in_parallel(jobs, n_workers, work):
    """Call work(copy, job) for all jobs, in several threads that have a Copy each."""
    waiting = queue.Queue()
    for job in jobs:
        waiting.put(job)

    def work_off():
        with tempfile.TemporaryDirectory() as folder:
            copy = Copy(folder)
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                work(copy, job)

    threads = [threading.Thread(target=work_off) for _ in range(n_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main():
    f = flags(only="", workers=2, check=1)
    edits = all_edits(f["only"])
    broken, survivors, endless = [], [], []
    order = {}

    def try_without_edit(copy, tests):
        failed = copy.failing_test(tests)
        print(f"{tests}: {failed or 'passes without an edit'}", flush=True)
        if failed:
            broken.append(tests)
        else:
            order[tests] = sorted(copy.seconds, key=copy.seconds.get)

    def try_edit(copy, edit):
        began = time.monotonic()
        failed = copy.try_edit(*edit, order)
        what = f"{edit[0]}: {edit[2]!r} -> {edit[3]!r}"
        if not failed:
            survivors.append(what)
        if failed.startswith("no end"):
            endless.append(what)
        seconds = time.monotonic() - began
        print(f"{seconds:4.0f} s  {what}\n        {failed or 'SURVIVED'}", flush=True)

    if f["check"]:
        in_parallel(sorted({tests for _, tests, _, _ in edits}), f["workers"], try_without_edit)
    if broken:
        sys.exit(f"these fail without an edit: {', '.join(broken)}")
    in_parallel(edits, f["workers"], try_edit)
    killed = len(edits) - len(survivors)
    record("mutations", edits=len(edits), killed=killed, endless=endless, survivors=survivors)


if __name__ == "__main__":
    main()
