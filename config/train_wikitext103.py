# python prepare.py wikitext-103 --clean=wikitext && python gpt.py config/train_wikitext103.py
# Data by pip install datasets.
# 103M words of Wikipedia in GPT-2's tokens, by a model of 60.5M parameters. Not yet measured.
dataset = "wikitext-103"
tie_weights = True
block_size = 512
n_layer, n_head, n_kv_head, n_embd = 12, 8, 4, 512
dropout = 0.1
batch_size = 16
gradient_accumulation_steps = 8  # 65,536 tokens per step over all GPUs
muon_lr, muon_momentum, learning_rate = 0.02, 0.95, 3e-3
lr_schedule = "wsd"
warmup_iters = 200
max_iters = 9000  # 590M tokens, about 5 epochs
eval_interval, eval_iters, log_interval = 500, 100, 20
