"""Steps that were finite or not in, the factor of float16's loss out."""

from __future__ import annotations

import tensorflow as tf

from ..model import get_variable
from ..storage.runs import LOSS_SCALE

# Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740) for float16.
FIRST_LOSS_SCALE = 2.0**15
GOOD_STEPS = 2000


class LossScale:
    """The factor for the loss that keeps float16 gradients from becoming 0."""

    def __init__(self) -> None:
        with tf.compat.v1.variable_scope(
            tf.compat.v1.get_variable_scope(), reuse=tf.compat.v1.AUTO_REUSE
        ):
            self.scale = self._variable("scale", FIRST_LOSS_SCALE)
            self.good_steps = self._variable("good_steps", 0.0)

    @staticmethod
    def _variable(name: str, value: float) -> tf.Variable:
        return get_variable(
            f"{LOSS_SCALE}/{name}", [], tf.float32, trainable=False,
            initializer=tf.compat.v1.constant_initializer(value), use_resource=True,
        )  # fmt: skip

    def grow(self) -> tf.Operation:
        """Counts a step that was taken; doubles the scale after GOOD_STEPS of them."""
        enough = tf.cast(self.good_steps.read_value() + 1 >= GOOD_STEPS, tf.float32)
        good = (self.good_steps.read_value() + 1) * (1 - enough)
        scale = self.scale.read_value() * (1 + enough)
        with tf.control_dependencies([good, scale]):
            return tf.group(self.good_steps.assign(good), self.scale.assign(scale))

    def halve(self) -> tf.Operation:
        """Halves the scale after gradients that were not finite."""
        halved = tf.maximum(self.scale.read_value() / 2, 1.0)
        with tf.control_dependencies([halved]):
            return tf.group(self.good_steps.assign(0.0), self.scale.assign(halved))
