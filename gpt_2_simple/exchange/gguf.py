"""A run or a model in, a GGUF file for llama.cpp and a Modelfile for Ollama out.

Names of tensors and keys are those of llama.cpp's GPT-2
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Linear layers are stored as
[outputs, inputs], which is the transpose of GPT-2's matrices.
"""

from __future__ import annotations

import math
import os
import re
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..common.files import sync
from ..common.hparams import HParams
from ..common.report import progress, say
from ..common.settings import settings_function
from ..encoder import END_OF_TEXT, Encoder, bytes_to_unicode
from ..model import LAYER_NORM_EPSILON
from ..storage.checkpoint_tensors import ReadTensor, open_checkpoint
from ..storage.safetensors_file import check_finite
from .settings import GgufSettings
from .tensor_names import TensorName, tensors_of
from .weights import StoredWeights, check_new, name_of, new_folder, use_weights

MODELFILE = "Modelfile"

# How many numbers the quantized types put into a block.
_BLOCK = 32
_CHUNK_ROWS = 2048  # rows that are quantized at a time

# The parts of a block, by their names in our checkpoints.
_PARTS = {
    "ln_1": "attn_norm",
    "attn/c_attn": "attn_qkv",
    "attn/c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp/c_fc": "ffn_up",
    "mlp/c_proj": "ffn_down",
}
_PARAMETERS = {"g": "weight", "w": "weight", "b": "bias"}


class GgufTensor(NamedTuple):
    """A tensor in a GGUF file.

    Attributes:
        source: the tensor in our checkpoint.
        name: its name in the file.
        shape: rows and columns, as NumPy counts them; a vector has one size.
        is_transposed: whether our matrix is the transpose.
        type: 'F32', 'F16', 'Q8_0' or 'Q4_0'.
    """

    source: TensorName
    name: str
    shape: tuple[int, ...]
    is_transposed: bool
    type: str


@settings_function(GgufSettings)
def export_gguf(settings: GgufSettings) -> str:
    """Writes a run or a model as a GGUF file for llama.cpp, and a Modelfile for Ollama beside it.

    Vectors and the position embedding are float32 in every type of file. In 'q4_0' the token
    embedding has 8 bits, as it also makes the logits.

    Args:
        settings: each of them is an argument.

    Returns:
        The path of the GGUF file. `ollama create <name> -f Modelfile` in its folder takes it.

    Raises:
        FileExistsError: there is something at `path`.
        FileNotFoundError: there is no such run, model or checkpoint; lists those there are.
        ImportError: gguf is missing: `pip install "gpt_2_simple[gguf]"`.
        OSError: the disk is full, or the folder cannot be written. Nothing is left of it.
        ValueError: a setting is out of range; or a weight is not finite, or too large for the
            type; or n_embd is no multiple of 32, which the quantized types need; or the vocabulary
            has no <|endoftext|>, for which llama.cpp would take another token.
    """
    library = _library()
    quantization = settings.quantization
    name = name_of(settings)
    path = os.path.normpath(settings.path or os.path.join("export", f"{name}-{quantization}"))
    check_new(path, "path")
    file = f"{name}-{quantization}.gguf"

    def write(weights: StoredWeights) -> None:
        _check_can_be_written(weights, quantization)
        with new_folder(path, "path") as new:
            _write_gguf(library, os.path.join(new, file), weights, quantization)
            with open(os.path.join(new, MODELFILE), "x", encoding="utf-8", newline="\n") as out:
                out.write(_modelfile(file, weights.hparams))
            sync(os.path.join(new, MODELFILE))

    use_weights(settings, write)
    say(f"Exported to {os.path.join(path, file)}")
    return os.path.join(path, file)


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            'GGUF files need the gguf library: pip install "gpt_2_simple[gguf]"'
        ) from error
    return gguf


def _check_can_be_written(weights: StoredWeights, quantization: str) -> None:
    n_embd = weights.hparams.n_embd
    if quantization.startswith("q") and n_embd % _BLOCK:
        raise ValueError(
            f"quantization={quantization!r} needs an n_embd that is a multiple of {_BLOCK}, and "
            f"{weights.name} has n_embd={n_embd}: give quantization='f16'"
        )
    _end_of_text(weights)


def _end_of_text(weights: StoredWeights) -> int:
    token_id = weights.vocabulary.end_of_text
    if token_id is None:
        raise ValueError(
            f"the vocabulary of {weights.name} has no {END_OF_TEXT}, and llama.cpp would take "
            "another token for it: make the model with a vocabulary from create_gpt2()"
        )
    return token_id


def gguf_tensors(hparams: HParams, quantization: str) -> list[GgufTensor]:
    """What a file of this type holds, in its order."""
    return [_gguf_tensor(source, quantization.upper()) for source in tensors_of(hparams)]


def _gguf_tensor(source: TensorName, matrix_type: str) -> GgufTensor:
    if source.ours == "model/wte":
        kind = "Q8_0" if matrix_type == "Q4_0" else matrix_type
        return GgufTensor(source, "token_embd.weight", source.shape, False, kind)
    if source.ours == "model/wpe":
        return GgufTensor(source, "position_embd.weight", source.shape, False, "F32")
    _, *block, parameter = re.split(r"/", source.ours)
    if block[0] == "ln_f":
        return GgufTensor(
            source, f"output_norm.{_PARAMETERS[parameter]}", source.shape, False, "F32"
        )
    part = _PARTS["/".join(block[1:])]
    name = f"blk.{block[0].removeprefix('h')}.{part}.{_PARAMETERS[parameter]}"
    is_matrix = parameter == "w"
    shape = source.shape[::-1] if is_matrix else source.shape
    return GgufTensor(source, name, shape, is_matrix, matrix_type if is_matrix else "F32")


