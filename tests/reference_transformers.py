"""Runs in a Python that has transformers: a folder in, what transformers makes of it out, as JSON.

    python reference_transformers.py FOLDER REQUEST.json ANSWER.json

The request names what is wanted:
    {"texts": [...]}                 token ids of each text
    {"tokens": [[...], ...]}         float32 log-probabilities of the next token, at each position
    {"prefix": [...], "length": n}   token ids that greedy decoding adds
    {"save": {"path": ..., "dtype": ..., "max_shard_size": ...}}   saves the model again
"""

import json
import sys

import torch
import transformers

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def answer(folder, request):
    found = {"version": transformers.__version__}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if "texts" in request:
        found["ids"] = [tokenizer(text)["input_ids"] for text in request["texts"]]
        found["decoded"] = [
            tokenizer.decode(ids, skip_special_tokens=False) for ids in found["ids"]
        ]
    with torch.no_grad():
        if "tokens" in request:
            logits = [model(torch.tensor([tokens])).logits[0] for tokens in request["tokens"]]
            found["log_probs"] = [torch.log_softmax(x, -1).tolist() for x in logits]
        if "prefix" in request:
            prefix = torch.tensor([request["prefix"]])
            options = {"max_new_tokens": request["length"], "min_new_tokens": request["length"]}
            out = model.generate(
                prefix, attention_mask=torch.ones_like(prefix), do_sample=False, pad_token_id=0,
                **options,
            )  # fmt: skip
            found["greedy"] = out[0, prefix.shape[1] :].tolist()
    if "save" in request:
        save = request["save"]
        model.to(getattr(torch, save["dtype"]))
        model.save_pretrained(save["path"], max_shard_size=save["max_shard_size"])
        tokenizer.save_pretrained(save["path"])
    return found


if __name__ == "__main__":
    folder, request_path, answer_path = sys.argv[1:]
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answer(folder, request), file)
