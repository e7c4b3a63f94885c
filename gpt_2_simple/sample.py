"""Token ids in, token ids out: the public names of `generation` for callers without texts."""

from __future__ import annotations

from .generation.beam_search import BeamSearch, Hypothesis
from .generation.scoring import likeliest_next_tokens as next_token_probs
from .generation.scoring import score_tokens
from .generation.sequences import generate_tokens
from .generation.settings import Beams, SamplingParams

# The last release's names.
Sampling, Search, Found = SamplingParams, BeamSearch, Hypothesis

__all__ = [
    "BeamSearch",
    "Beams",
    "Found",
    "Hypothesis",
    "Sampling",
    "SamplingParams",
    "Search",
    "generate_tokens",
    "next_token_probs",
    "score_tokens",
]
