"""Settings of generating: how the next token is chosen, and how beams are compared."""

from __future__ import annotations

import dataclasses

from ..common.checks import MAX_INT32, check_number, check_whole


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from the logits.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: choose among this many of the likeliest tokens; 0, or more than there are, among all.
        top_p: choose among the likeliest tokens that together have this probability (Holtzman et
            al. 2019); 0 and 1 are off. With top_k, the probabilities are those after top_k.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the text
            holds already (Keskar et al. 2019); 1 is off.
        no_repeat_ngram_size: no run of this many tokens appears twice; 0 is off.
        min_length: new tokens before stop_token may come.
        bad_words: sequences of token ids that must not appear.
        stop_token: a row ends with this token; None for no such token.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_token: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        check_number("temperature", self.temperature, "0 (greedy) or above", 0)
        check_number("top_p", self.top_p, "between 0 and 1; both are off", 0, 1)
        check_number("repetition_penalty", self.repetition_penalty, "above 0; 1 is off", 0)
        if not self.repetition_penalty:
            raise ValueError("repetition_penalty=0 must be above 0; 1 is off")
        for name in ["top_k", "no_repeat_ngram_size", "min_length"]:
            check_whole(name, getattr(self, name), most=MAX_INT32)
        if self.stop_token is not None:
            check_whole("stop_token", self.stop_token, most=MAX_INT32)
        words = tuple(tuple(map(int, word)) for word in self.bad_words)
        if not all(words):
            raise ValueError(f"bad_words={self.bad_words!r} holds an empty word; leave it out")
        object.__setattr__(self, "bad_words", words)

    @property
    def controlled(self) -> bool:
        """Whether the logits must be changed before choosing."""
        return bool(
            self.repetition_penalty != 1
            or self.no_repeat_ngram_size
            or self.bad_words
            or self.min_length
        )


@dataclasses.dataclass(frozen=True)
class Beams:
    """Beam search: of all texts the likeliest are followed, none is drawn.

    Attributes:
        count: texts that are followed at once.
        length_penalty: texts are compared by log-probability / length ** length_penalty; above 0 is
            kind to long ones, below 0 to short ones (as in Hugging Face's generate).
    """

    count: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        check_whole("num_beams", self.count, 1, most=MAX_INT32)
        check_number("length_penalty", self.length_penalty, "between -50 and 50", -50, 50)

    def score(self, log_probability: float, length: int) -> float:
        """What texts are compared by."""
        return log_probability / length**self.length_penalty
