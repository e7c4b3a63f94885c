"""An adapter's configuration and tensors in, what it changes in GPT-2's variables out.

This reads what peft writes for LoRA on GPT-2: updates of linear layers and of the positions, also
with rank_pattern, alpha_pattern, use_rslora, lora_bias; trained biases; and whole modules
(modules_to_save). What would give another model than peft's is refused by its name.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np

from ..common.hparams import HParams
from ..common.lora import LINEAR_LAYERS
from .adapter_files import AdapterFiles

# Fields of adapter_config.json that change what is computed, in ways that are not applied here.
_REFUSED_FIELDS = (
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    "monteclora_config",
)

# Initializations that change the base itself: the adapter is for a base that nobody else has.
_REFUSED_INITIALIZATIONS = ("pissa", "olora", "loftq", "corda", "lora_ga")


class Update(NamedTuple):
    """What an adapter does to a variable: replaces it, then adds (b a)^T * scale and `added`.

    Attributes:
        value: shaped as the variable; None keeps the base's.
        a: [r, rows of the matrix]; None adds no product.
        b: [columns of the matrix, r].
        scale: the product's factor.
        added: shaped as the variable, or None.
    """

    value: np.ndarray | None = None
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    scale: float = 1.0
    added: np.ndarray | None = None

    def apply(self, base: np.ndarray) -> np.ndarray:
        """The variable's value in the merged model; `base` is its value in the base, float32."""
        result = base if self.value is None else self.value.reshape(base.shape)
        if self.a is not None and self.b is not None:
            product = np.matmul(self.b, self.a).T * np.float32(self.scale)
            result = result + product.reshape(base.shape)
        return result if self.added is None else result + self.added.reshape(base.shape)


class Updates(NamedTuple):
    """All that an adapter changes.

    Attributes:
        of_variables: by the variable's name in a checkpoint, such as 'model/h0/attn/c_attn/w'.
        embedding: a token embedding [n_vocab, n_embd] that replaces the base's; None keeps it.
        projection: the same for the output projection. In this library both are one variable.
    """

    of_variables: dict[str, Update]
    embedding: np.ndarray | None
    projection: np.ndarray | None


def read_updates(files: AdapterFiles, hparams: HParams) -> Updates:
    """What an adapter changes in a model of these sizes.

    Raises:
        ValueError: it is no LoRA adapter, or is for a model of other sizes, or does what is not
            applied here; says which.
    """
    _check_config(files)
    reader = _Reader(files, hparams)
    for name in files.tensors:
        reader.read(name)
    return reader.updates()


def _check_config(files: AdapterFiles) -> None:
    config = files.config
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(
            f"{files.folder} is an adapter of peft_type {kind!r}: only LORA is applied"
        )
    for field in _REFUSED_FIELDS:
        if config.get(field):
            raise ValueError(
                f"{files.folder} was trained with {field}={config[field]!r}, which is not applied "
                "here: merge it where peft is installed, by merge_and_unload()"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REFUSED_INITIALIZATIONS):
        raise ValueError(
            f"{files.folder} was trained with init_lora_weights={start!r}, which changes the base, "
            "too: save it in peft with path_initial_model_for_weight_conversion"
        )


