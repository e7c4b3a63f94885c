"""Makes a small model, trains it, and generates a text. `make demo` runs it in three minutes.

The model starts from nothing. The text is the language reference that comes with Python.
"""

import math
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import gpt_2_simple as gpt2

STEPS = 1200

text = Path("checkpoint/python-reference.txt")
text.parent.mkdir(exist_ok=True)
text.write_text(" ".join(" ".join(topics.values()).split()), encoding="utf-8")

gpt2.create_gpt2(model_name="demo", n_ctx=64, seed=1, overwrite=True)
sess = gpt2.start_tf_sess()
result = gpt2.finetune(
    sess, str(text), STEPS, "demo", run_name="demo", restore_from="fresh", batch_size=16,
    accumulate_gradients=1, learning_rate=2e-3, warmup_steps=100, lr_schedule="cosine",
    gradient_clip=1.0, val_split=0.05, val_every=200, print_every=40, sample_every=400,
    sample_length=200, seed=1,
)  # fmt: skip
if result.interrupted:
    raise SystemExit("Interrupted: the run is saved")
shares = [count / text.stat().st_size for count in Counter(text.read_bytes()).values()]
entropy = -sum(share * math.log(share) for share in shares)
print(f"\nUnigram entropy of the text: {entropy:.2f} nats a byte, from letter counts alone.")
print(f"Loss on text it never saw:   {result.validation_loss:.2f} nats a byte.\n")

gpt2.generate(sess, prefix="The ", length=250, temperature=0.7, seed=1)
print("""
This model has 0.8 million parameters. GPT-2 has 124 million or more, trained on text of the web:

    gpt2.download_gpt2(model_name="124M")
    sess = gpt2.start_tf_sess()
    gpt2.finetune(sess, "your text.txt", model_name="124M", steps=500)""")
