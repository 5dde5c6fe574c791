# python gpt.py config/debug.py
# 2 CPU cores (AMD EPYC, AVX2; torch 2.13): validation loss 3.55 in 6 seconds.
# This runs everything once, in seconds: data, training, evaluation, checkpoint and sample. The text
# that it writes is noise.
from pathlib import Path

dataset = "pydoc"
out_dir = str(Path(__file__).resolve().parent.parent / "out" / "debug")
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 32
block_size = 32
batch_size = 8
max_iters = 20
warmup_iters = 5
eval_interval = 10
eval_iters = 5
log_interval = 5
sample_tokens = 100
