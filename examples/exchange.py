"""Takes a model from Hugging Face, trains it, and writes it for transformers, llama.cpp and Ollama.

SOURCE is a folder that transformers wrote, or a name on the hub, which needs
`pip install "gpt_2_simple[hub]"`. OpenAI's GPT-2 also comes from its own server, without it:
gpt2.download_gpt2(model_name="124M"). The GGUF file needs `pip install "gpt_2_simple[gguf]"`.
"""

import sys

import gpt_2_simple as gpt2

STEPS = 20
SOURCE = "distilgpt2"

with open("zen.txt", "w", encoding="utf-8") as file:
    import this

    table = {letter: this.d.get(letter, letter) for letter in set(this.s)}
    file.write("".join(table[letter] for letter in this.s))
gpt2.import_huggingface(SOURCE, model_name="imported")
sess = gpt2.start_tf_sess()
result = gpt2.finetune(
    sess, "zen.txt", STEPS, "imported", run_name="zen", accumulate_gradients=1, sample_every=0
)
sess.close()
if result.interrupted:
    sys.exit("Interrupted: the run is saved")

folder = gpt2.export_huggingface("zen", precision="bfloat16")
path = gpt2.export_gguf("zen", quantization="f16")
print(f"transformers: AutoModelForCausalLM.from_pretrained({folder!r})")
print(f"llama.cpp: llama-cli -m {path}")
print("Ollama: ollama create zen -f Modelfile, in the same folder")
