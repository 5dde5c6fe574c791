# python prepare.py --input=FOLDER --name=mytext --tokenizer=gpt2 && python gpt.py config/train_large.py
# 350.6M parameters with GPT-2's 50,257 tokens. Loss and time: not yet measured; meant for several large GPUs.
dataset = "mytext"
tie_weights = True
block_size = 1024
n_layer, n_head, n_kv_head, n_embd = 26, 16, 8, 1024
batch_size = 16
gradient_accumulation_steps = 32  # 524,288 tokens per step
max_iters, eval_interval, warmup_iters = 40_000, 1000, 500
lr_schedule = "wsd"
muon_lr, muon_momentum, learning_rate = 0.02, 0.95, 1e-3
weight_decay = 0.1
