"""GPT-2's sizes in, transformers' config.json out, and back; what is not GPT-2 is refused."""

from __future__ import annotations

import json
import os
from typing import Any

from ..common.hparams import HParams
from ..encoder import END_OF_TEXT, Encoder

CONFIG_FILE = "config.json"

# Names of GELU's tanh form, which GPT-2 has.
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast")

# What a config.json must say where it says anything, and why a model with another value is not
# computed as GPT-2 is here.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_function": (_TANH_GELU, "GPT-2 has GELU's tanh form"),
    "layer_norm_epsilon": ((1e-5,), "GPT-2 adds this to the variance"),
    "scale_attn_weights": ((True,), "GPT-2 divides the scores by the root of the head's width"),
    "scale_attn_by_inverse_layer_idx": ((False,), "GPT-2 scales all blocks alike"),
    "add_cross_attention": ((False,), "GPT-2 has no second attention"),
    "is_encoder_decoder": ((False,), "GPT-2 is a decoder alone"),
    "tie_word_embeddings": ((True,), "GPT-2 has one matrix for tokens in and logits out"),
    "pruned_heads": ((None, {}), "all blocks of GPT-2 have as many heads"),
    "quantization_config": ((None, {}), "only float32, float16 and bfloat16 can be read"),
}

# The sizes: their names in config.json, and transformers' default.
_SIZES = {
    "n_vocab": (("vocab_size",), 50257),
    "n_ctx": (("n_positions", "max_position_embeddings"), 1024),
    "n_embd": (("n_embd", "hidden_size"), 768),
    "n_head": (("n_head", "num_attention_heads"), 12),
    "n_layer": (("n_layer", "num_hidden_layers"), 12),
}


def config_of(hparams: HParams, vocabulary: Encoder, precision: str) -> dict[str, Any]:
    """The content of config.json for GPT2LMHeadModel; `precision` is that of the weights."""
    end_of_text = vocabulary.end_of_text
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": end_of_text,
        "embd_pdrop": 0.1,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_ctx": hparams.n_ctx,
        "n_embd": hparams.n_embd,
        "n_head": hparams.n_head,
        "n_inner": None,
        "n_layer": hparams.n_layer,
        "n_positions": hparams.n_ctx,
        "resid_pdrop": 0.1,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "torch_dtype": precision,
        "use_cache": True,
        "vocab_size": hparams.n_vocab,
    }


def generation_config_of(vocabulary: Encoder) -> dict[str, Any]:
    """The content of generation_config.json."""
    return {
        "_from_model_config": True,
        "bos_token_id": vocabulary.end_of_text,
        "eos_token_id": vocabulary.end_of_text,
    }


def tokenizer_config_of(hparams: HParams, vocabulary: Encoder) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        # transformers would else remove the space before a full stop when it decodes.
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": hparams.n_ctx,
        "tokenizer_class": "GPT2Tokenizer",
        **special_tokens_of(vocabulary),
    }


def special_tokens_of(vocabulary: Encoder) -> dict[str, Any]:
    """The content of special_tokens_map.json."""
    token = None if vocabulary.end_of_text is None else END_OF_TEXT
    return {"bos_token": token, "eos_token": token, "unk_token": token}


def read_config(folder: str) -> HParams:
    """The sizes that a folder's config.json states.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is no JSON object, or describes another model than GPT-2 as it is computed
            here; names the field.
    """
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        is_adapter = os.path.isfile(os.path.join(folder, "adapter_config.json"))
        what = (
            "it holds an adapter of peft. Merge it into its model first, by merge_and_unload()"
            if is_adapter
            else "it holds no model of transformers"
        )
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: {what}")
    config = read_json_object(path)
    if config.get("model_type") != "gpt2":
        raise ValueError(
            f"{path}: model_type={config.get('model_type')!r} is not 'gpt2': only GPT-2 can be "
            "imported"
        )
    for field, (allowed, reason) in _FIXED.items():
        if field in config and config[field] not in allowed:
            raise ValueError(
                f"{path}: {field}={config[field]!r} is not computed here ({reason}): it must be "
                f"{allowed[0]!r}"
            )
    sizes = {name: _size(config, names, default) for name, (names, default) in _SIZES.items()}
    hparams = HParams()
    try:
        hparams.override_from_dict(sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    n_inner = config.get("n_inner")
    if n_inner is not None and n_inner != 4 * hparams.n_embd:
        raise ValueError(
            f"{path}: n_inner={n_inner!r} is not computed here: it must be 4 * n_embd = "
            f"{4 * hparams.n_embd}"
        )
    return hparams


def _size(config: dict[str, Any], names: tuple[str, ...], default: int) -> Any:
    return next((config[name] for name in names if name in config), default)


def read_json_object(path: str) -> dict[str, Any]:
    """A file's JSON object. Raises ValueError if it is none; names the file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {str(content)[:40]!r} where an object should be")
    return content
