"""Generation with a cache against a loop without; sampling against transformers."""

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

import gpt
import sample

LLAMA = {
    "block_size": 8,
    "vocab_size": 23,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "dropout": 0.0,
    "tie_weights": False,
}
MQA = LLAMA | {"n_kv_head": 1, "qk_norm": True, "block_size": 7, "tie_weights": True}
GPT2 = LLAMA | {
    "n_kv_head": 4,
    "bias": True,
    "use_rope": False,
    "use_rms_norm": False,
    "use_swiglu": False,
}
OWN_SIZES = LLAMA | {"head_dim": 6, "mlp_hidden": 20}
FAMILIES = pytest.mark.parametrize(
    "values", [LLAMA, MQA, GPT2, OWN_SIZES], ids=["llama", "mqa", "gpt2", "own-sizes"]
)
RAGGED = [[3], [5, 1, 4, 2, 9, 7], list(range(1, 22)), [8, 8]]


class Windowed(gpt.GPT):
    """A GPT whose queries see three tokens only: themselves and the two before."""

    def attention_mask(self, positions, cache):
        keys = positions
        if cache is not None:
            keys = torch.arange(self.config.block_size)[None]
        distance = positions[:, None, :, None] - keys[:, None, None, :]
        return (distance >= 0) & (distance < 3)


def random_model(kind=gpt.GPT, **values):
    """Return a model in eval mode whose every weight is random, and large enough to matter."""
    model = kind(gpt.GPTConfig(**values)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p == 1).float())
    return model


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def uncached(model, prompts, max_tokens, penalty=None, **sampling):
    """Return the tokens (B, max_tokens) of a loop that reads each row's context anew each time."""
    rows, start = [list(prompt) for prompt in prompts], [len(prompt) for prompt in prompts]
    for _ in range(max_tokens):
        logits = []
        for row in rows:
            visible = row[-gpt.context_length(len(row), model.config.block_size) :]
            scores = model(torch.tensor([visible]))[0][:, -1]
            logits.append(penalty(torch.tensor([row]), scores) if penalty else scores)
        for row, token in zip(rows, gpt.sample_next(torch.cat(logits), **sampling).tolist()):
            row.append(token)
    return torch.tensor([row[n:] for row, n in zip(rows, start)])


def cached(model, prompts, max_tokens, **sampling):
    return torch.stack(list(model.generate(prompts, max_tokens, **sampling)), dim=1)


