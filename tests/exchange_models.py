"""Models with random weights: as a folder of ours, and as one that transformers would write."""

import json
from pathlib import Path

import numpy as np
import oracle

from gpt_2_simple.common.hparams import HParams
from gpt_2_simple.data.vocabulary import byte_vocabulary, save_vocabulary
from gpt_2_simple.encoder import Encoder, token_of_text
from gpt_2_simple.storage import checkpoint_tensors

HPARAMS = HParams(n_vocab=257, n_ctx=32, n_embd=32, n_head=2, n_layer=3)


def write_ours(folder, hparams=HPARAMS, vocabulary=None, weights=None):
    """A model's folder; returns its weights."""
    weights = oracle.random_weights(hparams) if weights is None else weights
    save_vocabulary(vocabulary or byte_vocabulary(), folder)
    with checkpoint_tensors.write_checkpoint(str(folder)) as write:
        for name, value in weights.items():
            write(name, value)
    checkpoint_tensors.write_model_files(str(folder), hparams)
    return weights


def with_added_tokens(vocabulary):
    """The vocabulary with three more tokens, which are found in texts as a whole."""
    added = ["<|startoftext|>", "[PAD]", "مرحبا"]
    tokens = {token_of_text(text): vocabulary.n_vocab + i for i, text in enumerate(added)}
    return Encoder({**vocabulary.encoder, **tokens}, vocabulary.bpe_merges)


def as_transformers(weights, prefix="transformer."):
    """The weights under transformers' names, without the axis of size 1."""
    found = {}
    for name, value in weights.items():
        path = name.removeprefix("model/").replace("/", ".")
        path = "h." + path[1:] if path.startswith("h") else path
        stem, _, last = path.rpartition(".")
        if last in ("g", "w"):
            path = f"{stem}.weight"
        elif last == "b":
            path = f"{stem}.bias"
        else:
            path += ".weight"
        is_matrix = last == "w"
        found[prefix + path] = value[0] if is_matrix else value
    return found


def write_transformers(folder, hparams=HPARAMS, weights=None, prefix="transformer.", **config):
    """A folder as transformers writes it, with the bytes as tokens; `config` changes fields."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    weights = oracle.random_weights(hparams) if weights is None else weights
    folder.mkdir(parents=True)
    save_file(as_transformers(weights, prefix), folder / "model.safetensors", {"format": "pt"})
    sizes = {
        "vocab_size": hparams.n_vocab, "n_positions": hparams.n_ctx, "n_embd": hparams.n_embd,
        "n_head": hparams.n_head, "n_layer": hparams.n_layer,
    }  # fmt: skip
    fields = {"model_type": "gpt2", "activation_function": "gelu_new", "n_inner": None}
    fields |= {"layer_norm_epsilon": 1e-05, "tie_word_embeddings": True, "pruned_heads": {}}
    fields |= sizes | config
    (folder / "config.json").write_text(json.dumps(fields))
    vocabulary = byte_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary.encoder))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return weights


def change_tensors(folder, change):
    """Rewrites model.safetensors with the tensors as `change` leaves them."""
    from safetensors.numpy import load_file, save_file

    path = Path(folder, "model.safetensors")
    tensors = {name: np.array(value) for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def read_ours(folder):
    """The weights of a model's folder, by name."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(Path(folder, "model.ckpt")))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def assert_weights_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
