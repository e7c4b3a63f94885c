"""finetune() in a process whose TensorFlow behaves as in a TF1 script."""

import subprocess
import sys

import pytest

SCRIPT = """
import tensorflow as tf
tf.compat.v1.{switch}()
import gpt_2_simple as gpt2

gpt2.create_gpt2(model_name="tiny", n_layer=1, n_head=1, n_embd=8, n_ctx=16, seed=3)
with open("text.txt", "w") as file:
    file.write("ten green bottles hanging on the wall\\n" * 9)
settings = dict(model_name="tiny", sample_every=1, sample_length=3, val_split=0.3, verbose=0)
with gpt2.start_tf_sess() as sess:
    gpt2.finetune(sess, "text.txt", 2, optimizer="adafactor", **settings)
    result = gpt2.finetune(
        sess, "text.txt", 2, accumulate_gradients=1, use_memory_saving_gradients=True, **settings
    )
    assert result.step == 4 and result.validation_loss > 0
with gpt2.start_tf_sess() as sess:
    gpt2.load_gpt2(sess, verbose=0)
    assert len(gpt2.generate(sess, length=20, nsamples=2, batch_size=2, return_as_list=True)) == 2
    assert len(gpt2.generate(sess, length=4, prefix="a", num_beams=2, return_as_list=True)) == 1
    assert gpt2.score(sess, "green bottles")[0].perplexity > 1
    assert gpt2.next_token_probs(sess, "green")
"""


@pytest.mark.parametrize("switch", ["disable_v2_behavior", "disable_v2_tensorshape"])
def test_create_finetune_resume_generate_and_score_in_a_tf1_script(tmp_path, switch):
    script = SCRIPT.replace("{switch}", switch)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint/run1/model-4.index").exists()
