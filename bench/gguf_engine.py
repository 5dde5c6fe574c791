"""Compare models written as GGUF with llama.cpp: ids, greedy tokens, the loss of rounded weights.

    python bench/gguf_engine.py FILE [--texts=10000] [--steps=200] [--vocabularies=char,bpe,gpt2]

FILE is a text, such as tiny Shakespeare. For each vocabulary and each family (Llama, Qwen3, GPT-2)
a small model is trained on it and written in float32, float16 and q8_0. The engine gets the prompts
as ids. Rounding may decide between two logits that are almost equal, so prompts are drawn until
there are eight whose greedy tokens are all clearly ahead (see TIE); the others are counted. Where a
greedy token differs, the script prints how far apart our two best logits are there.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, record

import gpt
import hub
import prepare

sys.path.insert(0, str(ROOT / "tests"))
from test_gguf import FAMILIES, Engine, as_float16, random_text

N_PROMPTS, N_TOKENS = 8, 100
# Logits that are closer than this may change places by rounding. llama.cpp's GELU is a table of
# float16 values, so for GPT-2's shape the second number holds in float32, too.
TIE = {"f32": 2e-4, "f16": 2e-3}


def train(family, vocabulary, data_dir, out, steps):
    """Train a small model of a family; return (the model, its tokenizer)."""
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "block_size": 128}
    if family == "gpt2":
        shape["tie_weights"] = True
    run = {"max_iters": steps, "batch_size": 8, "eval_interval": steps, "sample_tokens": 0}
    run |= {"device": "cpu", "dtype": "float32", "compile": False, "eval_iters": 2}
    settings = gpt.UNFITTED | shape | run | FAMILIES[family]
    gpt.train(dataset=vocabulary, data_dir=str(data_dir), out_dir=str(out), **settings)
    model, tokenizer, _ = gpt.load_checkpoint(out / "ckpt.pt")
    return model.eval(), tokenizer


@torch.no_grad()
def draw_prompts(model, tokenizer, text, tie):
    """Return up to N_PROMPTS prompts without ties, and how many had one and were left out.

    Only our own logits decide. A prompt has a tie if the best two logits for any of its N_TOKENS
    greedy tokens are less than `tie` apart.
    """
    draw = random.Random(2)
    prompts, n_tied = [], 0
    while len(prompts) < N_PROMPTS and n_tied < 100:
        start = draw.randrange(len(text) - 200)
        ids = tokenizer.encode(text[start : start + 200])[:20]
        greedy = [int(i) for i in model.generate([ids], N_TOKENS, temperature=0)]
        logits, _ = model(torch.tensor([ids + greedy[:-1]]))
        best, second = logits[0, len(ids) - 1 :].topk(2).values.T
        if (best - second).min() < tie:
            n_tied += 1
        else:
            prompts.append(ids)
    return prompts, n_tied


def count_equal_ids(engine, tokenizer, texts):
    """Return how many of the texts the engine encodes as we do."""
    return sum(engine.encode(text) == tokenizer.encode(text) for text in texts)


@torch.no_grad()
def count_equal_greedy(engine, model, prompts, label):
    """Return for each prompt how many greedy tokens are equal before the first that differs."""
    counts = []
    for ids in prompts:
        theirs = engine.continue_greedily(ids, N_TOKENS)
        assert len(theirs) == N_TOKENS, "the engine ended early"
        ours = [int(i) for i in model.generate([ids], N_TOKENS, temperature=0)]
        n = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), N_TOKENS)
        if n < N_TOKENS:
            logits, _ = model(torch.tensor([ids + ours[:n]]))
            best = logits[0, -1].topk(2)
            print(
                f"{label}: token {n} is {theirs[n]} for {ours[n]}; our two best are "
                f"{best.indices.tolist()}, {float(best.values.diff().abs()):.1e} apart"
            )
        counts.append(n)
    return counts


def loss(engine, ids, n_vocab, n=40):
    """Return the engine's mean loss, in nats, of the last n ids."""
    found = [engine.log_probs(ids[:i], n_vocab)[ids[i]] for i in range(len(ids) - n, len(ids))]
    return -sum(found) / len(found)


def compare(family, vocabulary, text, texts, folder, steps):
    """Train, write and compare one model; record what was found. texts: to encode, or none."""
    out = folder / f"{vocabulary}-{family}"
    model, tokenizer = train(family, vocabulary, folder / "data", out, steps)
    figures = {"vocabulary": vocabulary, "family": family}
    losses = {}
    ids = tokenizer.encode(text[-3000:])[-120:]
    for dtype in ("f32", "f16", "q8_0"):
        path = out / f"{dtype}.gguf"
        hub.write_gguf(out, path, dtype)
        engine = Engine(path)
        losses[dtype] = loss(engine, ids, model.config.vocab_size)
        if dtype == "f32" and texts:
            n_equal = count_equal_ids(engine, tokenizer, texts)
            figures["equal_ids"] = f"{n_equal} of {len(texts)} texts"
            figures["whole_text_equal"] = count_equal_ids(engine, tokenizer, [text]) == 1
        if dtype == "f16":
            as_float16(model)
        if dtype != "q8_0":
            label = f"{vocabulary}, {family}, {dtype}"
            tie = TIE["f16" if family == "gpt2" else dtype]
            prompts, n_tied = draw_prompts(model, tokenizer, text, tie)
            counts = count_equal_greedy(engine, model, prompts, label)
            figures[f"greedy_{dtype}"] = f"{counts.count(N_TOKENS)} of {len(prompts)}"
            figures[f"tied_{dtype}"] = n_tied
    figures["loss_f32"] = round(losses["f32"], 4)
    figures["q8_0_loss_ratio"] = round(losses["q8_0"] / losses["f32"], 4)
    record("gguf_engine", tokens=N_TOKENS, **figures)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", type=int, default=10000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--vocabularies", default="char,bpe,gpt2")
    options = parser.parse_args()
    text = options.file.read_text(encoding="utf-8")
    draw = random.Random(1)
    texts = [random_text(draw) for _ in range(options.texts)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # The characters of the random texts must be in the vocabulary, too.
        (folder / "text.txt").write_text(text + "".join(texts[:1000]), encoding="utf-8")
        for vocabulary in options.vocabularies.split(","):
            prepare.prepare(
                input=str(folder / "text.txt"),
                tokenizer=vocabulary,
                vocab_size=1000,
                name=vocabulary,
                data_dir=str(folder / "data"),
            )
            for i, family in enumerate(FAMILIES):
                compare(family, vocabulary, text, texts if i == 0 else [], folder, options.steps)


if __name__ == "__main__":
    main()
