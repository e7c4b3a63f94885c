"""Makes tests/fixtures/transformers: a tiny GPT-2 as transformers saves it, and what it computes.

    python tests/make_transformers_fixture.py      # in a Python that has transformers

The model has 2 blocks, random weights large enough to matter, and a vocabulary of 300 tokens. It is
saved in float16, in shards. expected.json has token ids, log-probabilities and greedy text.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from odd_strings import odd_strings
from reference_transformers import answer

FOLDER = Path(__file__).parent / "fixtures" / "transformers"
TEXT = "The cat sat on the mat. The dog, at the cat's hat, sat and sat: 1 2 3 4, and more! " * 9


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    content = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    return transformers.GPT2Tokenizer(vocab=content["vocab"], merges=merges)


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(torch.float16).save_pretrained(FOLDER, max_shard_size="12KB")
    tokenizer.save_pretrained(FOLDER)
    tokens = tokenizer("The cat sat on the mat.")["input_ids"]
    request = {"texts": odd_strings(120), "tokens": [tokens], "prefix": tokens[:4], "length": 12}
    expected = {"request": request, "answer": answer(FOLDER, request)}
    text = json.dumps(expected, separators=(",", ":"))
    (FOLDER / "expected.json").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
