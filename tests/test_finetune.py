"""Finetuning data from end to end: a rated table, training on it, exact answers."""

import csv
import random

import gpt
import prepare
import sample


def greedy_answer(model, tokenizer, prompt):
    """Return what greedy sampling answers, up to <|endoftext|>."""
    pieces = sample.generate_text(model, tokenizer, prompt, 12, ["<|endoftext|>"], temperature=0.0)
    return "".join(pieces)


def write_ratings(path, rng):
    """Write a table of names with right codes, rated 4 or 5, and wrong ones, rated 1.

    Return {name: right code}.
    """
    names = []
    for begin in ("bo", "ka", "lu", "mi", "ne"):
        for end in ("ra", "so", "ti", "vu", "xe", "ya", "zo", "dim", "fog", "hus"):
            names.append(begin + end)
    right = {name: "".join(rng.choices("0123456789", k=rng.randint(1, 5))) for name in names}
    rows = [(name, code, rng.choice((4, 5))) for name, code in right.items()]
    rows += [(name, "".join(rng.choices("0123456789", k=4)), 1) for name in names]
    rng.shuffle(rows)
    rows.insert(0, (names[0], right[names[0]], 5))  # the first document is for validation
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt", "response", "rating"))
        for name, code, rating in rows:
            writer.writerow((f"{name}=", code, rating))
    return right


def test_fifty_rated_examples_are_learned_exactly(settings, tmp_path):
    """Of a right and a wrong answer the model gives the right one, and ends there."""
    right = write_ratings(tmp_path / "codes.csv", random.Random(0))
    prepare.prepare(
        input=tmp_path / "codes.csv",
        data_dir=tmp_path / "data",
        val_fraction=0.005,
        tokenizer="bpe",
        vocab_size=290,
    )
    settings(dataset="codes", n_embd=64, block_size=12, batch_size=101)
    figures = gpt.train(max_iters=100, eval_interval=100)
    assert "bits_per_byte" not in figures
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    answers = {name: greedy_answer(model, tokenizer, f"{name}=") for name in right}
    assert answers == right
