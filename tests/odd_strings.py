"""Texts that tokenizers trip over: white space, apostrophes, scripts, emoji, special tokens."""

import random

PIECES = [
    *("a", "the", "The", "don't", "I'LL", "'s", "'re", "''", "x'", "42", "3.14", "1,000", "½²"),
    *("<|endoftext|>", "<|endoftext|", "|>", "<|", "endoftext", "<|startoftext|>", "[PAD]"),
    *("é", "e\u0301", "naïve", "Größe", "ß", "ﬁ", "İ", "ǅ", "你好", "こんにちは", "мир", "שלום"),
    *("مرحبا", "👍🏽", "👩‍👩‍👧", "🇩🇪", "\u200b", "\u200d", "\ufeff", "\ufffd", "\x00", "\x7f"),
    *("\t", "\n", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"),
    *(".", "...", "!?", "--", "—", "“q”", "$", "€", "#tag", "@me", "http://a.b/?c=d&e", "_", "\\"),
    *("𝔘𝔫𝔦", "𐍈", "\U0010ffff", "\ue000", "٣", "๓", "Ⅷ", "①", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
]
SPACES = ["", "", " ", " ", " ", "  ", "   ", "\n", "\n\n", " \n", "\t"]


def odd_strings(count, seed=0):
    """`count` texts without lone surrogates; the same for the same seed."""
    rng = random.Random(seed)
    texts = ["", " ", "  ", "\n", *PIECES]
    while len(texts) < count:
        words = [rng.choice(PIECES) for _ in range(rng.randint(1, 8))]
        texts.append("".join(rng.choice(SPACES) + word for word in words) + rng.choice(SPACES))
    return texts[:count]
