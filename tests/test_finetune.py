"""Finetuning data from end to end: a rated table, training on it, exact answers."""

import csv
import random

import gpt
import prepare
import sample


def answer(model, tokenizer, prompt):
    """Return what greedy sampling answers, up to <|endoftext|>."""
    pieces = sample.generate_text(model, tokenizer, prompt, 12, ["<|endoftext|>"], temperature=0.0)
    return "".join(pieces)


def test_fifty_rated_examples_are_learned_exactly(settings, tmp_path, monkeypatch):
    """Right answers are rated 4 or 5, as many wrong ones 1: the model gives the right ones, and ends there."""
    rng = random.Random(0)
    names = [
        f"{a}{b}"
        for a in ("bo", "ka", "lu", "mi", "ne")
        for b in ("ra", "so", "ti", "vu", "xe", "ya", "zo", "dim", "fog", "hus")
    ]
    right = {name: "".join(rng.choices("0123456789", k=rng.randint(1, 5))) for name in names}
    rows = [(name, code, rng.choice((4, 5))) for name, code in right.items()]
    rows += [(name, "".join(rng.choices("0123456789", k=4)), 1) for name in names]
    rng.shuffle(rows)
    rows.insert(0, (names[0], right[names[0]], 5))  # the first document is for validation
    with open(tmp_path / "codes.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("prompt", "response", "rating"), *((f"{n}=", c, r) for n, c, r in rows)]
        )
    for name, value in {
        "input": str(tmp_path / "codes.csv"),
        "data_dir": gpt.data_dir,
        "val_fraction": 0.005,
    }.items():
        monkeypatch.setattr(prepare, name, value)
    monkeypatch.setattr(prepare, "tokenizer", "bpe")
    monkeypatch.setattr(prepare, "vocab_size", 290)
    prepare.main()
    settings(
        dataset="codes", n_embd=64, block_size=12, batch_size=101, max_iters=150, eval_interval=150
    )
    figures = gpt.train()
    assert "bits_per_byte" not in figures
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    answers = {name: answer(model, tokenizer, f"{name}=") for name in names}
    assert answers == right