class _Reader:
    """Sorts an adapter's tensors by the variables that they change."""

    def __init__(self, files: AdapterFiles, hparams: HParams):
        self.files, self.shapes = files, _variable_shapes(hparams)
        self.embedding: np.ndarray | None = None
        self.projection: np.ndarray | None = None
        self.found: dict[str, Update] = {}

    def updates(self) -> Updates:
        """All that was read."""
        for name, update in self.found.items():
            if (update.a is None) != (update.b is None):
                raise ValueError(f"{self.files.folder} has only one of the two matrices for {name}")
        return Updates(self.found, self.embedding, self.projection)

    def read(self, name: str) -> None:
        """Takes the tensor of a name."""
        tensor = self.files.tensors[name]
        key = name.removeprefix("base_model.model.").removeprefix("transformer.")
        key = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", key)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", key):
            if _variable(f"{match[1]}.weight") and match[1].split(".")[-1] not in ("wte", "wpe"):
                return self._take_matrix(name, match[1], match[2], tensor)
        elif match := re.fullmatch(r"(.+)\.lora_B\.bias", key):
            return self._take_bias(name, match[1], tensor)
        elif match := re.fullmatch(r"wpe\.lora_embedding_([AB])", key):
            return self._take_matrix(name, "wpe", match[1], tensor)
        elif key in ("wte.weight", "lm_head.weight"):
            return self._take_embedding(name, key, tensor)
        elif variable := _variable(key):
            self._check_shape(name, variable, tensor.shape, self._shape(name, variable))
            return self._note(variable, value=tensor)
        raise ValueError(
            f"{self.files.folder} has a tensor {name}, which has no place here: merge the adapter "
            "where peft is installed, by merge_and_unload(), and import the whole model"
        )

    def _take_matrix(self, name: str, module: str, kind: str, tensor: np.ndarray) -> None:
        """Takes a (kind 'A') or b (kind 'B')."""
        variable = _variable(f"{module}.weight") or name
        rows, columns = self._shape(name, variable)[-2:]
        rank, alpha = self._rank_and_alpha(module)
        expected = (rank, rows) if kind == "A" else (columns, rank)
        self._check_shape(name, variable, tensor.shape, expected)
        root = self.files.config.get("use_rslora")
        self._note(variable, scale=alpha / (math.sqrt(rank) if root else rank))
        self._note(variable, **{kind.lower(): tensor})

    def _take_bias(self, name: str, module: str, tensor: np.ndarray) -> None:
        variable = _variable(f"{module}.bias") or name
        self._check_shape(name, variable, tensor.shape, self._shape(name, variable))
        rank, alpha = self._rank_and_alpha(module)
        root = self.files.config.get("use_rslora")
        scale = np.float32(alpha / (math.sqrt(rank) if root else rank))
        self._note(variable, added=tensor * scale)

    def _take_embedding(self, name: str, key: str, tensor: np.ndarray) -> None:
        self._check_shape(name, "model/wte", tensor.shape, self.shapes["model/wte"])
        if key == "wte.weight":
            self.embedding = tensor
        else:
            self.projection = tensor

    def _note(self, variable: str, **changes: Any) -> None:
        self.found[variable] = self.found.get(variable, Update())._replace(**changes)

    def _shape(self, name: str, variable: str) -> tuple[int, ...]:
        if variable not in self.shapes:
            raise ValueError(
                f"{self.files.folder} is for another model: it has {name}, and this one has no "
                f"{variable}"
            )
        return self.shapes[variable]

    def _check_shape(
        self, name: str, variable: str, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> None:
        if found != expected and (1, *found) != expected:
            raise ValueError(
                f"{self.files.folder} is for another model, or of another rank: {name} has shape "
                f"{list(found)}, and {list(expected)} is needed for {variable}"
            )

    def _rank_and_alpha(self, module: str) -> tuple[int, float]:
        config = self.files.config
        rank = self._by_pattern("rank_pattern", module, config.get("r", 8))
        alpha = self._by_pattern("alpha_pattern", module, config.get("lora_alpha", 8))
        is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
        if not is_rank or not isinstance(alpha, (int, float)):
            raise ValueError(
                f"{self.files.folder}: r={rank!r} and lora_alpha={alpha!r} for {module} must be "
                "numbers above 0"
            )
        return rank, alpha

    def _by_pattern(self, field: str, module: str, default: Any) -> Any:
        """The value of the first pattern that a module's name ends in, as peft looks for it."""
        patterns = self.files.config.get(field) or {}
        try:
            for pattern, value in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", f"transformer.{module}"):
                    return value
        except (AttributeError, re.error) as error:
            raise ValueError(f"{self.files.folder}: {field}={patterns!r}: {error}") from error
        return default


def _variable(key: str) -> str | None:
    """The variable of a parameter's name in Hugging Face's GPT-2; None if there is none."""
    match = re.fullmatch(r"(?:h\.(\d+)\.)?([a-z_0-9.]+)\.(weight|bias)", key)
    if match is None:
        return None
    block, module, kind = match.groups()
    scope = "model/" if block is None else f"model/h{int(block)}/"
    if block is None and module in ("wte", "wpe") and kind == "weight":
        return f"{scope}{module}"
    if module in (("ln_f",) if block is None else ("ln_1", "ln_2")):
        return f"{scope}{module}/{'g' if kind == 'weight' else 'b'}"
    if block is not None and module in LINEAR_LAYERS:
        return f"{scope}{module.replace('.', '/')}/{kind[0]}"
    return None


def _variable_shapes(hparams: HParams) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's variables by their names."""
    width = hparams.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        "model/wte": (hparams.n_vocab, width),
        "model/wpe": (hparams.n_ctx, width),
        "model/ln_f/g": (width,),
        "model/ln_f/b": (width,),
    }
    for index in range(hparams.n_layer):
        scope = f"model/h{index}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{scope}/{norm}/{parameter}": (width,) for parameter in "gb"}
        for layer, (n_in, n_out) in LINEAR_LAYERS.items():
            name = f"{scope}/{layer.replace('.', '/')}"
            shapes |= {f"{name}/w": (1, n_in * width, n_out * width), f"{name}/b": (n_out * width,)}
    return shapes


def check_tied(folder: str, updates: Updates, base: np.ndarray) -> np.ndarray:
    """The token embedding of the merged model, which also is its output projection.

    Args:
        folder: the adapter's, for the error.
        updates: one of embedding and projection is not None.
        base: the base's token embedding.

    Raises:
        ValueError: the adapter has an embedding and a projection that are not equal.
    """
    embedding = base if updates.embedding is None else updates.embedding
    projection = base if updates.projection is None else updates.projection
    if not np.array_equal(embedding, projection):
        raise ValueError(
            f"{folder} has a token embedding (wte) and an output projection (lm_head) that differ, "
            "and here both are one matrix: train the adapter without modules_to_save for them"
        )
    return embedding
