"""Measure tokens per second of generating from a prompt, versus nanoGPT, transformers, gpt-fast.

    python bench/decode_speed.py --nanogpt=PATH
    python bench/decode_speed.py --shape=gpt2 --gptfast=PATH --transformers=0      (a GPU)
    python bench/decode_speed.py --old=PATH      another checkout of this project as a peer

The weights are random. The tests check that the tokens are right. nanoGPT's model has no cache and
reads its last block_size tokens again for each new one. transformers' model is a Llama of our shape
with its static cache. It generates no more than block_size tokens, while ours refills its cache
when that is full. gpt-fast's model is a Llama of our shape in bfloat16. It is compiled with its own
settings and generates one token a step.

In float16 only the matrices of ours are float16, as sample.py has them on a CPU by default.

Each figure is the median of `runs` measurements, taken in turn. The ratios are to others with
weights of the same dtype. They are compiled if ours is, as by sample.py's --compile=True. Compiling
takes some seconds, which do not count. nanoGPT, whose text grows, is not compiled.
"""

import sys
import time
import types

import torch
from common import (
    best_device,
    flags,
    in_turn,
    is_worker,
    nanogpt,
    ratios,
    record,
    serve,
    wait_for,
)

import gpt
from sample import COMPILE, speed_up_rows

try:
    from sample import store_as_float16
except ImportError:  # --old=PATH may name a version without it
    store_as_float16 = None

SHAPES = {
    "shakespeare": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    "1b": {"n_layer": 22, "n_head": 16, "n_embd": 2048, "block_size": 1024, "vocab_size": 50304},
}  # 1b: config/train_1b.py
OURS = {"qk_norm": False, "tie_weights": True}  # as in the peers


# ---- Generators: functions of the number of tokens ----
def ours(case, idx, dtype):
    """Return gpt.py's generator, from the checkout that the case names."""
    config = gpt.GPTConfig(**case["sizes"], **OURS, n_kv_head=case["n_kv_head"])
    halve = dtype == torch.float16  # what sample.py does on a CPU: float16 matrices alone
    with torch.device(idx.device):
        model = speed_up_rows(gpt.GPT(config).to(torch.float32 if halve else dtype).eval())
    if halve:
        store_as_float16(model)
    forward = torch.compile(model.forward, **COMPILE) if case["compile"] else None

    def generate(n):
        for ids in model.generate(idx, n, forward=forward, temperature=0.8, top_k=200, top_p=1.0):
            ids.tolist()  # as a caller who shows each token does

    generate(5)
    return generate


def nano_gpt(case, idx, dtype):
    model_py = nanogpt(case["nanogpt"])
    config = model_py.GPTConfig(**case["sizes"], dropout=0.0, bias=False)
    model = model_py.GPT(config).to(idx.device, dtype).eval()
    model.generate(idx, 5)
    return lambda n: model.generate(idx, n, temperature=0.8, top_k=200)


