"""Trains on short texts from a column of a table: names of Unicode's symbols. Generates new names.

To start from GPT-2, which knows English, use gpt2.download_gpt2(model_name="124M") instead of
create_gpt2, set MODEL = "124M", and leave out **small.
"""

import csv
import random
import unicodedata

import gpt_2_simple as gpt2

EPOCHS = 5
MODEL = "symbols"
END = "<|endoftext|>"  # finetune puts it after each row, and "<|startoftext|>" before

codes = [*range(0x2000, 0x2C00), *range(0x1F300, 0x1FB00)]
names = [name.lower() for code in codes if (name := unicodedata.name(chr(code), ""))]
random.Random(0).shuffle(names)  # val_split takes the end: it should be like the rest
with open("symbols.csv", "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([["number", "name"], *enumerate(names)])
gpt2.create_gpt2(model_name=MODEL, n_ctx=128, n_layer=3, n_embd=96, seed=1, overwrite=True)
sess = gpt2.start_tf_sess()
data = {"dataset": "symbols.csv", "column": "name", "val_split": 0.1, "sampling": "epoch"}
small = {"batch_size": 8, "accumulate_gradients": 1, "learning_rate": 2e-3, "warmup_steps": 40}
often = {"print_every": 100, "sample_every": 0, "val_every": 100, "patience": 2}
result = gpt2.finetune(
    sess, model_name=MODEL, run_name="symbols", restore_from="fresh", epochs=EPOCHS,
    lr_schedule="cosine", seed=1, **data, **small, **often,
)  # fmt: skip
if result.interrupted:
    raise SystemExit("Interrupted: the run is saved")
print(f"Best after step {result.best_step} of {result.step}: {result.best_loss:.2f} nats a token")
gpt2.load_gpt2(sess, "best", run_name="symbols")
rows = gpt2.generate(
    sess, prefix="<|startoftext|>", include_prefix=False, stop_token=END, length=100, nsamples=10,
    batch_size=10, seed=1, return_as_list=True,
)  # fmt: skip
for row in rows:
    print("known:" if row in names else "new:  ", row)
