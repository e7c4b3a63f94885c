"""Takes a model from Hugging Face, trains an adapter, and writes it for peft, transformers, Ollama.

SOURCE is a folder that transformers wrote, or a name on the hub, which needs
`pip install "gpt_2_simple[hub]"`. OpenAI's GPT-2 also comes from its own server, without it:
gpt2.download_gpt2(model_name="124M"). The GGUF file needs `pip install "gpt_2_simple[gguf]"`.
"""

import this

import gpt_2_simple as gpt2

STEPS = 20
SOURCE = "distilgpt2"

zen = "".join(this.d.get(letter, letter) for letter in this.s)
with open("zen.txt", "w", encoding="utf-8") as file:
    file.write(zen)
gpt2.import_huggingface(SOURCE, model_name="imported")
sess = gpt2.start_tf_sess()
result = gpt2.finetune(
    sess, "zen.txt", STEPS, "imported", run_name="zen", lora_rank=8, learning_rate=1e-3,
    accumulate_gradients=1, sample_every=0,
)  # fmt: skip
sess.close()
if result.interrupted:
    raise SystemExit("Interrupted: the run is saved")

gpt2.merge_adapter("zen", "zen-merged")
folder = gpt2.export_huggingface("zen-merged", precision="bfloat16")
path = gpt2.export_gguf("zen-merged", quantization="f16")
print(f"peft: PeftModel.from_pretrained(model, {result.checkpoint!r})")
print(f"transformers: AutoModelForCausalLM.from_pretrained({folder!r})")
print(f"llama.cpp: llama-cli -m {path}")
print("Ollama: ollama create zen -f Modelfile, in the same folder")
