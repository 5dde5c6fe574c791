# python gpt.py config/train_shakespeare.py
# HEADER2
# Character-level tiny Shakespeare, sized to the device that is found.
dataset = "shakespeare"
eval_interval = 250
if device_type == "cpu":
    max_minutes = 2.0  # 0.8M parameters, which is the file's default size
else:
    n_layer = n_head = 6  # 10.6M parameters, of which a GPU trains 5,000 steps in minutes
    n_kv_head = 6
    n_embd = 384
    dropout = 0.2
    batch_size = 64
    max_iters = 2000
    muon_lr = 0.02
    learning_rate = 4e-3
