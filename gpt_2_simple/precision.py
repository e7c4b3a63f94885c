"""A wanted precision in; the one that a session's GPUs have, out."""

from __future__ import annotations

import tensorflow as tf

from .common.report import say


def fitting_precision(precision: str, capability: tuple[int, int]) -> str:
    """The wanted precision, or the next best one that a GPU of this compute capability has.

    From 7.0 on a GPU has hardware for float16, whose speed makes up for the loss scale.
    """
    if precision == "bfloat16" and capability < (8, 0):
        return "float16" if capability >= (7, 0) else "float32"
    if precision == "float16" and capability < (5, 3):
        return "float32"
    return precision


def has_gpu(sess: tf.compat.v1.Session) -> bool:
    """Whether a session has a GPU."""
    return any(device.device_type == "GPU" for device in sess.list_devices())


def fit_precision(sess: tf.compat.v1.Session, precision: str) -> str:
    """The wanted precision, or the next best one that the session's GPUs have; then prints so.

    CPUs, and GPUs whose compute capability is not known, get the wanted precision.
    """
    if not has_gpu(sess):
        return precision
    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    capabilities = [d["compute_capability"] for d in details if "compute_capability" in d]
    if not capabilities:
        return precision
    least = min(capabilities)
    fitting = fitting_precision(precision, least)
    if fitting != precision:
        say(
            f"precision: this GPU (compute capability {least[0]}.{least[1]}) has no "
            f"{precision}; using {fitting}"
        )
    return fitting
