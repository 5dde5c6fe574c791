# python gpt.py config/train_tiny.py
# 9.8M parameters with Shakespeare's 65 characters, for a GPU. Not run; estimate:
# minutes on a large GPU, for 49 million tokens.
# For other data use --dataset=NAME. gpt.py prints the resulting number of parameters.
dataset = "shakespeare"
block_size = 256
n_layer = 6
n_head = 6
n_kv_head = 3
n_embd = 384
dropout = 0.2
batch_size = 64
max_iters = 3000
eval_interval = 250
muon_lr = 0.02
muon_momentum = 0.95
learning_rate = 4e-3
weight_decay = 0.1
