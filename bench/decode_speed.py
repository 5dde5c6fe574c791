"""Tokens per second of generating from a prompt, beside nanoGPT's and transformers' generate.

    python bench/decode_speed.py --nanogpt=PATH
    python bench/decode_speed.py --shape=gpt2 --batch_size=64      (a GPU)

Random weights; that the tokens are right is for the tests. nanoGPT's model has no cache and reads its last block_size
tokens again for each one. transformers' is a Llama of our shape with its static cache; it generates no more than
block_size tokens, while ours also refills its cache when that is full. Each figure is the median of `runs` processes,
in turn; the ratios are to others with weights of the same dtype, and compiled where ours is, as by sample.py's
--compile=True. What compiling takes, some seconds, counts for none. nanoGPT's growing text is not compiled.
"""

import json
import sys
import time

import torch
from common import flags, in_turn, nanogpt, ratios, record

import gpt
from sample import speed_up_rows

SHAPES = {
    "shakespeare": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    "1b": {"n_layer": 16, "n_head": 32, "n_embd": 2048, "block_size": 2048, "vocab_size": 50304},
}


def peer(case, idx, dtype):
    model_py = nanogpt(case["nanogpt"])
    model = (
        model_py.GPT(model_py.GPTConfig(**case["sizes"], dropout=0.0, bias=False))
        .to(idx.device, dtype)
        .eval()
    )
    model.generate(idx, 5)
    return lambda n: model.generate(idx, n, temperature=0.8, top_k=200)


def transformers_generate(case, idx, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    s = case["sizes"]
    config = LlamaConfig(
        vocab_size=s["vocab_size"],
        hidden_size=s["n_embd"],
        intermediate_size=round(s["n_embd"] * 8 / 3 / 32) * 32,
        num_hidden_layers=s["n_layer"],
        num_attention_heads=s["n_head"],
        num_key_value_heads=case["n_kv_head"],
        max_position_embeddings=s["block_size"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(idx.device, dtype).eval()
    if case["compile"]:  # as its documentation advises with a static cache
        model.forward = torch.compile(model.forward)

    def generate(n):
        model.generate(
            idx,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=True,
            temperature=0.8,
            top_k=200,
            cache_implementation="static",
        )

    generate(case["tokens"])  # a cache of the same size
    return generate


def ours(case, idx, dtype):
    config = gpt.GPTConfig(**case["sizes"], n_kv_head=case["n_kv_head"])
    model = speed_up_rows(gpt.GPT(config).to(idx.device, dtype).eval())
    forward = torch.compile(model.forward, dynamic=False) if case["compile"] else None

    def generate(n):
        for ids in model.generate(idx, n, forward=forward, temperature=0.8, top_k=200, top_p=1.0):
            ids.tolist()  # as a caller who shows each token does

    generate(5)
    return generate


def measure(case):
    """Return tokens per second of one generation of case["tokens"] tokens in each row."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    idx = torch.randint(case["sizes"]["vocab_size"], (case["batch_size"], 8), device=device)
    maker = {"nanogpt": peer, "transformers": transformers_generate, "ours": ours}[case["who"]]
    with torch.inference_mode():
        generate = maker(case, idx, getattr(torch, case["dtype"]))
        began = time.perf_counter()
        generate(case["tokens"])
        if device.type == "cuda":
            torch.cuda.synchronize()
    return case["tokens"] * case["batch_size"] / (time.perf_counter() - began)


def bandwidth_share(model_bytes, speed):
    """Return the share of the bandwidth measured by copying 1 GiB that reading the weights once a step takes."""
    x = torch.empty(2**28, device="cuda" if torch.cuda.is_available() else "cpu")
    y, seconds = torch.ones_like(x), []
    for _ in range(5):
        began = time.perf_counter()
        x.copy_(y)
        float(x[-1])  # wait for the device
        seconds.append(time.perf_counter() - began)
    return round(model_bytes * speed * min(seconds) / 2**31, 3)


def main():
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(measure(json.loads(sys.argv[1])))
        return
    f = flags(nanogpt="", shape="shakespeare", batch_size=1, tokens=1000, runs=3, n_kv_head=0, transformers=1)
    sizes = SHAPES[f["shape"]]
    base = {key: f[key] for key in ("batch_size", "tokens", "nanogpt")}
    base |= {"who": "ours", "sizes": sizes, "n_kv_head": f["n_kv_head"] or sizes["n_head"], "compile": False}
    cases = {}
    for dtype in ("float32", "bfloat16"):
        for compiled in (False, True):
            cases[f"ours {dtype}{', compiled' * compiled}"] = base | {"dtype": dtype, "compile": compiled}
        if f["nanogpt"]:
            cases[f"nanoGPT {dtype}"] = base | {"who": "nanogpt", "dtype": dtype}
        if f["transformers"]:
            tokens = min(f["tokens"], sizes["block_size"] - 8)
            theirs = base | {"who": "transformers", "dtype": dtype, "tokens": tokens}
            cases[f"transformers {dtype}"] = theirs
            cases[f"transformers {dtype}, compiled"] = theirs | {"compile": True}
    found = in_turn(__file__, cases, f["runs"])
    medians = {name: round(sorted(speeds)[len(speeds) // 2], 1) for name, speeds in found.items()}
    for name, speed in medians.items():
        print(f"{name:32s} {speed:10,.1f} tokens/s")
    with torch.device("meta"):
        config = gpt.GPTConfig(**sizes, n_kv_head=base["n_kv_head"])
        n_weights = gpt.GPT(config).n_params() - config.vocab_size * config.n_embd * (not config.tie_weights)
    shares = {
        name: bandwidth_share(n_weights * (2 if "bfloat16" in name else 4), speed / f["batch_size"])
        for name, speed in medians.items()
        if name.startswith("ours")
    }
    record(
        "decode_speed",
        bandwidth_share=shares,
        shape=f["shape"],
        batch_size=f["batch_size"],
        tokens=f["tokens"],
        tokens_per_s=medians,
        ratios={
            f"{mine} / {name}": ratios(found[mine], found[name])
            for mine, a in cases.items()
            for name, b in cases.items()
            if a["who"] == "ours" != b["who"] and a["dtype"] == b["dtype"]
            if a["compile"] == b["compile"] or (a["compile"] and b["who"] == "nanogpt")
        },
    )


if __name__ == "__main__":
    main()