# ---- The cache ----
def test_a_compiled_step_gives_the_same_tokens_and_is_compiled_once():
    """Positions are tensors and shapes do not change, so another text needs no other graph."""
    model = random_model(**LLAMA)
    torch._dynamo.reset()
    forward = torch.compile(model.forward, dynamic=False, fullgraph=True)
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(3))
    except Exception as e:
        pytest.skip(f"torch.compile finds no working C++ compiler ({type(e).__name__})")
    list(model.generate([[1]], 2, forward=forward))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for prompt in ([5, 1, 4], list(range(1, 22))):
        found = cached(model, [prompt], 30, temperature=0, forward=forward)
        assert torch.equal(found, uncached(model, [prompt], 30, temperature=0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@FAMILIES
@pytest.mark.parametrize(
    "prompts",
    [[[3]], [[5, 1, 4]], [list(range(8))], [list(range(1, 22))], RAGGED],
    ids=["one", "three", "block", "long", "ragged"],
)
def test_greedy_tokens_are_those_without_a_cache(values, prompts):
    """Token for token, far beyond block_size, for single prompts and rows of unequal lengths."""
    model = random_model(**values)
    found = cached(model, prompts, 30, temperature=0)
    assert torch.equal(found, uncached(model, prompts, 30, temperature=0))
    assert len(found.unique()) > 3


@FAMILIES
@pytest.mark.parametrize(
    "prompts", [[[3]], [list(range(1, 22))], RAGGED], ids=["one", "long", "ragged"]
)
def test_sampled_tokens_are_those_without_a_cache(values, prompts):
    """With the same seed, temperature and filters the cache changes no token."""
    model, sampling = (
        random_model(**values),
        {"temperature": 1.3, "top_k": 9, "top_p": 0.95, "min_p": 0.01},
    )
    found = cached(model, prompts, 30, generator=seeded(7), **sampling)
    assert torch.equal(found, uncached(model, prompts, 30, generator=seeded(7), **sampling))
    assert len(found.unique()) > 8


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_tiny_blocks(block_size):
    """The cache is right for every small block, where it is refilled at almost every token."""
    model = random_model(**LLAMA | {"block_size": block_size})
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    found = cached(model, RAGGED, 4 * block_size + 3, generator=seeded(3), **sampling)
    assert torch.equal(
        found, uncached(model, RAGGED, 4 * block_size + 3, generator=seeded(3), **sampling)
    )


def test_a_mask_of_ones_own_holds_in_generation():
    """A window of three is obeyed by the prompt and by each step, also where the cache refills."""
    model = random_model(kind=Windowed, **LLAMA)
    found = cached(model, RAGGED, 30, temperature=0)
    assert torch.equal(found, uncached(model, RAGGED, 30, temperature=0))
    assert not torch.equal(found, cached(random_model(**LLAMA), RAGGED, 30, temperature=0))


@FAMILIES
def test_prefill_gives_the_logits_that_follow_each_text(values):
    """Whatever the cache held before; and what is appended then continues each text."""
    model = random_model(**values)
    texts = [torch.tensor(text) for text in ([3], [5, 1, 4, 2, 9], [8, 8])]
    cache = gpt.KVCache(model.config, 3)
    with torch.no_grad():
        model(torch.randint(23, (3, 7), generator=seeded(2)), cache=cache)
        logits = model.prefill(texts, cache)
        assert logits.shape == (3, 23)
        assert cache.pos.tolist() == [1, 5, 2]
        after = model(torch.tensor([[7], [7], [7]]), cache=cache)[0][:, 0]
        for text, first, second in zip(texts, logits, after):
            whole = model(torch.cat((text, torch.tensor([7])))[None])[0][0]
            assert (first - whole[-2]).abs().max() < 1e-5
            assert (second - whole[-1]).abs().max() < 1e-5


@FAMILIES
def test_rows_of_a_ragged_batch_do_not_see_each_other(values):
    """Each row of a batch continues as if alone."""
    model = random_model(**values)
    together = cached(model, RAGGED, 30, temperature=0)
    for row, prompt in zip(together, RAGGED):
        assert torch.equal(row, cached(model, [prompt], 30, temperature=0)[0])
    assert torch.equal(
        cached(model, torch.tensor([[4, 2], [1, 1]]), 9, temperature=0),
        cached(model, [[4, 2], [1, 1]], 9, temperature=0),
    )


def test_repetition_penalty_counts_prompt_and_output():
    """Greedy tokens under a penalty are those of transformers' processor over the whole text."""
    model, penalty = random_model(**LLAMA), RepetitionPenaltyLogitsProcessor(1.7)
    plain = cached(model, RAGGED, 30, temperature=0)
    for i, prompt in enumerate(RAGGED):
        pick = sample.penalizing(prompt, 1.7)
        found = cached(model, [prompt], 30, pick=pick, temperature=0)
        assert torch.equal(found, uncached(model, [prompt], 30, penalty=penalty, temperature=0))
        assert not torch.equal(found[0], plain[i])


@FAMILIES
@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 1, 3], [2, 5], [6, 1]], ids=str)
def test_prefill_in_chunks_gives_the_logits_of_one_pass(values, chunks):
    """However the tokens are divided, the logits are those of one pass without a cache."""
    model = random_model(**values)
    ids = torch.randint(23, (3, 7), generator=seeded(2))
    cache = gpt.KVCache(model.config, 3)
    with torch.no_grad():
        expected = model(ids)[0]
        logits = torch.cat(
            [model(part, cache=cache)[0] for part in ids.split(chunks, dim=1)], dim=1
        )
    assert (logits - expected).abs().max() < 3e-5
    assert cache.pos.tolist() == [7, 7, 7]


