"""The precision that a GPU gets in place of one that it lacks."""

import types

import pytest
import tensorflow as tf

from gpt_2_simple import precision as precisions


@pytest.mark.parametrize(
    ("precision", "capability", "fitting"),
    [
        ("bfloat16", (8, 0), "bfloat16"),
        ("bfloat16", (12, 0), "bfloat16"),
        ("bfloat16", (7, 5), "float16"),
        ("bfloat16", (7, 0), "float16"),
        ("bfloat16", (6, 1), "float32"),
        ("float16", (5, 3), "float16"),
        ("float16", (5, 2), "float32"),
        ("float32", (3, 5), "float32"),
    ],
)
def test_fitting_precision_of_gpus(precision, capability, fitting):
    assert precisions.fitting_precision(precision, capability) == fitting


class Devices(list):
    """Stands for a session, and for TensorFlow's list of these GPUs' details."""

    def __init__(self, monkeypatch, *details):
        super().__init__(types.SimpleNamespace(device_type="GPU", details=d) for d in details)
        monkeypatch.setattr(tf.config, "list_physical_devices", {"GPU": self}.get)
        monkeypatch.setattr(
            tf.config.experimental, "get_device_details", lambda device: device.details
        )

    def list_devices(self):
        return [types.SimpleNamespace(device_type="CPU"), *self]


def test_fit_precision_prints_a_changed_precision(sess, monkeypatch, capsys):
    asked = "bfloat16"
    a100, t4 = {"compute_capability": (8, 0)}, {"compute_capability": (7, 5)}
    assert precisions.fit_precision(Devices(monkeypatch, a100), asked) == asked
    assert precisions.fit_precision(Devices(monkeypatch, {"device_name": "of AMD"}), asked) == asked
    # A session that keeps to the CPU, though there is a GPU.
    Devices(monkeypatch, t4)
    assert precisions.fit_precision(sess, asked) == asked
    assert capsys.readouterr().out == ""
    changed = precisions.fit_precision(Devices(monkeypatch, a100, t4), asked)
    assert changed == "float16"
    line = "precision: this GPU (compute capability 7.5) has no bfloat16; using float16\n"
    assert capsys.readouterr().out == line
