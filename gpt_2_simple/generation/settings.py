"""The settings of generate(), each stated once: type, default, range, meaning; no TensorFlow."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from ..common.hparams import GENERATING_PRECISIONS, HParams
from ..common.settings import Setting, Settings, convert, fields_of
from ..storage.settings import LOADED_RUN

# The largest int32: TensorFlow's placeholders for whole numbers hold no more.
MAX_INT32 = 2**31 - 1

# OpenAI's API has these limits for a bias and for the two penalties that add to logits.
MAX_BIAS, MAX_PENALTY = 100, 2

# Divided by less, or multiplied by more, large logits would leave float32.
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100

# Given tokens that go through the model in one run, over all rows. It bounds the memory, and the
# time for which a run cannot be interrupted.
MAX_TOKENS_PER_RUN = 1024

# Ways to guess tokens; see the module speculative.
PROMPT_LOOKUP = "prompt_lookup"
SPECULATIONS = (PROMPT_LOOKUP,)

# The headings of `generate --help`, in its order.
MODEL, TEXT, END = "model or run", "text", "end of the text"
RULES, FILES = "rules", "files"


@dataclasses.dataclass(frozen=True)
class GenerationSettings(Settings):
    """All that generate() can be told; gpt-2-simple 0.8.1's settings come first, in its order."""

    GROUPS: ClassVar = (MODEL, TEXT, END, RULES, FILES)

    # fmt: off
    run_name: Annotated[str, Setting(
        MODEL, "Run to generate from: a folder in `checkpoint_dir`. In Python it is needed only if "
        "the session does not hold that run yet")] = LOADED_RUN
    checkpoint_dir: Annotated[str, Setting(MODEL, "Folder that holds the runs")] = "checkpoint"
    model_name: Annotated[str | None, Setting(
        MODEL, "Model to generate from, instead of a run: a folder in `model_dir`. In Python, "
        "after finetune() from that model, the trained weights are used, as in 0.8.1",
        default_help="none: the run is used")] = None
    model_dir: Annotated[str, Setting(MODEL, "Folder that holds the models")] = "models"
    sample_dir: Annotated[str, Setting(
        None, "Accepted for old scripts; nothing is written there")] = "samples"
    return_as_list: Annotated[bool, Setting(
        None, "Return the texts and do not print them")] = False
    truncate: Annotated[str | None, Setting(
        END, "End each text before the first occurrence of this string after the prefix",
        default_help="none")] = None
    destination_path: Annotated[str | None, Setting(
        FILES, "File to write the texts to. In Python they are then not printed. On the command "
        "line the file must not exist yet", default_help="none")] = None
    sample_delim: Annotated[str, Setting(
        FILES, "Separator after each text; left out if there is only one text")] = "=" * 20 + "\n"
    prefix: Annotated[str | Sequence[str] | None, Setting(
        TEXT, "Text that the model continues. In Python, a list gives `nsamples` texts for each of "
        "its strings, in order. On the command line, write --prefix='-x' if it starts with '-'",
        default_help="none")] = None
    seed: Annotated[int | None, Setting(
        TEXT, "Whole number that makes the texts repeatable, whatever `batch_size` is. None draws "
        "another each time. On the command line, each further file adds 1 to it",
        at_least=0, default_help="random")] = None
    nsamples: Annotated[int, Setting(
        FILES, "Texts to generate for each prefix. For a single prefix it must be a multiple of "
        "`batch_size`", at_least=1)] = 1
    batch_size: Annotated[int | None, Setting(
        FILES, "Texts to generate at the same time. None chooses a number that fits in memory. On "
        "the command line, 'auto' chooses a number that fits in memory",
        at_least=1, none_word="auto")] = 1
    length: Annotated[int, Setting(
        TEXT, "Tokens to generate for each text, without the prefix", at_least=1)] = 1023
    temperature: Annotated[float, Setting(
        TEXT, "Divides the logits: above 1 the choice of tokens is more random, below 1 less "
        "random, and 0 always takes the likeliest token", at_least=0)] = 0.7
    top_k: Annotated[int, Setting(
        TEXT, "Draw each token from the k likeliest only; 0 draws from all",
        at_least=0, at_most=MAX_INT32)] = 0
    top_p: Annotated[float, Setting(
        TEXT, "Draw each token from the likeliest only, as many as together have this probability "
        "(nucleus sampling, Holtzman et al. 2019); `top_k` is applied first; 0 and 1 draw from all",
        at_least=0, at_most=1, special=(100, "draw from all"))] = 0.0
    include_prefix: Annotated[bool, Setting(TEXT, "Start each text with its prefix")] = True
    _: dataclasses.KW_ONLY
    max_new_tokens: Annotated[int | None, Setting(
        TEXT, "Another name for `length`, as other libraries have it; it wins if both are given",
        at_least=1, default_help="--length")] = None
    stop: Annotated[str | Sequence[str] | None, Setting(
        END, "String, or several, that end a text: it ends before the first occurrence of any of "
        "them after the prefix", default_help="none", repeatable=True)] = None
    stop_token: Annotated[str | int | None, Setting(
        END, "Token that ends a text: its id, or its text, such as '<|endoftext|>'",
        at_least=0, at_most=MAX_INT32, default_help="none")] = None
    include_stop: Annotated[bool, Setting(
        END, "Keep the `stop` or `stop_token` at the end of the text")] = False
    min_length: Annotated[int, Setting(
        END, "Tokens that a text has at least before `stop_token` may come",
        at_least=0, at_most=MAX_INT32)] = 0
    repetition_penalty: Annotated[float, Setting(
        RULES, "Above 1 makes tokens that the text holds already less likely, below 1 likelier "
        "(Keskar et al. 2019)", at_least=MIN_REPETITION_PENALTY,
        at_most=MAX_REPETITION_PENALTY)] = 1.0
    presence_penalty: Annotated[float, Setting(
        RULES, "Subtracted from the logit of each token that came after the prefix already, as in "
        "OpenAI's API", at_least=-MAX_PENALTY, at_most=MAX_PENALTY)] = 0.0
    frequency_penalty: Annotated[float, Setting(
        RULES, "As `presence_penalty`, but times the number of times that the token came",
        at_least=-MAX_PENALTY, at_most=MAX_PENALTY)] = 0.0
    no_repeat_ngram_size: Annotated[int, Setting(
        RULES, "No sequence of this many tokens appears twice in a text; 0 allows all",
        at_least=0, at_most=MAX_INT32)] = 0
    bad_words: Annotated[Sequence[str] | None, Setting(
        RULES, "Words that must not appear, at the start of a text or after a space. A token that "
        "holds more than the word, such as 'cathedral' for 'cat', is still allowed",
        default_help="none", repeatable=True)] = None
    logit_bias: Annotated[Mapping[str | int, float] | Sequence[str] | None, Setting(
        RULES, "Numbers from -100 to 100 that are added to the logits of tokens. In Python, a "
        "dictionary such as {' word': 2.0}; its keys are tokens, as text or as ids. On the command "
        "line, a token and its number, such as ' word=2'", default_help="none", repeatable=True,
        )] = None
    num_beams: Annotated[int, Setting(
        RULES, "Above 1: beam search for the likeliest texts with this many beams. Nothing is "
        "drawn, so `temperature`, `top_k`, `top_p` and `seed` have no effect. The result is the "
        "`nsamples` best texts, the best first", at_least=1, at_most=MAX_INT32)] = 1
    length_penalty: Annotated[float, Setting(
        RULES, "For `num_beams`: texts are compared by log-probability / tokens ** length_penalty, "
        "so above 0 prefers long texts and below 0 short ones", at_least=-50, at_most=50)] = 1.0
    stream: Annotated[bool, Setting(
        FILES, "Print each text while it is generated. In Python, generate_stream() gives the "
        "pieces instead. On the command line, no file is written then")] = False
    speculative: Annotated[str | None, Setting(
        TEXT, "'prompt_lookup' guesses the next tokens where the text repeats itself, as code, "
        "tables and quotations do, and checks several in one pass. The texts are the same (except "
        "for rounding); where guesses seldom come true, it generates as without them",
        choices=SPECULATIONS, default_help="none")] = None
    draft_model: Annotated[str | None, Setting(
        TEXT, "Smaller model with the same vocabulary that guesses the next tokens: a folder in "
        "`model_dir`, or the path of a model's or a run's folder. Texts are the same (except for "
        "rounding); where its guesses seldom come true, it is not asked",
        default_help="none")] = None
    verbose: Annotated[int | bool, Setting(FILES, "0 prints nothing but errors")] = 1
    # fmt: on

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range, or settings that exclude each other."""
        if self.truncate is not None and not isinstance(self.truncate, str):
            raise ValueError(f"truncate={self.truncate!r} must be a string; stop= takes several")
        object.__setattr__(self, "verbose", int(self.verbose))  # it may be True or False
        super().__post_init__()
        self._check_strings()
        object.__setattr__(self, "logit_bias", _as_biases(self.logit_bias))
        if isinstance(self.prefix, tuple):
            if not self.prefix:
                raise ValueError(
                    "prefix=[] must hold at least one prefix; '' or None is one without text"
                )
        elif self.batch_size is not None and self.nsamples % self.batch_size:
            raise ValueError(
                f"nsamples={self.nsamples} must be a multiple of batch_size={self.batch_size}"
            )
        if 1 < self.num_beams < self.nsamples:
            raise ValueError(
                f"nsamples={self.nsamples} must not be above num_beams={self.num_beams}: a search "
                "finds one text for each beam"
            )
        if self.num_beams > 1 and self.stream:
            raise ValueError(
                f"num_beams={self.num_beams} cannot stream: a search may still replace its best "
                "text; leave out stream or num_beams"
            )
        self._check_guesses()
        if self.min_length and self.stop_token is None:
            raise ValueError(f"min_length={self.min_length} needs a stop_token to hold back")

    def _check_guesses(self) -> None:
        """Raises ValueError if speculative decoding is wanted twice, or with beam search."""
        for name in ("speculative", "draft_model"):
            if self.num_beams > 1 and getattr(self, name):
                raise ValueError(
                    f"num_beams={self.num_beams} cannot be combined with {name}="
                    f"{getattr(self, name)!r}: a beam search has no next token to guess; leave "
                    "out one of them"
                )
        if self.speculative and self.draft_model:
            raise ValueError(
                f"speculative={self.speculative!r} and draft_model={self.draft_model!r} are two "
                "ways to guess tokens; leave out one of them"
            )

    def _check_strings(self) -> None:
        """Makes tuples of several strings; empty ones may only be prefixes."""
        for name in ("prefix", "stop", "bad_words"):
            value = getattr(self, name)
            if value is None or (name == "prefix" and isinstance(value, str)):
                continue
            strings = as_strings(name, value)
            if name != "prefix" and "" in strings:
                raise ValueError(f"{name}={list(strings)!r} holds an empty string; leave it out")
            object.__setattr__(self, name, strings)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the texts start with; '' for nothing."""
        if self.prefix is None or isinstance(self.prefix, str):
            return (self.prefix or "",)
        return tuple(self.prefix)

    @property
    def n_texts(self) -> int:
        """How many texts will be generated."""
        return len(self.prefixes) * self.nsamples

    @property
    def n_new_tokens(self) -> int:
        """How many tokens a text may have after its prefix."""
        return self.length if self.max_new_tokens is None else self.max_new_tokens