@FAMILIES
def test_bfloat16_cache(values):
    """A cache in bfloat16 costs bfloat16's rounding, no more."""
    model = random_model(**values)
    ids = torch.randint(23, (2, 7), generator=seeded(2))
    cache = gpt.KVCache(model.config, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(ids)[0]
        logits = torch.cat(
            [model(part, cache=cache)[0] for part in ids.split([4, 1, 2], dim=1)], dim=1
        )
    assert logits.dtype == torch.float32
    assert 0 < (logits - expected).norm() / expected.norm() < 2e-2


@FAMILIES
def test_lowering_pos_forgets(values):
    """After pos of each row is lowered by its own amount, what was there has no effect."""
    model = random_model(**values)
    first, extra, after = (torch.randint(23, (2, n), generator=seeded(n)) for n in (4, 3, 2))
    cache = gpt.KVCache(model.config, 2)
    with torch.no_grad():
        model(first, cache=cache)
        model(extra, cache=cache)
        cache.pos -= torch.tensor([3, 5])
        logits = model(after, cache=cache)[0]
        for row, kept in ((0, 4), (1, 2)):
            whole = torch.cat((first[row, :kept], after[row]))[None]
            assert (logits[row] - model(whole)[0][0, -2:]).abs().max() < 1e-5
    assert cache.pos.tolist() == [6, 4]


@FAMILIES
def test_training_ignores_the_cache_made_before(values):
    """A pass without a cache is unchanged by one with it, which gives the same loss."""
    model = random_model(**values)
    ids = torch.randint(23, (2, 7), generator=seeded(2))
    with torch.no_grad():
        expected = model(ids, ids)[1]
        loss = model(ids, ids, cache=gpt.KVCache(model.config, 2))[1]
        assert torch.equal(model(ids, ids)[1], expected)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_seeds_decide_the_tokens():
    """The same seed gives the same tokens, another seed others; greedy needs none."""
    model = random_model(**LLAMA)
    runs = [
        cached(model, RAGGED, 20, temperature=1.0, generator=seeded(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(
        cached(model, RAGGED, 20, temperature=0), cached(model, RAGGED, 20, temperature=0)
    )


@pytest.mark.parametrize("prompts", [[[]], [[1, 2], []], torch.zeros(1, 0, dtype=torch.long)])
def test_empty_prompts_are_refused(prompts):
    """A model cannot continue nothing."""
    with pytest.raises(ValueError, match="empty"):
        list(random_model(**LLAMA).generate(prompts, 3))


def test_no_tokens_wanted():
    """max_tokens 0 yields nothing."""
    assert list(random_model(**LLAMA).generate([[1]], 0)) == []


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 8, 64])
def test_context_length(block_size):
    """All tokens while they fit; then half a block to a block, growing by one or falling back."""
    half, lengths = (
        block_size // 2,
        [gpt.context_length(n, block_size) for n in range(6 * block_size + 2)],
    )
    assert lengths[: block_size + 1] == list(range(block_size + 1))
    falls = 0
    for before, now in zip(lengths[block_size:], lengths[block_size + 1 :]):
        assert half + 1 <= now <= block_size
        assert now == before + 1 or (before == block_size and now == half + 1)
        falls += now != before + 1
    assert falls == math.ceil((len(lengths) - 1 - block_size) / (block_size - half))


# ---- Sampling ----
def warped(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Return what transformers' processors make of the logits, in the order of its generate."""
    if temperature != 1:
        logits = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    if min_p:
        logits = MinPLogitsWarper(min_p)(None, logits)
    return logits


def explicit_filter(row, top_k=0, top_p=1.0, min_p=0.0):
    """Return the ids that the filters leave of a row of logits, by plain Python's sorted lists."""
    left = sorted(range(len(row)), key=lambda i: -row[i])
    if top_k:
        left = left[:top_k]
    weights = {i: math.exp(row[i] - row[left[0]]) for i in left}
    total, reached, kept = sum(weights.values()), 0.0, []
    for i in left:
        if top_p == 1 or reached < top_p:
            kept.append(i)
        reached += weights[i] / total
    return {i for i in kept if weights[i] >= min_p * weights[left[0]]}


FILTERS = [
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 9, "top_p": 0.95, "min_p": 0.04},
]


def possible(logits, **filters):
    """Return which ids sample_next can draw, (B, vocab_size) bool.

    The noise is made to let each rank win in turn, if it may win at all.
    """
    found, exponential = torch.zeros_like(logits, dtype=torch.bool), torch.Tensor.exponential_
    try:
        for rank in range(logits.size(1)):

            def favour(noise, rank=rank, generator=None):
                noise.fill_(1.0)
                noise[:, rank : rank + 1] = 1e-30
                return noise

            torch.Tensor.exponential_ = favour
            drawn = gpt.sample_next(logits, temperature=1.0, **{"top_k": 0, "top_p": 1.0} | filters)
            found.scatter_(1, drawn[:, None], True)
    finally:
        torch.Tensor.exponential_ = exponential
    return found


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_equal_transformers_and_plain_python(filters):
    """The ids that can be drawn are transformers' and those of the definitions."""
    logits = 2 * torch.randn(200, 50, generator=seeded(4))
    found = possible(logits, **filters)
    assert torch.equal(found, warped(logits, **filters).isfinite())
    for row, left in zip(logits.tolist(), found):
        assert set(left.nonzero().flatten().tolist()) == explicit_filter(row, **filters)


def test_filters_that_filter_nothing():
    """top_k 0, of the whole vocabulary or beyond, top_p 1 and min_p 0 leave every id."""
    logits = torch.randn(5, 20, generator=seeded(4))
    for top_k in (0, 20, 21, 200):
        assert possible(logits, top_k=top_k).all()


def test_top_p_at_the_exact_border():
    """The fewest ids that reach top_p together: 0.5 needs one of 0.5, just above needs two."""
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    assert possible(logits, top_p=0.5 - 1e-5).tolist() == [[False, True, False, False]]
    assert possible(logits, top_p=0.5 + 1e-5).tolist() == [[True, True, False, False]]
    assert possible(logits, top_p=0.75 + 1e-5).sum() == 3
    quarters = torch.zeros(1, 4)  # each has exactly 0.25, so two of them reach exactly 0.5
    assert possible(quarters, top_p=0.5).sum() == 2


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0, "top_k": 3, "min_p": 0.5},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-9},
        {"temperature": 2.0, "min_p": 1.0},
        {"temperature": 1e-4},
    ],
    ids=str,
)
def test_settings_that_leave_only_the_likeliest(sampling):
    """Temperature 0 or nearly, top_k 1, a tiny top_p and min_p 1 are all greedy."""
    logits = torch.randn(300, 30, generator=seeded(4))
    expected = [max(range(30), key=row.__getitem__) for row in logits.tolist()]
    assert gpt.sample_next(logits, generator=seeded(1), **sampling).tolist() == expected


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 0.8, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_softmax(sampling):
    """20,000 draws pass a chi-square test at one in a thousand; none is outside of the filters."""
    logits = torch.tensor([1.2, -0.4, 0.3, 2.0, -1.5, 0.9, 0.0, -0.2])
    off = {"top_k": 0, "top_p": 1.0}
    drawn = gpt.sample_next(logits.expand(20_000, -1), generator=seeded(11), **off | sampling)
    expected = warped(logits[None], **sampling)[0].double().softmax(-1) * 20_000
    counts, possible = torch.bincount(drawn, minlength=8).double(), expected > 0
    assert counts[~possible].sum() == 0
    statistic = float(((counts - expected) ** 2 / expected)[possible].sum())
    borders = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
    assert statistic < borders[int(possible.sum()) - 1]


