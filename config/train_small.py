# python gpt.py config/train_small.py
# 24.9M parameters with Shakespeare's 65 characters. Loss and time: not yet measured; meant for a GPU.
# For other data --dataset=NAME; the count that gpt.py prints is that of the vocabulary in use.
dataset = "shakespeare"
block_size = 256
n_layer, n_head, n_kv_head, n_embd = 7, 9, 3, 576
dropout = 0.3
batch_size = 64
max_iters, eval_interval = 3000, 250
muon_lr, muon_momentum, learning_rate = 0.02, 0.95, 4e-3
weight_decay = 0.1
