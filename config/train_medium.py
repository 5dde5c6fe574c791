# python prepare.py --input=FOLDER --name=mytext --tokenizer=gpt2 && python gpt.py config/train_medium.py
# 81.5M parameters with GPT-2's 50,257 tokens. Loss and time: not yet measured; meant for a large GPU.
dataset = "mytext"
tie_weights = True
block_size = 512
n_layer, n_head, n_kv_head, n_embd = 11, 10, 5, 640
batch_size = 32
gradient_accumulation_steps = 4  # 65,536 tokens per step
max_iters, eval_interval, warmup_iters = 20_000, 500, 200
lr_schedule = "wsd"
muon_lr, muon_momentum, learning_rate = 0.02, 0.95, 2e-3
weight_decay = 0.1