def test_rows_are_drawn_independently():
    """Two rows of one batch agree as often as two draws do."""
    drawn = gpt.sample_next(torch.zeros(2 * 20_000, 10), 1.0, 0, 1.0, generator=seeded(5)).view(
        2, -1
    )
    assert float((drawn[0] == drawn[1]).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_half_precision_logits_are_filtered_in_float32():
    """bfloat16 logits give the draws of their float32 values."""
    logits = torch.randn(500, 300, generator=seeded(4)).bfloat16()
    assert torch.equal(
        gpt.sample_next(logits, generator=seeded(5)),
        gpt.sample_next(logits.float(), generator=seeded(5)),
    )


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 5.0])
def test_penalty_equals_transformers(penalty):
    """Logits of ids seen before become what transformers' processor makes of them."""
    logits, ids = (
        torch.randn(4, 20, generator=seeded(4)),
        torch.randint(20, (4, 9), generator=seeded(5)),
    )
    logits[0, ids[0, 0]] = 0.0
    seen = torch.zeros(4, 20, dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        for token in tokens:
            seen[row, token] = True
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(sample.penalize(logits, seen, penalty), expected)


# ---- Text ----
class ScriptedModel:
    """Yields the given ids; keeps what it was asked for."""

    def __init__(self, ids):
        self.ids, self.drawn = ids, 0

    def generate(self, idx, max_tokens, **sampling):
        self.asked = (idx, max_tokens, sampling)
        for token in self.ids[:max_tokens]:
            self.drawn += 1
            yield torch.tensor([token])


class PieceTokenizer:
    """Ids of the given byte strings."""

    def __init__(self, pieces):
        self.pieces, self.special_tokens, self.begin_id, self.end_ids = pieces, {}, None, []

    def encode(self, text):
        return [ord(c) for c in text]

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)


