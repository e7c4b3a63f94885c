"""Learns jokes from a table, ten times over, and tells ten that are not in the table.

It learns the table beside it. For your own, set TABLE and COLUMN. docs/jokes.md has the same as
four shell commands, and as one for a remote machine.
"""

import csv
import difflib
from pathlib import Path

import gpt_2_simple as gpt2

TABLE = Path(__file__).parent / "jokes.csv"
COLUMN = "joke"
EPOCHS = 10
MODEL = "small"  # for good jokes "124M", got by gpt2.download_gpt2(model_name="124M")

small = {}
if MODEL == "small":  # knows no English, and 150 jokes do not teach it: its jokes are noise
    gpt2.create_gpt2(model_name=MODEL, n_ctx=128, n_layer=2, n_embd=96, seed=1, overwrite=True)
    small = {"batch_size": 4, "accumulate_gradients": 1, "learning_rate": 2e-3}
sess = gpt2.start_tf_sess()
result = gpt2.finetune(
    sess, str(TABLE), model_name=MODEL, run_name="jokes", restore_from="fresh", column=COLUMN,
    epochs=EPOCHS, sampling="epoch", val_split=0.1, val_every=10, print_every=20,
    sample_every=0, seed=1, **small,
)  # fmt: skip
if result.interrupted:
    raise SystemExit("Interrupted: the run is saved")
print(f"Best after step {result.best_step} of {result.step}: {result.best_loss:.2f} nats a token")
gpt2.load_gpt2(sess, "best", run_name="jokes")
texts = gpt2.generate(
    sess, prefix="<|startoftext|>", include_prefix=False, stop_token="<|endoftext|>", length=100,
    nsamples=30, batch_size=10, seed=1, return_as_list=True,
)  # fmt: skip
with open(TABLE, newline="", encoding="utf-8-sig") as file:
    known = [row[COLUMN] for row in csv.DictReader(file)]
new = [text for text in texts if not difflib.get_close_matches(text, known, n=1, cutoff=0.8)]
print(f"{len(texts) - len(new)} of {len(texts)} texts copy a joke. The first ten others:")
print("\n".join(f"- {text.strip()}" for text in new[:10]))
