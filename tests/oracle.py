"""GPT-2 in NumPy: what the TensorFlow graph is compared with. Names as in the checkpoints."""

import numpy as np


def random_weights(hparams, seed=0, scale=0.1):
    """{variable name: float32 array} of the checkpoint's shapes, large enough to matter."""
    rng = np.random.default_rng(seed)
    width = hparams.n_embd
    shapes = {"wte": [hparams.n_vocab, width], "wpe": [hparams.n_ctx, width]}
    for layer in range(hparams.n_layer):
        for name, nx, nf in [
            ("attn/c_attn", width, 3 * width),
            ("attn/c_proj", width, width),
            ("mlp/c_fc", width, 4 * width),
            ("mlp/c_proj", 4 * width, width),
        ]:
            shapes[f"h{layer}/{name}/w"] = [1, nx, nf]
            shapes[f"h{layer}/{name}/b"] = [nf]
        for norm in ["ln_1", "ln_2"]:
            shapes[f"h{layer}/{norm}/g"] = [width]
            shapes[f"h{layer}/{norm}/b"] = [width]
    shapes["ln_f/g"] = [width]
    shapes["ln_f/b"] = [width]
    weights = {}
    for name, shape in shapes.items():
        centre = 1.0 if name.endswith("/g") else 0.0
        weights[f"model/{name}"] = (centre + scale * rng.standard_normal(shape)).astype(np.float32)
    return weights


def layer_norm(x, g, b):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * g + b


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def logits(weights, hparams, tokens, dtype=np.float64):
    """Token ids [time] -> logits [time, n_vocab], computed in `dtype`."""
    w = {name.removeprefix("model/"): value.astype(dtype) for name, value in weights.items()}
    time = len(tokens)
    hidden_keys = np.triu(np.full([time, time], -np.inf, dtype), 1)
    x = w["wte"][tokens] + w["wpe"][:time]
    for layer in range(hparams.n_layer):
        p = {k.removeprefix(f"h{layer}/"): v for k, v in w.items() if k.startswith(f"h{layer}/")}
        qkv = layer_norm(x, p["ln_1/g"], p["ln_1/b"]) @ p["attn/c_attn/w"][0] + p["attn/c_attn/b"]
        heads = [np.split(part, hparams.n_head, -1) for part in np.split(qkv, 3, -1)]
        scale = np.sqrt(hparams.n_embd // hparams.n_head)
        out = [softmax(q @ k.T / scale + hidden_keys) @ v for q, k, v in zip(*heads, strict=True)]
        x = x + np.concatenate(out, -1) @ p["attn/c_proj/w"][0] + p["attn/c_proj/b"]
        fc = gelu(layer_norm(x, p["ln_2/g"], p["ln_2/b"]) @ p["mlp/c_fc/w"][0] + p["mlp/c_fc/b"])
        x = x + fc @ p["mlp/c_proj/w"][0] + p["mlp/c_proj/b"]
    return layer_norm(x, w["ln_f/g"], w["ln_f/b"]) @ w["wte"].T


def loss(weights, hparams, batch):
    """Mean cross-entropy in nats over next tokens of int batch [batch, time]."""
    losses = []
    for tokens in batch:
        probabilities = softmax(logits(weights, hparams, tokens[:-1]))
        losses.append(-np.log(probabilities[np.arange(len(tokens) - 1), tokens[1:]]))
    return float(np.mean(losses))
