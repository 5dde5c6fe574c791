# python prepare.py tinystories --tokenizer=bpe && python gpt.py config/train_tinystories.py
# Data by pip install datasets. Stories of few words (arXiv:2305.07759), a vocabulary of 8,192: small models
# write whole ones. Not measured yet.
dataset = "tinystories"
tie_weights = True
block_size = 512
if device_type == "cpu":
    n_layer, n_embd = 6, 192
    batch_size = 8
    max_minutes = 30.0
else:
    n_layer, n_head, n_kv_head, n_embd = 8, 8, 4, 512
    batch_size = 64
    max_iters = 15_000  # of 32,768 tokens, about one epoch
    muon_lr, muon_momentum, learning_rate = 0.02, 0.95, 3e-3
    lr_schedule = "wsd"
    warmup_iters = 200
    eval_interval, eval_iters, log_interval = 1000, 100, 20
