# torchrun --standalone --nproc_per_node=8 gpt.py config/train_fineweb_edu.py
# Data first: pip install datasets && python prepare.py fineweb-edu --val_fraction=0.001
# (or a tenth of it, with --max_tokens=1_000_000_000)
# This trains a modern model of GPT-2's size on educational web pages, about 10B of GPT-2's
# tokens. Not run; estimate: 5.0 hours on one H200, 0.7 on eight.
dataset = "fineweb-edu"
tie_weights = True
block_size = 1024
n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
batch_size = 16
gradient_accumulation_steps = 32  # 524,288 tokens per step over all GPUs
muon_lr = 0.02
muon_momentum = 0.95
learning_rate = 3e-3
lr_schedule = "wsd"
warmup_iters = 250
max_iters = 19_000  # one epoch
eval_interval = 250
eval_iters = 100
log_interval = 10
