# python gpt.py config/train_medium.py
# Data first: python prepare.py --input=FOLDER --name=mytext --tokenizer=gpt2
# 81.5M parameters with GPT-2's 50,257 tokens, for a large GPU. Not run; estimate: half
# an hour on one H200.
dataset = "mytext"
tie_weights = True
block_size = 512
n_layer = 11
n_head = 10
n_kv_head = 5
n_embd = 640
batch_size = 32
gradient_accumulation_steps = 4  # 65,536 tokens per step
max_iters = 20_000
eval_interval = 500
warmup_iters = 200
lr_schedule = "wsd"
muon_lr = 0.02
muon_momentum = 0.95
learning_rate = 2e-3
weight_decay = 0.1
