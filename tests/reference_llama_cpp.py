"""Runs in a Python that has xllamacpp: a GGUF file in, what llama.cpp makes of it out, as JSON.

    python reference_llama_cpp.py FILE.gguf REQUEST.json ANSWER.json

The request names what is wanted:
    {"texts": [...]}                 token ids of each text
    {"prefixes": [[...], ...]}       log-probabilities of the token after each of these;
                                     "plain" is some token that is a whole character
    {"prefix": [...], "length": n}   token ids that greedy decoding adds
"""

import json
import sys
import urllib.request

import xllamacpp


def start(path, n_ctx):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = n_ctx
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cpuparams.n_threads = 1
    return xllamacpp.Server(parameters)


def call(server, endpoint, content):
    request = urllib.request.Request(
        f"{server.listening_address}/{endpoint}",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def next_log_probs(server, prefix, n_vocab, plain):
    """Every token's log-probability, in the order of the ids."""
    answer = call(server, "completion", {
        "prompt": prefix, "n_predict": 1, "temperature": -1, "n_probs": n_vocab,
        "cache_prompt": False,
        # The server tells probabilities only beside text, which half a character does not make. So
        # the token is one that does; the probabilities are those before the bias.
        "logit_bias": [[plain, 1000]],
    })  # fmt: skip
    found = {p["id"]: p["logprob"] for p in answer["completion_probabilities"][0]["top_logprobs"]}
    return [found[token] for token in range(n_vocab)]


def answer(path, request):
    server = start(path, request["n_ctx"])
    found = {}
    found["ids"] = [
        call(server, "tokenize", {"content": text, "add_special": False, "parse_special": True})[
            "tokens"
        ]
        for text in request.get("texts", [])
    ]
    found["log_probs"] = [
        next_log_probs(server, prefix, request["n_vocab"], request["plain"])
        for prefix in request.get("prefixes", [])
    ]
    if "prefix" in request:
        found["greedy"] = call(server, "completion", {
            "prompt": request["prefix"], "n_predict": request["length"], "temperature": -1,
            "return_tokens": True, "ignore_eos": False, "cache_prompt": False,
        })["tokens"]  # fmt: skip
    return found


if __name__ == "__main__":
    path, request_path, answer_path = sys.argv[1:]
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answer(path, request), file)
