"""A task of gpu.py in, its measurements out: lines of JSON, in a process of its own.

gpu.py gives the task as JSON on the command line, with the file that takes the lines. Each line is
written as soon as it is measured, so that a process that is stopped leaves what it had.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

END = 50256
LEARNING_RATE = 1e-4
COMPARED_STEPS, COMPARED_TOKENS = 10, 48
WARM_UP_STEPS, WARM_UP_TOKENS = 2, 8
SAMPLING = {"top_k": 40, "temperature": 0.7}
OUT_OF_MEMORY = "out of memory"


def zipf_tokens(n_vocab, shape, seed=0):
    """Words of a text come unequally often: something to learn."""
    import numpy as np

    return np.random.default_rng(seed).zipf(1.3, shape) % n_vocab


def timed(run):
    """The seconds that `run` takes, and what it returns."""
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def median_seconds(run, runs, seconds):
    """The median of so many runs, or of those that began within `seconds`."""
    times, began = [], time.perf_counter()
    while len(times) < runs and (not times or time.perf_counter() - began < seconds):
        times.append(timed(run)[0])
    return statistics.median(times)


class Ours:
    """This library, on the device that a task names: 'GPU:0' or 'CPU:0'."""

    def __init__(self, task):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import numpy as np
        import tensorflow as tf

        import gpt_2_simple  # noqa: F401 (sets TF_ENABLE_ONEDNN_OPTS)
        from gpt_2_simple import model, sample, session
        from gpt_2_simple.common.hparams import HParams
        from gpt_2_simple.training import memory_plan, settings, step

        self.np, self.tf, self.model, self.sample, self.session = np, tf, model, sample, session
        self.memory_plan, self.settings, self.step = memory_plan, settings, step
        self.task, self.device = task, task["device"]
        self.hparams = HParams(**task["hparams"]) if "hparams" in task else None
        self.out_of_memory = tf.errors.ResourceExhaustedError

    def start(self, limit=None):
        """A session as users have it; on a GPU, `limit` bytes bound its allocator."""
        config = self.session.session_config()
        if limit is not None and self.device.startswith("GPU"):
            virtual = config.gpu_options.experimental.virtual_devices.add()
            virtual.memory_limit_mb.append(limit / 2**20)
        return self.tf.compat.v1.Session(graph=self.tf.Graph(), config=config)

    def peak(self):
        """The bytes that the device held at most since forget_peak()."""
        return self.tf.config.experimental.get_memory_info(self.device)["peak"]

    def forget_peak(self):
        self.tf.config.experimental.reset_memory_stats(self.device)

    # --- tasks ------------------------------------------------------------------------------------

    def describe(self, tell):
        """The device, and the bytes that a session may use there."""
        tf = self.tf
        build = tf.sysconfig.get_build_info()
        found = {"tensorflow": tf.__version__, "cuda": build.get("cuda_version")}
        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            details = tf.config.experimental.get_device_details(gpus[0])
            found |= {"card": details.get("device_name", "unknown GPU")}
            found |= {"capability": list(details.get("compute_capability", []))}
        with self.start() as sess:
            found["limit"] = self.memory_plan.device_limit(sess)
            # list_devices() leaves out a GPU that TensorFlow has no libraries for.
            found["has_gpu"] = any(d.device_type == "GPU" for d in sess.list_devices())
        tell(found)

    def compare(self, tell):
        """Logits, losses and greedy tokens of some variants; judges another's tokens, if given."""
        arrays = {}
        for name, precision, tf32 in self.task["variants"]:
            self.tf.config.experimental.enable_tensor_float_32_execution(tf32)
            with self.start() as sess:
                state = self.session.build_model(sess, self.hparams, [])
                self.load_weights(sess, state)
                arrays[f"{name} logits"] = self.logits(sess, state, precision)
                if "texts" in self.task:
                    self.judge(sess, state, tell)
                elif precision == "float32":
                    arrays[f"{name} tokens"] = self.greedy(sess)
                losses = self.losses(sess, state, precision)
            self.np.savez(self.task["arrays"], **arrays)
            tell({"variant": name, "losses": losses})

    def judge(self, sess, state, tell):
        """By how much the logit of each token of a text is below the largest, at most."""
        with self.np.load(self.task["texts"]) as texts:
            for name in (name for name in texts.files if name.endswith("tokens")):
                tokens = texts[name]
                logits = self.logits(sess, state, "float32", tokens)[:, -COMPARED_TOKENS - 1 : -1]
                written = tokens[:, -COMPARED_TOKENS:, None]
                chosen = self.np.take_along_axis(logits, written, axis=-1)[..., 0]
                below = float((logits.max(-1) - chosen).max())
                tell({"judged": name.removesuffix(" tokens"), "below": below})

    def load_weights(self, sess, state):
        """The same random weights on every device; larger than a new model's, so that they matter.

        Attention looks sharply, places matter, and greedy text is not one word.
        """
        tf, rng = self.tf, self.np.random.default_rng(0)
        factors = {"wpe": 4, "c_attn": 3, "mlp": 3}
        for variable in self.model.flatten(state.weights):
            shape, name = variable.shape.as_list(), variable.op.name
            value = 0.02 * rng.standard_normal(shape, dtype=self.np.float32)
            for part, factor in factors.items():
                value *= factor if part in name else 1
            value += name.endswith("/g")
            with sess.graph.as_default():
                placeholder = tf.compat.v1.placeholder(tf.float32, shape)
                sess.run(variable.assign(placeholder).op, {placeholder: value})

    def logits(self, sess, state, precision, tokens=None):
        if tokens is None:
            tokens = zipf_tokens(self.hparams.n_vocab, [2, self.task["time"]], seed=1)
        with sess.graph.as_default():
            dtype = self.tf.as_dtype(precision)
            weights = self.model.read(state.weights)
            tokens = self.tf.constant(tokens, self.tf.int32)
            hidden = self.model.hidden_states(weights, self.hparams, tokens, dtype=dtype)
            h = self.tf.cast(hidden.h, self.tf.float32)
            return sess.run(self.model.unembed(weights, h))

    def greedy(self, sess):
        """Prefixes and the tokens that the model continues them with, by cached decoding."""
        prefixes = zipf_tokens(self.hparams.n_vocab, [3, self.task["time"] // 4], seed=2)
        greedy = self.sample.SamplingParams(temperature=0)
        written = self.sample.generate_tokens(sess, prefixes.tolist(), COMPARED_TOKENS, greedy)
        return self.np.concatenate([prefixes, *written], axis=1)

    def losses(self, sess, state, precision):
        """Of ten steps of Adam, each of two micro-batches."""
        settings = self.settings.step_settings(accumulate_gradients=2, precision=precision)
        steps = Steps(self, sess, state, settings, self.task["time"])
        return [steps.take() for _ in range(COMPARED_STEPS)]

    def train(self, tell):
        """Seconds a step, and the peak memory of one, under the allocator limit of the task."""
        # JSON knows no tuples, and settings are hashed.
        values = {
            k: tuple(v) if isinstance(v, list) else v for k, v in self.task["settings"].items()
        }
        settings = self.settings.StepSettings(**values)
        time_ = min(settings.sequence_length or self.hparams.n_ctx, self.hparams.n_ctx)
        try:
            with self.start(self.task.get("limit")) as sess:
                state = self.session.build_model(sess, self.hparams, [])
                self.initialize(sess, state)
                steps = Steps(self, sess, state, settings, time_)
                self.forget_peak()
                losses = [steps.take() for _ in range(WARM_UP_STEPS)]
                seconds = median_seconds(steps.take, self.task["runs"], self.task["seconds"])
                tell({"seconds": seconds, "peak": self.peak(), "losses": losses})
        except self.out_of_memory:
            tell({"error": OUT_OF_MEMORY})

    def generate(self, tell):
        """Tokens a second by precision and batch size, and the peak memory of each."""
        for precision in self.task["precisions"]:
            with self.start() as sess:
                state = self.session.build_model(sess, self.hparams, [], precision=precision)
                self.initialize(sess, state)
                for batch in self.task["batches"]:
                    self.forget_peak()
                    try:
                        seconds = self.seconds_of_texts(sess, batch)
                    except self.out_of_memory:
                        tell({"precision": precision, "batch": batch, "error": OUT_OF_MEMORY})
                        continue
                    speed = batch * self.task["length"] / seconds
                    peak = {"peak": self.peak()}
                    tell({"precision": precision, "batch": batch, "speed": speed, **peak})

    def initialize(self, sess, state):
        """Random weights, one variable after the other, as a checkpoint is read."""
        for variable in self.model.flatten(state.weights):
            sess.run(variable.initializer)

    def seconds_of_texts(self, sess, batch):
        sampling = self.sample.SamplingParams(**SAMPLING)
        prefixes = [[self.hparams.n_vocab - 1]] * batch

        def write(length):
            for _ in self.sample.generate_tokens(sess, prefixes, length, sampling, seed=0):
                pass

        write(WARM_UP_TOKENS)
        length = self.task["length"]
        return median_seconds(lambda: write(length), self.task["runs"], self.task["seconds"])


class Steps:
    """Training steps on random tokens, as Trainer takes them."""

    def __init__(self, ours, sess, state, settings, n_tokens):
        self.np, self.sess, self.settings = ours.np, sess, settings
        self.ops = ours.step.build_train_ops(state, settings, n_tokens)
        sess.run(self.ops.initialize_state)
        shape = [100, settings.accumulate_gradients, settings.batch_size, n_tokens]
        self.batches = iter(zipf_tokens(state.hparams.n_vocab, shape))

    def take(self):
        """Takes a step; returns its loss. If float16 overflows, the loss is scaled less."""
        ops, run = self.ops, self.sess.run
        shape = ops.loss_weights.shape.as_list()
        weights = self.np.full(shape, 1 / self.np.prod(shape), self.np.float32)
        feeds = [{ops.tokens: tokens, ops.loss_weights: weights} for tokens in next(self.batches)]
        if ops.add_micro_batch is None:
            return float(run(ops.apply_gradients, {**feeds[0], ops.learning_rate: LEARNING_RATE}))
        while True:
            run(ops.reset_gradients)
            for feed in feeds:
                run(ops.add_micro_batch, feed)
            if ops.gradients_finite is None or run(ops.gradients_finite):
                return float(run(ops.apply_gradients, {ops.learning_rate: LEARNING_RATE}))
            run(ops.skip_step)
            if run(ops.loss_scale) <= 1:
                raise FloatingPointError("float16 gradients overflow even at a loss scale of 1")


class Theirs:
    """Hugging Face's transformers on PyTorch, with the settings of ours."""

    def __init__(self, task):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        # TensorFlow's default; PyTorch's is off.
        torch.backends.cuda.matmul.allow_tf32 = True
        self.torch, self.transformers, self.task = torch, transformers, task
        self.device = "cuda" if task["device"].startswith("GPU") else "cpu"
        self.out_of_memory = torch.OutOfMemoryError

    def model(self, **options):
        sizes = self.task["hparams"]
        config = self.transformers.GPT2Config(
            vocab_size=sizes["n_vocab"], n_positions=sizes["n_ctx"], n_embd=sizes["n_embd"],
            n_head=sizes["n_head"], n_layer=sizes["n_layer"], resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, **options,
        )  # fmt: skip
        with self.torch.device(self.device):
            return self.transformers.GPT2LMHeadModel(config)

    def peak(self):
        on_gpu = self.device == "cuda"
        return self.torch.cuda.max_memory_allocated() if on_gpu else None

    def forget_peak(self):
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def reference(self, tell):
        """What `train` and `generate` tell of ours: for each of the task's settings, and texts."""
        for number, settings in enumerate(self.task["settings"]):
            try:
                tell({"setting": number, **self.trained(settings)})
            except self.out_of_memory:
                tell({"setting": number, "error": OUT_OF_MEMORY})
        for precision in self.task["precisions"]:
            self.forget_peak()
            net = self.model().to(getattr(self.torch, precision)).eval()
            for batch in self.task["batches"]:
                self.forget_peak()
                try:
                    speed = self.speed(net, batch)
                except self.out_of_memory:
                    tell({"precision": precision, "batch": batch, "error": OUT_OF_MEMORY})
                    continue
                peak = {"peak": self.peak()}
                tell({"precision": precision, "batch": batch, "speed": speed, **peak})

    def trained(self, settings):
        self.forget_peak()
        net = self.model(use_cache=False).train()
        if settings["use_memory_saving_gradients"]:
            net.gradient_checkpointing_enable()
        optimizer = self.optimizer(settings["optimizer"], net)
        precision = settings["precision"]
        scaler = self.torch.amp.GradScaler(self.device, enabled=precision == "float16")
        time_ = min(settings["sequence_length"] or 10**9, self.task["hparams"]["n_ctx"])
        n_micro_batches = settings["accumulate_gradients"]
        shape = [n_micro_batches, settings["batch_size"], time_]
        batches = self.torch.tensor(zipf_tokens(self.task["hparams"]["n_vocab"], shape))
        batches = batches.to(self.device)

        def take():
            for tokens in batches:
                with self.autocast(precision):
                    loss = net(input_ids=tokens, labels=tokens).loss / n_micro_batches
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            self.wait()

        for _ in range(WARM_UP_STEPS):
            take()
        seconds = median_seconds(take, self.task["runs"], self.task["seconds"])
        return {"seconds": seconds, "peak": self.peak()}

    def optimizer(self, name, net):
        if name == "adafactor":
            options = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
            return self.transformers.Adafactor(net.parameters(), lr=LEARNING_RATE, **options)
        return self.torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)

    def autocast(self, precision):
        dtype = getattr(self.torch, precision)
        wanted = precision != "float32"
        return self.torch.autocast(self.device, dtype=dtype if wanted else None, enabled=wanted)

    def speed(self, net, batch):
        end = self.task["hparams"]["n_vocab"] - 1
        start = self.torch.full([batch, 1], end, device=self.device)

        def write(length):
            with self.torch.inference_mode():
                out = net.generate(
                    start, attention_mask=self.torch.ones_like(start), do_sample=True,
                    max_new_tokens=length, min_new_tokens=length, pad_token_id=end, **SAMPLING,
                )  # fmt: skip
            self.wait()
            assert out.shape[1] == length + 1

        write(WARM_UP_TOKENS)
        length = self.task["length"]
        seconds = median_seconds(lambda: write(length), self.task["runs"], self.task["seconds"])
        return batch * length / seconds


def main():
    task, path = json.loads(sys.argv[1]), sys.argv[2]
    with open(path, "a", encoding="utf-8") as lines:

        def tell(measured):
            lines.write(json.dumps(measured) + "\n")
            lines.flush()

        library = Theirs if task["task"] == "reference" else Ours
        getattr(library(task), task["task"])(tell)


if __name__ == "__main__":
    main()
