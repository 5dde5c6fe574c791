"""Tokens per second of generating from a prompt, beside nanoGPT's, transformers' and gpt-fast's generate.

    python bench/decode_speed.py --nanogpt=PATH
    python bench/decode_speed.py --shape=gpt2 --gptfast=PATH --transformers=0      (a GPU)

Random weights; that the tokens are right is for the tests. nanoGPT's model has no cache and reads its last block_size
tokens again for each one. transformers' is a Llama of our shape with its static cache; it generates no more than
block_size tokens, while ours also refills its cache when that is full. gpt-fast's is a Llama of our shape in
bfloat16, compiled with its own settings, one token a step. Each figure is the median of `runs` measurements, in turn;
the ratios are to others with weights of the same dtype, and compiled where ours is, as by sample.py's --compile=True.
What compiling takes, some seconds, counts for none. nanoGPT's growing text is not compiled.
"""

import sys
import time
import types

import torch
from common import flags, in_turn, nanogpt, ratios, record, serve

import gpt
from sample import COMPILE, speed_up_rows

SHAPES = {
    "shakespeare": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    "1b": {
        "n_layer": 22,
        "n_head": 16,
        "n_embd": 2048,
        "block_size": 1024,
        "vocab_size": 50304,
    },  # train_1b
}


def peer(case, idx, dtype):
    model_py = nanogpt(case["nanogpt"])
    config = model_py.GPTConfig(**case["sizes"], dropout=0.0, bias=False)
    model = model_py.GPT(config).to(idx.device, dtype).eval()
    model.generate(idx, 5)
    return lambda n: model.generate(idx, n, temperature=0.8, top_k=200)


def gpt_fast(case, idx, dtype):
    sys.path.insert(0, case["gptfast"])
    sys.modules["tokenizer"] = types.SimpleNamespace(
        get_tokenizer=None
    )  # which would need sentencepiece
    import generate
    import model as model_py

    s = case["sizes"]
    args = model_py.ModelArgs(
        block_size=s["block_size"],
        vocab_size=s["vocab_size"],
        n_layer=s["n_layer"],
        n_head=s["n_head"],
        dim=s["n_embd"],
        intermediate_size=round(s["n_embd"] * 8 / 3 / 32) * 32,
        n_local_heads=case["n_kv_head"],
    )
    with torch.device(idx.device):  # where a billion weights are drawn sooner
        model = model_py.Transformer(args).to(dtype).eval()
        model.setup_caches(len(idx), s["block_size"])
    generate.decode_one_token = torch.compile(
        generate.decode_one_token, mode="reduce-overhead", fullgraph=True
    )

    def run(n):
        positions = torch.arange(idx.size(1), device=idx.device)
        last = generate.prefill(model, idx, positions, temperature=0.8, top_k=200).view(
            len(idx), -1
        )
        at = torch.tensor([idx.size(1)], device=idx.device, dtype=torch.int)
        show = {"callback": lambda ids: ids.tolist(), "temperature": 0.8, "top_k": 200}
        generate.decode_n_tokens(model, last, at, n - 1, **show)

    run(8)
    return run


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
    with torch.device(idx.device):
        model = speed_up_rows(gpt.GPT(config).to(dtype).eval())
    forward = torch.compile(model.forward, **COMPILE) if case["compile"] else None

    def generate(n):
        for ids in model.generate(idx, n, forward=forward, temperature=0.8, top_k=200, top_p=1.0):
            ids.tolist()  # as a caller who shows each token does

    generate(5)
    return generate


