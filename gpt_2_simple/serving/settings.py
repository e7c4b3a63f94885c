"""The settings of serve() and of a completion, each stated once; no TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from ..common.hparams import GENERATING_PRECISIONS
from ..common.settings import Setting, Settings
from ..generation.settings import (
    MAX_BIAS,
    MAX_INT32,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MIN_REPETITION_PENALTY,
)

API_KEY_VARIABLE = "GPT_2_SIMPLE_API_KEY"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

MODELS, NETWORK, LIMITS = "models or runs", "network", "limits"


@dataclasses.dataclass(frozen=True)
class AppSettings(Settings):
    """What the application can be told; serve() adds the network's."""

    GROUPS: ClassVar = (MODELS, NETWORK, LIMITS)

    # fmt: off
    run_name: Annotated[str | Sequence[str] | None, Setting(
        MODELS, "Run to serve, or several: folders in `checkpoint_dir`. Each is a model of the "
        "API, by its name", default_help="run1, unless --model_name is given",
        repeatable=True)] = None
    checkpoint_dir: Annotated[str, Setting(MODELS, "Folder that holds the runs")] = "checkpoint"
    model_name: Annotated[str | Sequence[str] | None, Setting(
        MODELS, "Model to serve as it is, or several: folders in `model_dir`",
        default_help="none", repeatable=True)] = None
    model_dir: Annotated[str, Setting(MODELS, "Folder that holds the models")] = "models"
    checkpoint: Annotated[str | int, Setting(
        MODELS, "Checkpoint of the runs to load: 'latest', 'best', a name, or its step")] = "latest"
    precision: Annotated[str | None, Setting(
        MODELS, "Type that holds the blocks' matrices. 'bfloat16' and 'float16' take about half "
        "the memory, 'int8' a quarter", choices=GENERATING_PRECISIONS,
        default_help="float32")] = None
    api_key: Annotated[str | None, Setting(
        NETWORK, "Key that requests must give. None for the environment variable "
        f"{API_KEY_VARIABLE}, or no key", default_help=f"${API_KEY_VARIABLE}, or none")] = None
    allow_origin: Annotated[str | Sequence[str] | None, Setting(
        NETWORK, "Web page, such as 'https://example.org', whose scripts may use the server; or "
        "several. '*' allows all", default_help="the server's own page", repeatable=True)] = None
    max_batch: Annotated[int, Setting(
        LIMITS, "Texts that grow at the same time, for each model", at_least=1, at_most=1024)] = 32
    max_queue: Annotated[int, Setting(
        LIMITS, "Prompts that may wait, for each model; the next one is told to come later",
        at_least=1)] = 256
    timeout: Annotated[float, Setting(
        LIMITS, "Seconds after which a request ends with what is there", above=0)] = 120.0
    log_prompts: Annotated[bool, Setting(
        NETWORK, "Write prompts to the log")] = False
    # fmt: on

    def __post_init__(self) -> None:
        """Raises ValueError for a value of a wrong type or out of its range."""
        super().__post_init__()
        for name in ("run_name", "model_name", "allow_origin"):
            value = getattr(self, name)
            names = () if value is None else (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(each, str) and each for each in names):
                raise ValueError(f"{name}={value!r} must be a string or a list of strings")
            object.__setattr__(self, name, names)
        if not self.run_name and not self.model_name:
            object.__setattr__(self, "run_name", ("run1",))
        if self.api_key == "":
            raise ValueError("api_key='' is empty; give a key, or leave it out")


@dataclasses.dataclass(frozen=True)
class ServeSettings(AppSettings):
    """What serve() can be told."""

    # fmt: off
    _: dataclasses.KW_ONLY
    host: Annotated[str, Setting(
        NETWORK, "Address to listen on; '0.0.0.0' for all, which others can reach")] = "127.0.0.1"
    port: Annotated[int, Setting(
        NETWORK, "Port to listen on; 0 for any that is free", at_least=0, at_most=65535)] = 8000
    # fmt: on


# --- a completion ---------------------------------------------------------------------------------

OPENAI, BEYOND = "OpenAI's", "beyond OpenAI's, with vLLM's names"

# OpenAI's and vLLM's limits.
MAX_CHOICES, MAX_STOPS, MAX_LOGPROBS = 128, 4, 20


