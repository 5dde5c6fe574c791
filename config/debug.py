# python gpt.py config/debug.py
# 2 CPU cores (AMD EPYC, AVX2; torch 2.13): validation loss 3.55 in 6 seconds.
# Everything once, in seconds: data, training, evaluation, checkpoint, sample. The text it writes is noise.
from pathlib import Path

dataset = "pydoc"
out_dir = str(Path(__file__).resolve().parent.parent / "out" / "debug")
n_layer, n_head, n_kv_head, n_embd = 2, 4, 2, 32
block_size, batch_size = 32, 8
max_iters, warmup_iters, eval_interval, eval_iters, log_interval = 20, 5, 10, 5, 5
sample_tokens = 100