def pieces_of(pieces, stop=(), max_tokens=None):
    """Return (text pieces, ids drawn) of a model that says the byte strings one after the other."""
    model = ScriptedModel(list(range(len(pieces))))
    n = len(pieces) if max_tokens is None else max_tokens
    return list(sample.generate_text(model, PieceTokenizer(pieces), "?", n, stop)), model.drawn


def test_text_arrives_piece_by_piece():
    """Where no stop string may begin, a token's text is yielded at once; arguments go on."""
    for stop in ([], ["<|endoftext|>"], ["two.", "onetwo"]):
        model = ScriptedModel([0, 1, 2])
        pieces = PieceTokenizer([b"one ", b"two ", b"three"])
        stream = sample.generate_text(model, pieces, "ab", 3, stop, top_k=5)
        assert next(stream) == "one " and model.drawn == 1
        assert next(stream) == "two " and model.drawn == 2
        assert "".join(stream) == "three"
        assert model.asked == ([[97, 98]], 3, {"top_k": 5})


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (
            [b"a <", b"|end", b"|> b", b"<"],
            ["<|endoftext|>"],
            ["a ", "a ", "a <|end|> b", "a <|end|> b"],
        ),
        ([b"x\n", b"\n", b"y"], ["\n\n\n"], ["x", "x", "x\n\ny"]),
        ([b"aab", b"aab"], ["aaba" + "x"], ["", "aab"]),
        ([b"ab", b"c", b"d"], ["bcX", "cdX"], ["a", "a", "ab"]),
        ([b"a", b"b", b"c"], ["X"], ["a", "ab", "abc"]),
    ],
    ids=str,
)
def test_only_what_may_begin_a_stop_string_is_held_back(pieces, stop, shown):
    """After each token all text is shown but its longest end that begins a stop string."""
    model, so_far, when = ScriptedModel(list(range(len(pieces)))), "", {}
    for piece in sample.generate_text(model, PieceTokenizer(pieces), "?", len(pieces), stop):
        if len(when) == model.drawn:  # the last one comes after the last token
            continue
        so_far += piece
        when[model.drawn] = so_far
    assert list(when.values()) == shown


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "drawn"),
    [
        ([b"a", b"b", b"END", b"c"], ["END"], "ab", 3),
        ([b"a", b"xE", b"N", b"Dy", b"c"], ["END"], "ax", 4),
        ([b"END"], ["END"], "", 1),
        ([b"E", b"EN", b"D."], ["END"], "E", 3),
        ([b"one. two; three"], [";", "."], "one", 1),
        ([b"a", b"bc", b"d"], ["bcd", "c"], "ab", 2),
        ([b"aaa", b"ab"], ["aab"], "aa", 2),
        ([b"\n", b"\n", b"x"], ["\n\n"], "", 2),
        ([b"caf\xc3", b"\xa9 and", b" more"], ["\u00e9"], "caf", 2),
    ],
    ids=str,
)
def test_text_ends_before_a_stop_string(pieces, stop, text, drawn):
    """The first stop string, in one token or over several, ends the text and is not shown."""
    found, n = pieces_of(pieces, stop)
    assert "".join(found) == text
    assert n == drawn


