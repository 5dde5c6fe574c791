# python prepare.py wikitext-103 --clean=wikitext && python gpt.py config/train_wikitext103.py
# Preparing the data needs pip install datasets.
# A model of 60.5M parameters learns from 103M words of Wikipedia in GPT-2's tokens. Not
# run; estimate: a quarter of an hour on one H200.
dataset = "wikitext-103"
tie_weights = True
block_size = 512
n_layer = 12
n_head = 8
n_kv_head = 4
n_embd = 512
dropout = 0.1
batch_size = 16
gradient_accumulation_steps = 8  # 65,536 tokens per step over all GPUs
muon_lr = 0.02
muon_momentum = 0.95
learning_rate = 3e-3
lr_schedule = "wsd"
warmup_iters = 200
max_iters = 9000  # 590M tokens, about 5 epochs
eval_interval = 500
eval_iters = 100
log_interval = 20