def as_strings(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """A tuple of an argument that is a string or several; ValueError if it is neither."""
    values = (value,) if isinstance(value, str) else value
    if isinstance(values, Iterable):
        values = tuple(values)
        if all(isinstance(string, str) for string in values):
            return values
    raise ValueError(f"{name}={value!r} must be a string or a list of strings")


def _as_biases(value: Any) -> dict[str | int, float] | None:
    """The biases of a dictionary, or of strings such as ' word=2'; ValueError if it is neither."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        entries: Iterable[Any] = value.items()
    else:
        entries = [text.rsplit("=", 1) for text in as_strings("logit_bias", value)]
    try:
        biases = {key: _as_bias(bias) for key, bias in entries}
    except (OverflowError, TypeError, ValueError):
        biases = {"": 0.0}
    if not all(isinstance(key, (str, numbers.Integral)) and key != "" for key in biases):
        raise ValueError(
            f"logit_bias={value!r} must give tokens (texts or ids) numbers from {-MAX_BIAS} to "
            f"{MAX_BIAS}, such as {{' word': 2.0}}"
        )
    return {key if isinstance(key, str) else int(key): bias for key, bias in biases.items()}


def _as_bias(value: Any) -> float:
    bias = float(value)
    if not abs(bias) <= MAX_BIAS:
        raise ValueError
    return bias


@dataclasses.dataclass(frozen=True)
class GenerationMemorySettings(Settings):
    """All that generation_memory_plan() can be told; meanings and ranges are generate()'s."""

    GROUPS: ClassVar = (MODEL,)

    # fmt: off
    model_name: Annotated[str | HParams, Setting(
        MODEL, "Model whose memory is planned: a published model's name, or HParams")] = "124M"
    precision: Annotated[str, Setting(
        MODEL, "Type of the blocks' matrices", choices=GENERATING_PRECISIONS)] = "float32"
    batch_size: Annotated[int, Setting(
        MODEL, "Texts to generate at the same time", at_least=1)] = 1
    length: Annotated[int, Setting(
        MODEL, "Tokens to generate for each text, without the prefix",
        at_least=1)] = GenerationSettings.length
    prefix_length: Annotated[int, Setting(MODEL, "Tokens of a prefix", at_least=1)] = 1
    # fmt: on


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; ranges and meanings as in GenerationSettings, but in token ids.

    `repetition_penalty` divides positive logits and multiplies negative ones (Keskar et al. 2019).
    """

    temperature: float = GenerationSettings.temperature
    top_k: int = GenerationSettings.top_k
    top_p: float = GenerationSettings.top_p
    repetition_penalty: float = GenerationSettings.repetition_penalty
    presence_penalty: float = GenerationSettings.presence_penalty
    frequency_penalty: float = GenerationSettings.frequency_penalty
    no_repeat_ngram_size: int = GenerationSettings.no_repeat_ngram_size
    min_length: int = GenerationSettings.min_length
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_token: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids and what is added to their logits

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        biases = _as_biases(dict(self.logit_bias)) or {}
        object.__setattr__(self, "logit_bias", tuple(biases.items()))
        words = tuple(tuple(map(int, word)) for word in self.bad_words)
        if not all(words):
            raise ValueError(f"bad_words={self.bad_words!r} holds an empty word; leave it out")
        object.__setattr__(self, "bad_words", words)
        for field in dataclasses.fields(self):
            if field.name not in ("bad_words", "logit_bias"):
                value = _as_number(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, value)

    @property
    def changes_logits(self) -> bool:
        """Whether the logits are changed before a token is chosen."""
        forbids = any((self.no_repeat_ngram_size, self.bad_words, self.min_length))
        return forbids or self.repetition_penalty != 1 or self.adds_to_logits

    @property
    def adds_to_logits(self) -> bool:
        """Whether something is added to the logits before a token is chosen."""
        return any((self.presence_penalty, self.frequency_penalty, self.logit_bias))


@dataclasses.dataclass(frozen=True)
class Beams:
    """Settings of beam search, which finds the likeliest texts and draws nothing.

    Attributes:
        count: texts that are extended at the same time; GenerationSettings calls it num_beams.
        length_penalty: as in GenerationSettings, and as in Hugging Face's generate.
    """

    count: int = GenerationSettings.num_beams
    length_penalty: float = GenerationSettings.length_penalty

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        object.__setattr__(self, "count", _as_number("num_beams", self.count))
        penalty = _as_number("length_penalty", self.length_penalty)
        object.__setattr__(self, "length_penalty", penalty)

    def score(self, log_probability: float, length: int) -> float:
        """The number by which texts of different lengths are compared; the largest is the best."""
        return log_probability / length**self.length_penalty


def _as_number(name: str, value: Any) -> Any:
    """The value of this field of GenerationSettings; a text, such as of stop_token, is refused."""
    field = fields_of(GenerationSettings)[name]
    return convert(field._replace(kinds=tuple(t for t in field.kinds if t is not str)), value)
