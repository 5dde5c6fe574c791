# python gpt.py config/train_pydoc.py
# On 2 CPU cores (AMD EPYC; torch 2.13) the validation loss after its 2 minutes is 1.12 with
# AVX512-BF16 (two seeds) and 1.11 when held to AVX2 (one seed). GPU: not measured yet.
# The text is the documentation that ships with Python, by characters, so it needs no network. There
# is so little of it that a model soon overfits. That is why dropout, weight_decay and
# train_temperature are set.
dataset = "pydoc"
if device_type == "cpu":
    max_minutes = 2.0
    dropout = 0.05
    weight_decay = 0.05
    train_temperature = 0.87
    if native_bfloat16 and dtype != "float32":
        n_embd = 192
        batch_size = 16
        learning_rate = 8e-3
    else:  # 4 times slower, so the model is smaller and the context shorter
        n_layer = 3
        block_size = 128
        batch_size = 16
        muon_lr = 0.04
else:
    n_layer = 6
    n_head = 6
    n_kv_head = 6
    n_embd = 384
    dropout = 0.2
    batch_size = 64
    max_iters = 2000
    muon_lr = 0.02
    muon_momentum = 0.95
    learning_rate = 4e-3
