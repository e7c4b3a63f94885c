"""Fine-tune GPT-2 on your own text, and generate from it, on TensorFlow graph sessions.

    import gpt_2_simple as gpt2

    gpt2.download_gpt2(model_name="124M")            # models/124M/
    sess = gpt2.start_tf_sess()
    gpt2.finetune(sess, "shakespeare.txt", model_name="124M", steps=1000)   # checkpoint/run1/
    gpt2.generate(sess)

In a later session, `gpt2.load_gpt2(sess)` loads the run again. Without a download,
`gpt2.create_gpt2()` makes a small model to train from nothing.
"""

import os

# On CPUs without AMX or AVX512-VNNI, TensorFlow leaves oneDNN off; it halves a training step.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

from .gpt_2 import *  # noqa: E402, F403
from .gpt_2 import __all__ as __all__  # noqa: E402