def prepare(case):
    """Return a function that returns tokens per second of one generation of case["tokens"] tokens in each row."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    idx = torch.randint(case["sizes"]["vocab_size"], (case["batch_size"], 8), device=device)
    maker = {
        "nanogpt": peer,
        "transformers": transformers_generate,
        "gptfast": gpt_fast,
        "ours": ours,
    }
    with torch.no_grad():
        generate = maker[case["who"]](case, idx, getattr(torch, case["dtype"]))

    def measure():
        with torch.no_grad():
            wait()
            began = time.perf_counter()
            generate(case["tokens"])
            wait()
        return case["tokens"] * case["batch_size"] / (time.perf_counter() - began)

    return measure


def copy_bandwidth():
    """Return bytes per second, read and written, of copying 1 GiB."""
    x = torch.empty(2**28, device="cuda" if torch.cuda.is_available() else "cpu")
    y, seconds = torch.ones_like(x), []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            x.copy_(y)
        float(x[-1])  # wait for the device
        seconds.append((time.perf_counter() - began) / 10)
    return 2**31 / min(seconds)


def cases(f):
    sizes = SHAPES[f["shape"]]
    tokens = min(f["tokens"], sizes["block_size"] - 8)  # what the others' caches hold
    base = {key: f[key] for key in ("batch_size", "tokens", "nanogpt", "gptfast")}
    base |= {
        "who": "ours",
        "sizes": sizes,
        "n_kv_head": f["n_kv_head"] or sizes["n_head"],
        "compile": False,
    }
    found = {}
    for dtype in ("float32", "bfloat16") if not torch.cuda.is_available() else ("bfloat16",):
        for compiled in (False, True):
            found[f"ours {dtype}{', compiled' * compiled}"] = base | {
                "dtype": dtype,
                "compile": compiled,
            }
        if f["nanogpt"]:
            found[f"nanoGPT {dtype}"] = base | {"who": "nanogpt", "dtype": dtype}
        if f["transformers"]:
            theirs = base | {"who": "transformers", "dtype": dtype, "tokens": tokens}
            found[f"transformers {dtype}"] = theirs
            found[f"transformers {dtype}, compiled"] = theirs | {"compile": True}
        if f["gptfast"]:
            theirs = base | {
                "who": "gptfast",
                "dtype": "bfloat16",
                "tokens": tokens,
                "compile": True,
            }
            found["gpt-fast bfloat16, compiled"] = theirs
    return {name: (__file__, case) for name, case in found.items()}


def report(f, found):
    sizes, known = SHAPES[f["shape"]], {name: case for name, (_, case) in cases(f).items()}
    medians = {name: round(sorted(speeds)[len(speeds) // 2], 1) for name, speeds in found.items()}
    for name, speed in medians.items():
        print(f"{name:32s} {speed:10,.1f} tokens/s")
    config = gpt.GPTConfig(**sizes, n_kv_head=f["n_kv_head"] or sizes["n_head"])
    with torch.device("meta"):
        n_read = gpt.GPT(config).n_params() - config.vocab_size * config.n_embd * (
            not config.tie_weights
        )
    lengths = [gpt.context_length(n, config.block_size) for n in range(8, 8 + f["tokens"])]
    n_seen = (
        f["batch_size"] * sum(lengths) / len(lengths)
    )  # tokens whose keys and values are read, on average
    n_cached = n_seen * 2 * config.n_layer * config.n_kv_head * config.head_dim
    bandwidth, shares = copy_bandwidth(), {}
    for name, speed in medians.items():
        size = 2 if "bfloat16" in name else 4
        read = n_read * size + n_cached * (
            size if torch.cuda.is_available() else 4
        )  # on a CPU float32
        if name.startswith("ours"):
            shares[name] = round(read * speed / f["batch_size"] / bandwidth, 3)
    record(
        "decode_speed",
        bandwidth_share=shares,  # of weights and cache read once a step, at the speed of a copy
        shape=f["shape"],
        batch_size=f["batch_size"],
        tokens=f["tokens"],
        tokens_per_s=medians,
        ratios={
            f"{mine} / {name}": ratios(found[mine], found[name])
            for mine, a in known.items()
            for name, b in known.items()
            if a["who"] == "ours" != b["who"]
            and a["dtype"] == b["dtype"]
            and {mine, name} <= found.keys()
            if a["compile"] == b["compile"] or (a["compile"] and b["who"] == "nanogpt")
        },
    )


DEFAULTS = {
    "nanogpt": "",
    "gptfast": "",
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
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        serve(prepare)
    else:
        main()
