# python gpt.py config/train_large.py
# Data first: python prepare.py --input=FOLDER --name=mytext --tokenizer=gpt2
# 350.6M parameters with GPT-2's 50,257 tokens, for large GPUs. Not run; estimate: 35 hours
# on one H200, 4.8 on eight.
dataset = "mytext"
tie_weights = True
block_size = 1024
n_layer = 26
n_head = 16
n_kv_head = 8
n_embd = 1024
batch_size = 16
gradient_accumulation_steps = 32  # 524,288 tokens per step
max_iters = 40_000
eval_interval = 1000
warmup_iters = 500
lr_schedule = "wsd"
muon_lr = 0.02
muon_momentum = 0.95
learning_rate = 1e-3
weight_decay = 0.1
