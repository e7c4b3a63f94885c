"""Trains a run, resumes it, and compares three of its checkpoints on text that it never saw.

To train GPT-2 itself, use gpt2.download_gpt2(model_name="124M") instead of create_gpt2, set
MODEL = "124M", and leave out batch_size, accumulate_gradients and learning_rate.
"""

from pydoc_data.topics import topics

import gpt_2_simple as gpt2

STEPS = 200  # in each call
MODEL = "reader"

for name, topic in (("train.txt", "strings"), ("validation.txt", "function")):
    with open(name, "w", encoding="utf-8") as file:
        file.write(topics[topic])
gpt2.create_gpt2(model_name=MODEL, n_ctx=128, n_layer=3, n_embd=96, seed=1, overwrite=True)


def train(restore_from: str) -> None:
    """Trains for STEPS steps in a new session; stops when the run has taken 5 minutes."""
    sess = gpt2.start_tf_sess()
    result = gpt2.finetune(
        sess, "train.txt", STEPS, MODEL, run_name="reader", restore_from=restore_from,
        batch_size=8, accumulate_gradients=1, learning_rate=2e-3, val_dataset="validation.txt",
        val_every=25, max_checkpoints=0, sample_every=0, print_every=50, seed=1,
        on_step=lambda entry: entry.seconds < 300,
    )  # fmt: skip
    sess.close()
    if result.interrupted:
        raise SystemExit("Interrupted: the run is saved")


train("fresh")
train("latest")  # resumes exactly: weights, optimizer, position in the text; also after Ctrl-C
sess = gpt2.start_tf_sess()
for checkpoint in (f"model-{STEPS}", "latest", "best"):
    gpt2.load_gpt2(sess, checkpoint, run_name="reader")
    perplexity = gpt2.score(sess, topics["function"])[0].perplexity
    print(f"{checkpoint:10} perplexity {perplexity:.2f}")
