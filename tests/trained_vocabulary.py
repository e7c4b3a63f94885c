"""A vocabulary trained on Python's own help, and where GPT-2's files are, for several tests."""

import functools
import pydoc_data.topics
from pathlib import Path

import pytest

from gpt_2_simple.data.vocabulary import train_vocabulary

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="GPT-2's own vocabulary is not here")

TOPICS = "\n".join(pydoc_data.topics.topics.values())[:200_000]
OTHER_LANGUAGES = (
    "Größe, naïve, Привет мир, 你好世界, こんにちは, مرحبا, שלום, 👩‍👩‍👧 ½ ¾ ²  \n" * 20
)


@functools.cache
def trained_vocabulary():
    """1,500 tokens."""
    return train_vocabulary([TOPICS, OTHER_LANGUAGES], 1500)
