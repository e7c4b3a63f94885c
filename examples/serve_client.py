"""Asks a server of gpt_2_simple with OpenAI's own client: whole texts, a stream, token scores.

gpt_2_simple serve --model_name 124M          # in another terminal; or --run_name run1
pip install openai
python examples/serve_client.py --prompt "ROMEO:"
"""

import argparse
import os

import openai

parser = argparse.ArgumentParser()
parser.add_argument("--address", default="http://127.0.0.1:8000")
parser.add_argument("--prompt", default="ROMEO:")
parser.add_argument("--max_tokens", type=int, default=40)
options = parser.parse_args()

key = os.environ.get("GPT_2_SIMPLE_API_KEY", "none")
client = openai.OpenAI(base_url=f"{options.address}/v1", api_key=key)
model = next(iter(client.models.list())).id
common = {"model": model, "prompt": options.prompt, "max_tokens": options.max_tokens}

print(f"--- two texts of {model}")
made = client.completions.create(**common, n=2, seed=1, temperature=0.7)
for choice in made.choices:
    print(f"{options.prompt}{choice.text}\n")
print(f"{made.usage.completion_tokens} tokens were written")

print(f"--- a text while it is written\n{options.prompt}", end="")
for piece in client.completions.create(**common, stream=True, extra_body={"top_k": 40}):
    print(piece.choices[0].text, end="", flush=True)

print("\n--- how likely each token was")
scores = client.completions.create(**common, temperature=0, logprobs=0).choices[0].logprobs
for token, score in zip(scores.tokens[:5], scores.token_logprobs[:5], strict=True):
    print(f"{score:8.3f} {token!r}")
