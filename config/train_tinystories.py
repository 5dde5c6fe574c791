# python prepare.py tinystories --tokenizer=bpe && python gpt.py config/train_tinystories.py
# Preparing the data needs pip install datasets. The stories use few different words
# (arXiv:2305.07759), and the vocabulary has 8,192 tokens, so even small models can write whole
# stories. Not run; estimate: less than half an hour on one H200.
dataset = "tinystories"
tie_weights = True
if device_type == "cpu":  # gpt.py fits the model to the minutes
    max_minutes = max_minutes or 30.0
else:
    block_size = 512
    n_layer = 8
    n_head = 8
    n_kv_head = 4
    n_embd = 512
    batch_size = 64
    max_iters = 15_000  # of 32,768 tokens, about one epoch
    muon_lr = 0.02
    muon_momentum = 0.95
    learning_rate = 3e-3
    lr_schedule = "wsd"
    warmup_iters = 200
    eval_interval = 1000
    eval_iters = 100
    log_interval = 20
