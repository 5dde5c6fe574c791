# python gpt.py config/train_small.py
# 24.9M parameters with Shakespeare's 65 characters, for a GPU. Not run; estimate:
# minutes on a large GPU, for 49 million tokens.
# For other data use --dataset=NAME. gpt.py prints the resulting number of parameters.
dataset = "shakespeare"
block_size = 256
n_layer = 7
n_head = 9
n_kv_head = 3
n_embd = 576
dropout = 0.3
batch_size = 64
max_iters = 3000
eval_interval = 250
muon_lr = 0.02
muon_momentum = 0.95
learning_rate = 4e-3
weight_decay = 0.1
