"""Streams a text, shows the likeliest next tokens, and scores texts. It learns the Zen of Python.

Half a minute of training makes the model know 856 characters by heart, and nothing else. For a
model that knows English, replace everything up to load_gpt2 by
gpt2.download_gpt2(model_name="124M") and gpt2.load_gpt2(sess, model_name="124M").
"""

import codecs
import this

import gpt_2_simple as gpt2

STEPS = 300

with open("zen.txt", "w", encoding="utf-8") as file:
    file.write(codecs.decode(this.s, "rot13"))
gpt2.create_gpt2(model_name="zen", n_layer=2, seed=1, overwrite=True)
sess = gpt2.start_tf_sess()
gpt2.finetune(
    sess, "zen.txt", STEPS, "zen", run_name="zen", restore_from="fresh", batch_size=8,
    accumulate_gradients=1, sequence_length=128, learning_rate=3e-3, warmup_steps=50,
    lr_schedule="cosine", gradient_clip=1.0, sample_every=0, print_every=100, seed=1,
)  # fmt: skip
gpt2.load_gpt2(sess, run_name="zen")  # in a later process; finetune leaves the model in `sess`

print("\nStreamed:")
for piece in gpt2.generate_stream(sess, "Beautiful is", length=100, temperature=0):
    print(piece, end="", flush=True)

print("\n\nThe likeliest tokens after 'Although ':")
for token, probability in gpt2.next_token_probs(sess, "Although ", k=3):
    print(f"{probability:8.2%} {token!r}")

print("\nPerplexity:")
for text in gpt2.score(sess, ["Simple is better than complex.", "Complex is better than simple."]):
    print(f"{text.perplexity:8.2f} {text.text}")

print("\nTwo texts for each prefix; the same seed gives the same texts:")
gpt2.generate(sess, prefix=["Now is", "Although"], nsamples=2, length=80, stop="\n", seed=7)
