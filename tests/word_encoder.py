"""An encoder whose ids tell how text was split, and what the tests of data/ share."""

import random

import regex

from gpt_2_simple.data.dataset import ReadOptions, find_dataset, tokenize
from gpt_2_simple.data.tables import RowFormat

GPT2_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = 512


class WordEncoder:
    """Bytes, each word's first with 256 added: its ids tell where GPT-2's pattern splits."""

    n_vocab = 513
    end_of_text = END_OF_TEXT
    special_tokens = {"<|endoftext|>": END_OF_TEXT}  # noqa: RUF012
    encoder = {str(number): number for number in range(513)}  # noqa: RUF012
    bpe_merges: list = []  # noqa: RUF012

    def encode(self, text, allow_special=False):
        pieces = text.split("<|endoftext|>") if allow_special else [text]
        ids = []
        for number, piece in enumerate(pieces):
            ids += [END_OF_TEXT] * (number > 0)
            for word in GPT2_WORDS.findall(piece):
                first, *rest = word.encode("utf-8", "surrogatepass")
                ids += [256 + first, *rest]
        return ids

    def decode_bytes(self, ids):
        return b"".join(b"<|endoftext|>" if i == END_OF_TEXT else bytes([i % 256]) for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "surrogatepass")


ENC = WordEncoder()
ROW_OPTIONS = (
    *("column", "template", "header", "delimiter", "start_token", "end_token", "train_on"),
)


def write(path, content):
    """Writes text or bytes to a file, with its folder; returns the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def load(path, enc=ENC, cache_dir=None, processes=None, **options):
    """The chunks of a dataset; `options` are those of ReadOptions and RowFormat together."""
    row_format = RowFormat(**{name: options.pop(name) for name in ROW_OPTIONS if name in options})
    dataset = find_dataset(path, ReadOptions(row_format=row_format, **options))
    return tokenize(dataset, enc, cache_dir, processes)


def texts_of(path, **options):
    """The text of each chunk of a dataset."""
    return [ENC.decode(chunk) for chunk in load(path, **options)]


def documents_of(path, **options):
    """The text of each document of a dataset: of a table, its rows."""
    return texts_of(path, pad_documents=True, **options)


def wrapped(*texts):
    """The documents that rows of these texts become."""
    return [f"<|startoftext|>{text}<|endoftext|>\n" for text in texts]


def some_text(characters, seed=0):
    """Words of several kinds, the same for the same seed."""
    draw = random.Random(seed)
    words = ["the", "of", " and", "naïve", "x,\n", "\n\n", "  12", "don't", "漢字", "<|endoftext|>"]
    text = ""
    while len(text) < characters:
        text += draw.choice(words) + draw.choice(["", " "])
    return text
