"""A vocabulary in, transformers' tokenizer files out, and back."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..encoder import (
    END_OF_TEXT,
    MERGES_HEADER,
    Encoder,
    read_merges,
    read_vocabulary,
    token_of_text,
)
from .config_file import read_json_object

TOKENIZER_FILE, VOCABULARY_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
ADDED_TOKENS_FILE, CONFIG_FILE = "added_tokens.json", "tokenizer_config.json"

_BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
_EMPTY = (None, "", False)


def tokenizer_files(vocabulary: Encoder) -> dict[str, str]:
    """The contents of tokenizer.json, vocab.json and merges.txt, by the files' names."""
    merges = [f"{left} {right}" for left, right in vocabulary.bpe_merges]
    special = {token_id: text for text, token_id in vocabulary.special_tokens.items()}
    # transformers looks for an added token by its text, and not in the characters of the others.
    tokens = {special.get(i, token): i for token, i in vocabulary.encoder.items()}
    return {
        TOKENIZER_FILE: json.dumps(
            _tokenizer(vocabulary, tokens, merges), ensure_ascii=False, indent=1
        ),
        VOCABULARY_FILE: json.dumps(tokens, ensure_ascii=False),
        MERGES_FILE: "\n".join([f"{MERGES_HEADER}: 0.2", *merges, ""]),
    }


def _tokenizer(vocabulary: Encoder, tokens: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """The tokenizer in the format of the tokenizers library, which all its releases read."""
    added_tokens = [
        {
            "id": token_id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": text == END_OF_TEXT,
        }
        for text, token_id in sorted(vocabulary.special_tokens.items(), key=lambda item: item[1])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {**_BYTE_LEVEL, "add_prefix_space": False},
        "post_processor": {**_BYTE_LEVEL, "add_prefix_space": True, "trim_offsets": False},
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokens,
            "merges": merges,
        },
    }


# --- read ---------------------------------------------------------------------------------------


class ImportedVocabulary(NamedTuple):
    """A tokenizer as our vocabulary.

    Attributes:
        encoder: tokens and merges.
        notes: what the user should know of it, in sentences.
    """

    encoder: Encoder
    notes: list[str]


def read_tokenizer(folder: str, n_vocab: int) -> ImportedVocabulary:
    """The vocabulary of a folder's tokenizer.json, or of its vocab.json and merges.txt.

    Embedding rows without a token, which pad the matrix, get tokens `<|unused50257|>`.

    Args:
        folder: a model's folder, as transformers writes it.
        n_vocab: rows of the model's token embedding.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it is damaged, or splits text otherwise than GPT-2's; or its tokens are more
            than the embedding's rows.
    """
    path = os.path.join(folder, TOKENIZER_FILE)
    pair = [Path(folder, name) for name in (VOCABULARY_FILE, MERGES_FILE)]
    added: dict[str, int] = {}
    if os.path.isfile(path):
        tokens, merges, added = _read_tokenizer_file(path)
    elif all(part.is_file() for part in pair):
        path = str(pair[0])
        tokens, merges = read_vocabulary(pair[0]), read_merges(pair[1])
    else:
        raise FileNotFoundError(
            f"{folder} has neither {TOKENIZER_FILE} nor {VOCABULARY_FILE} with {MERGES_FILE}: "
            "copy them from the model that this one was trained from"
        )
    added |= _read_added_tokens(folder)
    notes = _notes(folder, tokens, added)
    tokens = {token: i for token, i in tokens.items() if token not in added}
    tokens |= {token_of_text(text): i for text, i in added.items()}
    if max(tokens.values(), default=0) >= n_vocab:
        raise ValueError(
            f"{path} has tokens up to id {max(tokens.values())}, and the model's embedding has "
            f"{n_vocab} rows (vocab_size): the files belong to different models"
        )
    unused = sorted(set(range(n_vocab)) - set(tokens.values()))
    if unused:
        notes.append(
            f"{len(unused)} rows of the embedding have no token; they are named "
            f"<|unused{unused[0]}|> and so on"
        )
    tokens |= {f"<|unused{token_id}|>": token_id for token_id in unused}
    try:
        return ImportedVocabulary(Encoder(tokens, merges), notes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tokenizer_file(
    path: str,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    """The tokens, the merges, and the added tokens."""
    content = read_json_object(path)
    try:
        _check_tokenizer(content)
        model = content["model"]
        tokens = {str(token): _token_id(value) for token, value in model["vocab"].items()}
        merges = [_merge(pair) for pair in model["merges"]]
        added = {entry["content"]: _token_id(entry["id"]) for entry in content["added_tokens"]}
        return tokens, merges, added
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {_told(error)}") from error


def _told(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _token_id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no token id")
    return value


def _merge(pair: Any) -> tuple[str, str]:
    """Old files have 'a b', new ones ['a', 'b']."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return str(left), str(right)


def _check_tokenizer(content: dict[str, Any]) -> None:
    """Raises ValueError if text would get other token ids than here; names the field."""
    model = content["model"]
    splitter = content.get("pre_tokenizer") or {}
    if splitter.get("type") == "Sequence" and len(splitter["pretokenizers"]) == 1:
        splitter = splitter["pretokenizers"][0]
    wanted = {
        "model.type": (model.get("type", "BPE"), ("BPE",)),
        "model.dropout": (model.get("dropout"), (None, 0.0)),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix"), _EMPTY),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix"), _EMPTY),
        "model.byte_fallback": (model.get("byte_fallback"), _EMPTY),
        "model.ignore_merges": (model.get("ignore_merges"), _EMPTY),
        "normalizer": (content.get("normalizer"), (None,)),
        "pre_tokenizer.type": (splitter.get("type"), ("ByteLevel",)),
        "pre_tokenizer.use_regex": (splitter.get("use_regex", True), (True,)),
    }
    for field, (found, allowed) in wanted.items():
        if found not in allowed:
            raise ValueError(
                f"{field}={found!r} splits text otherwise than GPT-2: it must be {allowed[0]!r}"
            )


def _read_added_tokens(folder: str) -> dict[str, int]:
    path = os.path.join(folder, ADDED_TOKENS_FILE)
    if not os.path.isfile(path):
        return {}
    try:
        return {token: _token_id(value) for token, value in read_json_object(path).items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _notes(folder: str, tokens: dict[str, int], added: dict[str, int]) -> list[str]:
    """What of a tokenizer is otherwise here."""
    notes = []
    others = [token for token in added if re.search(r"\s", token)]
    if others:
        named = ", ".join(map(repr, others[:5])) + (", ..." if len(others) > 5 else "")
        notes.append(
            f"the tokenizer takes {named} in a text for one token; here no token with white space "
            "is one, and these are spelled out"
        )
    if END_OF_TEXT not in tokens and END_OF_TEXT not in added:
        notes.append(f"the vocabulary has no {END_OF_TEXT}: texts do not end by themselves")
    path = os.path.join(folder, CONFIG_FILE)
    config = read_json_object(path) if os.path.isfile(path) else {}
    if config.get("add_prefix_space"):
        notes.append(
            "the tokenizer puts a space before each text (add_prefix_space): begin prefixes with "
            "one"
        )
    return notes