@dataclasses.dataclass(frozen=True)
class CompletionSettings(Settings):
    """The parameters of a completion that are single values; see completion.py for the others."""

    GROUPS: ClassVar = (OPENAI, BEYOND)

    # fmt: off
    model: Annotated[str, Setting(OPENAI, "The model, by its name in /v1/models")]
    max_tokens: Annotated[int, Setting(
        OPENAI, "Tokens to write, at most; 0 only scores the prompt", at_least=0,
        at_most=MAX_INT32)] = 16
    temperature: Annotated[float, Setting(
        OPENAI, "Divides the logits; 0 always takes the likeliest token", at_least=0,
        at_most=2)] = 1.0
    top_p: Annotated[float, Setting(
        OPENAI, "Draw from the likeliest tokens that together have this probability", above=0,
        at_most=1)] = 1.0
    n: Annotated[int, Setting(
        OPENAI, "Texts to write for each prompt", at_least=1, at_most=MAX_CHOICES)] = 1
    best_of: Annotated[int | None, Setting(
        OPENAI, "Write so many texts, and return the n with the highest log-probability a token",
        at_least=1, at_most=MAX_CHOICES)] = None
    stream: Annotated[bool, Setting(OPENAI, "Send the text while it is written")] = False
    logprobs: Annotated[int | None, Setting(
        OPENAI, "Give each token's log-probability, and those of so many of the likeliest",
        at_least=0, at_most=MAX_LOGPROBS)] = None
    echo: Annotated[bool, Setting(OPENAI, "Start each text with its prompt")] = False
    presence_penalty: Annotated[float, Setting(
        OPENAI, "Subtracted from the logit of each token that was written already",
        at_least=-MAX_PENALTY, at_most=MAX_PENALTY)] = 0.0
    frequency_penalty: Annotated[float, Setting(
        OPENAI, "Subtracted from a token's logit as often as it was written already",
        at_least=-MAX_PENALTY, at_most=MAX_PENALTY)] = 0.0
    seed: Annotated[int | None, Setting(
        OPENAI, "Makes the texts repeatable: they are those of generate(seed=)",
        at_least=-(2**63), at_most=2**63 - 1)] = None
    user: Annotated[str | None, Setting(OPENAI, "Accepted; it has no effect")] = None
    top_k: Annotated[int, Setting(
        BEYOND, "Draw from the k likeliest tokens; 0 and -1 draw from all", at_least=-1,
        at_most=MAX_INT32)] = 0
    repetition_penalty: Annotated[float, Setting(
        BEYOND, "Above 1 makes tokens that the text holds already less likely",
        at_least=MIN_REPETITION_PENALTY, at_most=MAX_REPETITION_PENALTY)] = 1.0
    min_tokens: Annotated[int, Setting(
        BEYOND, "Tokens to write at least before <|endoftext|> may come", at_least=0,
        at_most=MAX_INT32)] = 0
    ignore_eos: Annotated[bool, Setting(BEYOND, "Write on after <|endoftext|>")] = False
    truncate_prompt_tokens: Annotated[int | None, Setting(
        BEYOND, "Read the last so many tokens of the prompt; -1 as many as fit", at_least=1,
        at_most=MAX_INT32, special=(-1, "as many as fit"))] = None
    # fmt: on


# The parameters of a completion that are not single values, as JSON schemas.
_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
STRUCTURED_PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "prompt": {
        "description": "What to continue: a text, token ids, or a list of either",
        "default": "",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "items": {"type": "string"}},
            _TOKENS,
            {"type": "array", "minItems": 1, "items": _TOKENS},
            {"type": "null"},
        ],
    },
    "stop": {
        "description": "A text, or up to four, that end the text before them",
        "anyOf": [
            {"type": "string", "minLength": 1},
            {
                "type": "array",
                "maxItems": MAX_STOPS,
                "items": {"type": "string", "minLength": 1},
            },
            {"type": "null"},
        ],
    },
    "stream_options": {
        "description": "With include_usage, the last piece of a stream tells the tokens",
        "anyOf": [
            {
                "type": "object",
                "properties": {"include_usage": {"type": "boolean"}},
                "additionalProperties": False,
            },
            {"type": "null"},
        ],
    },
    "logit_bias": {
        "description": "Token ids, as strings, and what to add to their logits",
        "anyOf": [
            {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]+$"},
                "additionalProperties": {
                    "type": "number",
                    "minimum": -MAX_BIAS,
                    "maximum": MAX_BIAS,
                },
            },
            {"type": "null"},
        ],
    },
    "suffix": {"description": "Not supported: it must be null or empty", "enum": [None, ""]},
}