@pytest.mark.parametrize(
    ("pieces", "stop"),
    [
        ([b"a", b"E", b"N", b"d", b"z"], ["END"]),
        ([b"aEN"], ["END"]),
        ([b"a", b"E", b"N"], ["END", "zz"]),
        ([b"aab", b"aab"], ["aaba" + "x"]),
        ([b"x"], ["a very long stop string"]),
        ([], ["END"]),
    ],
    ids=str,
)
def test_beginnings_of_a_stop_string_are_shown_in_the_end(pieces, stop):
    """What only began like a stop string is not lost."""
    assert "".join(pieces_of(pieces, stop)[0]) == b"".join(pieces).decode()


def test_nothing_of_a_stop_string_is_shown_early():
    """No piece, at the time it is yielded, holds characters that a stop string later takes back."""
    pieces = [bytes([b]) for b in b"hello STOPPER then STOP here"]
    for stop in (["STOP "], ["STOP", "en"], ["STOPPED", "here"]):
        whole = b"".join(pieces).decode()
        end = min((whole.index(s) for s in stop if s in whole), default=len(whole))
        so_far = ""
        for piece in pieces_of(pieces, stop)[0]:
            so_far += piece
            assert whole[:end].startswith(so_far)
        assert so_far == whole[:end]


@pytest.mark.parametrize("stop", [(), ["xyz"]])
@pytest.mark.parametrize(
    "text", ["na\u00efve caf\u00e9", "\u65e5\u672c\u8a9e", "ok \U0001f600 \u2713"]
)
def test_characters_split_over_tokens(text, stop):
    """With one byte per token every character still comes out whole, and never as a replacement."""
    found, _ = pieces_of([bytes([b]) for b in text.encode()], stop)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize(
    "pieces", [[b"a", b"\xe6\x97"], [b"a", b"\xff", b"b"], [b"\xe6", b"b"]], ids=str
)
def test_bytes_that_are_no_text(pieces):
    """Broken UTF-8, and a character that is cut off, become what decoding all at once gives."""
    assert "".join(pieces_of(pieces)[0]) == b"".join(pieces).decode(errors="replace")


def test_pieces_join_to_the_decoded_tokens():
    """With a real model and tokenizer the pieces are the decoded tokens of generate."""
    model, tokenizer = (
        random_model(**LLAMA),
        gpt.Tokenizer("char", "abcdefghijklmnopqrs\u00e9\u65e5\n "),
    )
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    ids = [
        int(t)
        for t in model.generate([tokenizer.encode("cab")], 50, generator=seeded(3), **sampling)
    ]
    pieces = list(
        sample.generate_text(model, tokenizer, "cab", 50, generator=seeded(3), **sampling)
    )
    text = "".join(tokenizer.state["chars"][i] for i in ids)
    assert "".join(pieces) == text and len(text) == 50
    stop = text[20:23]
    ended = "".join(
        sample.generate_text(model, tokenizer, "cab", 50, [stop], generator=seeded(3), **sampling)
    )
    assert ended == text[: text.index(stop)]
