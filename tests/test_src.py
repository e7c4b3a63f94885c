"""0.8.1's inner modules: their names lead to today's objects, or to what replaced them."""

import importlib
import re
import subprocess
import sys

import pytest

import gpt_2_simple.src

# The functions and classes of 0.8.1's gpt_2_simple/src/*.py.
NAMES = {
    "model": "HParams default_hparams shape_list softmax gelu norm split_states merge_states "
    "conv1d attention_mask attn mlp block past_shape expand_tile positions_for get_value model",
    "sample": "top_k_logits top_p_logits sample_sequence",
    "encoder": "bytes_to_unicode get_pairs Encoder get_encoder",
    "load_dataset": "load_dataset binary_search Sampler",
    "accumulate": "AccumulatingOptimizer",
    "memory_saving_gradients": "gradients_speed gradients_memory gradients_collection gradients "
    "tf_toposort fast_backward_ops capture_ops debug_print format_ops my_add_control_inputs",
}

TODAY = {
    "model.HParams": "model.HParams",
    "model.default_hparams": "model.default_hparams",
    "model.gelu": "model.gelu",
    "model.past_shape": "model.past_shape",
    "model.model": "model.model",
    "encoder.bytes_to_unicode": "encoder.bytes_to_unicode",
    "encoder.Encoder": "encoder.Encoder",
    "encoder.get_encoder": "encoder.get_encoder",
    "load_dataset.load_dataset": "data.dataset.load_dataset",
    "load_dataset.Sampler": "data.windows.WindowSampler",
    "accumulate.AccumulatingOptimizer": "training.optimizer.AccumulatingOptimizer",
    "memory_saving_gradients.gradients": "memory_saving_gradients.gradients",
}

CASES = [(module, name) for module, names in NAMES.items() for name in names.split()]


def resolve(path):
    """The object at a dotted path such as 'gpt_2_simple.model.linear'."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("module", "name"), CASES)
def test_old_name_is_todays_object_or_names_its_replacement(module, name):
    old = importlib.import_module(f"gpt_2_simple.src.{module}")
    if f"{module}.{name}" in TODAY:
        assert getattr(old, name) is resolve(f"gpt_2_simple.{TODAY[f'{module}.{name}']}")
        return
    with pytest.raises(ImportError, match=rf"src\.{module}\.{name} is no longer there; use ") as e:
        getattr(old, name)
    replacement = str(e.value).partition("; use ")[2]
    for path in re.findall(r"\b(?:gpt_2_simple|tf|toposort)(?:\.\w+)+", replacement):
        assert callable(resolve(re.sub(r"^tf\b", "tensorflow", path)))


@pytest.mark.parametrize("module", NAMES)
def test_unknown_name_is_an_attribute_error(module):
    old = getattr(gpt_2_simple.src, module)
    for name in ("nothing", "_private", "__path__"):
        assert not hasattr(old, name)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from gpt_2_simple.src.{module} import nothing")


IMPORTS = """
import gpt_2_simple.src.model as m
import gpt_2_simple.src.memory_saving_gradients
from gpt_2_simple.src import sample, encoder, accumulate
from gpt_2_simple.src.load_dataset import load_dataset, Sampler
from gpt_2_simple.src.encoder import get_encoder
import sys
assert "tensorflow" not in sys.modules
assert Sampler.__name__ == "WindowSampler"
assert m is sys.modules["gpt_2_simple.src.model"] is gpt_2_simple.src.model
"""

USES = """
from gpt_2_simple.src.accumulate import AccumulatingOptimizer
from gpt_2_simple.src.model import *
import gpt_2_simple
assert model is gpt_2_simple.model.model
assert default_hparams().n_layer == 12
assert gpt_2_simple.src.sample.generate_tokens is gpt_2_simple.sample.generate_tokens
try:
    from gpt_2_simple.src.sample import sample_sequence
except ImportError as error:
    assert "gpt_2_simple.generate" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.parametrize("script", [IMPORTS, IMPORTS + USES, USES])
def test_old_imports_work_in_a_fresh_interpreter(script):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