def transformers_generate(case, idx, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    s = case["sizes"]
    config = LlamaConfig(
        vocab_size=s["vocab_size"],
        hidden_size=s["n_embd"],
        intermediate_size=llama_width(s["n_embd"]),
        num_hidden_layers=s["n_layer"],
        num_attention_heads=s["n_head"],
        num_key_value_heads=case["n_kv_head"],
        max_position_embeddings=s["block_size"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(idx.device, dtype).eval()
    if case["compile"]:
        model.compile()

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

    generate(case["tokens"])  # warms up with a cache of the same size
    return generate


def gpt_fast(case, idx, dtype):
    sys.path.insert(0, case["gptfast"])
    # Its own tokenizer.py would need sentencepiece.
    sys.modules["tokenizer"] = types.SimpleNamespace(get_tokenizer=None)
    import generate
    import model as model_py

    s = case["sizes"]
    args = model_py.ModelArgs(
        block_size=s["block_size"],
        vocab_size=s["vocab_size"],
        n_layer=s["n_layer"],
        n_head=s["n_head"],
        dim=s["n_embd"],
        intermediate_size=llama_width(s["n_embd"]),
        n_local_heads=case["n_kv_head"],
    )
    with torch.device(idx.device):  # a billion weights are drawn sooner there
        model = model_py.Transformer(args).to(dtype).eval()
        model.setup_caches(len(idx), s["block_size"])
    # Its loop calls a global decode_one_token, which its main() has compiled like this.
    decode_one_token = torch.compile(
        generate.decode_one_token, mode="reduce-overhead", fullgraph=True
    )
    names = vars(generate) | {"decode_one_token": decode_one_token}
    decode_n_tokens = types.FunctionType(generate.decode_n_tokens.__code__, names)

    def run(n):
        sampling = {"temperature": 0.8, "top_k": 200}
        positions = torch.arange(idx.size(1), device=idx.device)
        last = generate.prefill(model, idx, positions, **sampling).view(len(idx), -1)
        at = torch.tensor([idx.size(1)], device=idx.device, dtype=torch.int)
        decode_n_tokens(model, last, at, n - 1, callback=lambda ids: ids.tolist(), **sampling)

    run(8)
    return run


def llama_width(n_embd):
    """Return the width of the MLP that gives a Llama the size of our model."""
    return round(n_embd * 8 / 3 / 32) * 32


# ---- Measuring ----
MAKERS = {
    "ours": ours,
    "nanogpt": nano_gpt,
    "transformers": transformers_generate,
    "gptfast": gpt_fast,
}


def prepare(case):
    """Return a function that measures tokens per second, for case["tokens"] tokens per row."""
    torch.manual_seed(0)
    device = best_device()
    idx = torch.randint(case["sizes"]["vocab_size"], (case["batch_size"], 8), device=device)
    with torch.no_grad():
        generate = MAKERS[case["who"]](case, idx, getattr(torch, case["dtype"]))

    def measure():
        with torch.no_grad():
            wait_for(device)
            began = time.perf_counter()
            generate(case["tokens"])
            wait_for(device)
        return case["tokens"] * case["batch_size"] / (time.perf_counter() - began)

    return measure


def cases(f):
    """Return {name: (this script, case)} for what the flags f ask for."""
    sizes = SHAPES[f["shape"]]
    base = {key: f[key] for key in ("batch_size", "tokens", "nanogpt", "gptfast")}
    base |= {"who": "ours", "sizes": sizes, "n_kv_head": f["n_kv_head"] or sizes["n_head"]}
    dtypes = ("bfloat16",) if torch.cuda.is_available() else ("float32", "bfloat16", "float16")
    found = {}
    for dtype in dtypes:
        found |= cases_of_dtype(f, base | {"dtype": dtype, "compile": False})
    if f["gptfast"]:
        theirs = {"who": "gptfast", "dtype": "bfloat16", "compile": True}
        found["gpt-fast bfloat16, compiled"] = base | theirs | {"tokens": tokens_that_fit(f)}
    return {name: (__file__, case) for name, case in found.items()}


def cases_of_dtype(f, plain):
    """Return {name: case} of all generators in the dtype of the case `plain`, which is ours."""
    dtype = plain["dtype"]
    compiled = plain | {"compile": True}
    found = {f"ours {dtype}": plain, f"ours {dtype}, compiled": compiled}
    if f["old"]:
        checkout = {"who": "ours", "checkout": f["old"]}
        found[f"old {dtype}"] = plain | checkout
        found[f"old {dtype}, compiled"] = compiled | checkout
    if dtype == "float16":  # the others have no such form
        return {name: case for name, case in found.items() if name.startswith("ours")}
    if f["nanogpt"]:
        found[f"nanoGPT {dtype}"] = plain | {"who": "nanogpt"}
    if f["transformers"]:
        theirs = {"who": "transformers", "tokens": tokens_that_fit(f)}
        found[f"transformers {dtype}"] = plain | theirs
        found[f"transformers {dtype}, compiled"] = compiled | theirs
    return found


def tokens_that_fit(f):
    """Return how many tokens the others generate: what their caches hold besides the prompt."""
    return min(f["tokens"], SHAPES[f["shape"]]["block_size"] - 8)


# ---- Report ----
def copy_bandwidth():
    """Return the bytes per second, read and written, of copying 1 GiB."""
    x = torch.empty(2**28, device=best_device())
    y = torch.ones_like(x)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            x.copy_(y)
        float(x[-1])  # wait for the device
        seconds.append((time.perf_counter() - began) / 10)
    return 2**31 / min(seconds)


def bandwidth_shares(f, medians):
    """Return, for each case of ours, the bytes it must read per second over those a copy moves.

    A step reads all weights once, and the keys and values of the tokens that it sees.
    """
    sizes = SHAPES[f["shape"]]
    config = gpt.GPTConfig(**sizes, **OURS, n_kv_head=f["n_kv_head"] or sizes["n_head"])
    with torch.device("meta"):
        n_weights = gpt.GPT(config).n_params()
    if not config.tie_weights:  # only one row of the embedding is read
        n_weights -= config.vocab_size * config.n_embd
    lengths = [gpt.context_length(n, config.block_size) for n in range(8, 8 + f["tokens"])]
    n_seen = f["batch_size"] * sum(lengths) / len(lengths)
    n_cached = n_seen * 2 * config.n_layer * config.n_kv_head * config.head_dim

    bandwidth = copy_bandwidth()
    shares = {}
    for name, speed in medians.items():
        if name.startswith("ours"):
            size = 2 if "float16" in name else 4
            size_cached = size if torch.cuda.is_available() else 4  # float32 on a CPU
            n_bytes = n_weights * size + n_cached * size_cached
            shares[name] = round(n_bytes * speed / f["batch_size"] / bandwidth, 3)
    return shares


def comparable(mine, other):
    """Tell whether a case of ours does the same as one of somebody else's."""
    if mine["who"] != "ours" or "checkout" in mine:
        return False
    # float16 matrices are compared with float32, which is what others have by default.
    counterpart = "float32" if mine["dtype"] == "float16" else mine["dtype"]
    if other["dtype"] != counterpart:
        return False
    if other["who"] == "nanogpt":  # it has nothing to compile
        return True
    is_other = other["who"] != "ours" or "checkout" in other
    return is_other and mine["compile"] == other["compile"]


def report(f, found, record=record):
    """Print the medians of what was measured for the flags f, and record them."""
    medians = {name: round(sorted(speeds)[len(speeds) // 2], 1) for name, speeds in found.items()}
    for name, speed in medians.items():
        print(f"{name:32s} {speed:10,.1f} tokens/s")
    known = {name: case for name, (_, case) in cases(f).items() if name in found}
    pairs = {}
    for mine, case in known.items():
        for name, other in known.items():
            if comparable(case, other):
                pairs[f"{mine} / {name}"] = ratios(found[mine], found[name])
    record(
        "decode_speed",
        bandwidth_share=bandwidth_shares(f, medians),
        shape=f["shape"],
        batch_size=f["batch_size"],
        tokens=f["tokens"],
        tokens_per_s=medians,
        ratios=pairs,
    )


DEFAULTS = {
    "nanogpt": "",
    "gptfast": "",
    "old": "",
    "transformers": 1,
    "shape": "shakespeare",
    "batch_size": 1,
    "tokens": 1000,
    "runs": 3,
    "n_kv_head": 0,
}


def main():
    f = flags(**DEFAULTS)
    report(f, in_turn(cases(f), f["runs"]))


if __name__ == "__main__":
    if is_worker():
        serve(prepare)
    else:
        main()
