# python gpt.py config/train_pydoc.py
# 2 minutes on a CPU; it then begins to learn the text by heart. GPU: not measured yet.
# The documentation that ships with Python, by characters: works without a network.
dataset = "pydoc"
if device_type == "cpu":
    max_minutes = 2.0
    if not native_bfloat16 or dtype == "float32":  # 4 times slower: a smaller model, a shorter context
        n_layer, block_size, batch_size = 3, 128, 16
        muon_lr = 0.04
else:
    n_layer, n_head, n_kv_head, n_embd = 6, 6, 6, 384
    dropout = 0.2
    batch_size = 64
    max_iters = 2000
    muon_lr, muon_momentum, learning_rate = 0.02, 0.95, 4e-3