# --- the file -----------------------------------------------------------------------------------


def _write_gguf(library: ModuleType, path: str, weights: StoredWeights, quantization: str) -> None:
    tensors = gguf_tensors(weights.hparams, quantization)
    writer = library.GGUFWriter(path, "gpt2")
    _add_keys(library, writer, weights, quantization)
    for tensor in tensors:
        _announce(library, writer, tensor)
    numbers = sum(math.prod(tensor.shape) for tensor in tensors)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with (
            open_checkpoint(weights.prefix) as read,
            progress(total=numbers, desc="Exporting", unit="", unit_scale=True) as bar,
        ):
            for tensor in tensors:
                writer.write_tensor_data(_values(library, read, tensor))
                bar.update(math.prod(tensor.shape))
    finally:
        writer.close()
    sync(path)


def _announce(library: ModuleType, writer: Any, tensor: GgufTensor) -> None:
    """Gives the writer the tensor's name, type and size; its values come later."""
    shape, dtype = _layout(library, tensor)
    kind = library.GGMLQuantizationType[tensor.type] if _is_quantized(tensor) else None
    writer.add_tensor_info(tensor.name, shape, dtype, math.prod(shape) * dtype.itemsize, kind)


def _is_quantized(tensor: GgufTensor) -> bool:
    return tensor.type.startswith("Q")


def _layout(library: ModuleType, tensor: GgufTensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and the type of the array that the file holds; quantized rows are bytes."""
    if _is_quantized(tensor):
        kind = library.GGMLQuantizationType[tensor.type]
        return tuple(library.quant_shape_to_byte_shape(tensor.shape, kind)), np.dtype(np.uint8)
    return tensor.shape, np.dtype(np.float16 if tensor.type == "F16" else np.float32)


def _values(library: ModuleType, read: ReadTensor, tensor: GgufTensor) -> np.ndarray:
    """A tensor's numbers as the file holds them; converted some rows at a time."""
    values = read(tensor.source.ours).reshape(tensor.source.shape)
    check_finite(values, tensor.source.ours)
    values = values.T if tensor.is_transposed else values
    if tensor.type == "F32":
        return np.ascontiguousarray(values)
    stored = np.empty(*_layout(library, tensor))
    for start in range(0, len(values), _CHUNK_ROWS):
        rows = np.ascontiguousarray(values[start : start + _CHUNK_ROWS])
        stored[start : start + _CHUNK_ROWS] = _narrow(library, rows, tensor)
    return stored


def _narrow(library: ModuleType, values: np.ndarray, tensor: GgufTensor) -> np.ndarray:
    kind = library.GGMLQuantizationType[tensor.type]
    # A block's scale is a float16.
    if np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(
            f"{tensor.source.ours} holds {np.abs(values).max():.4g}, which is too large for "
            f"{tensor.type}: give quantization='f32'"
        )
    narrowed: np.ndarray = (
        library.quants.quantize(values, kind)
        if _is_quantized(tensor)
        else values.astype(np.float16)
    )
    return narrowed


def _add_keys(library: ModuleType, writer: Any, weights: StoredWeights, quantization: str) -> None:
    """Adds what llama.cpp has to know beside the tensors."""
    hparams, vocabulary = weights.hparams, weights.vocabulary
    file_types = {
        "f32": "ALL_F32",
        "f16": "MOSTLY_F16",
        "q8_0": "MOSTLY_Q8_0",
        "q4_0": "MOSTLY_Q4_0",
    }
    writer.add_name(weights.name)
    writer.add_block_count(hparams.n_layer)
    writer.add_context_length(hparams.n_ctx)
    writer.add_embedding_length(hparams.n_embd)
    writer.add_feed_forward_length(4 * hparams.n_embd)
    writer.add_head_count(hparams.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPSILON)
    writer.add_file_type(library.LlamaFileType[file_types[quantization]])
    if quantization.startswith("q"):
        writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = gguf_tokens(vocabulary)
    writer.add_token_list(tokens)
    types = [library.TokenType.NORMAL] * len(tokens)
    for token_id in vocabulary.special_tokens.values():
        types[token_id] = library.TokenType.USER_DEFINED  # found in a text as a whole
    types[_end_of_text(weights)] = library.TokenType.CONTROL
    writer.add_token_types(types)
    writer.add_token_merges([f"{left} {right}" for left, right in vocabulary.bpe_merges])
    # Without these, llama.cpp takes token 11, a comma in GPT-2's vocabulary.
    writer.add_bos_token_id(_end_of_text(weights))
    writer.add_eos_token_id(_end_of_text(weights))
    writer.add_add_bos_token(False)


def gguf_tokens(vocabulary: Encoder) -> list[str]:
    """Each id's token; ids without a token get a name.

    llama.cpp looks for special tokens by their text, and has the others in the characters that
    stand for bytes.
    """
    characters = bytes_to_unicode()
    special = {token_id: text for text, token_id in vocabulary.special_tokens.items()}
    tokens = []
    for token_id in range(vocabulary.n_vocab):
        if token_id in special:
            tokens.append(special[token_id])
        elif token_id in vocabulary.decoder:
            raw = vocabulary.decode_bytes([token_id])
            tokens.append("".join(map(characters.__getitem__, raw)))
        else:
            tokens.append(f"<|unused{token_id}|>")
    return tokens


def _modelfile(file: str, hparams: HParams) -> str:
    """Ollama's recipe: texts are continued as they are, since GPT-2 knows no chat."""
    return (
        f"FROM ./{file}\n"
        'TEMPLATE """{{ .Prompt }}"""\n'
        f"PARAMETER num_ctx {hparams.n_ctx}\n"
        f'PARAMETER stop "{END_OF_TEXT}"\n'
    )
