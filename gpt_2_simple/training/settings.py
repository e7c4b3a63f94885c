"""The settings of finetune(), each stated once: type, default, range, meaning; no TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

from ..common.hparams import PRECISIONS, HParams
from ..common.lora import LoraConfig, resolve_targets
from ..common.settings import Setting, Settings, fields_of
from ..data.settings import (
    CACHE_DIR,
    COLUMN,
    COMBINE,
    DELIMITER,
    ENCODING,
    HEADER,
    PAD_DOCUMENTS,
    SAMPLING,
    TEMPLATE,
)

OPTIMIZERS = ("adam", "adafactor", "sgd")
SCHEDULES = ("constant", "linear", "cosine")

# Called with each step's history.Entry.
OnStep = Callable[[Any], Any]

# The headings of `finetune --help`, in its order.
RUN, TRAINING, OPTIMIZER, MEMORY, LORA, VALIDATION, SAVING = (
    "text, model and run",
    "training",
    "optimizer",
    "memory and speed",
    "LoRA",
    "validation",
    "saving and printing",
)


@dataclasses.dataclass(frozen=True)
class TrainingSettings(Settings):
    """All that finetune() can be told; gpt-2-simple 0.8.1's settings come first, in its order."""

    GROUPS: ClassVar = (RUN, TRAINING, OPTIMIZER, MEMORY, LORA, VALIDATION, SAVING)

    # fmt: off
    dataset: Annotated[str | Sequence[str], Setting(
        RUN, "Text to learn: a text file, a folder, a glob pattern, a .csv, .tsv, .json or .jsonl, "
        "what encode_dataset() made, or several of these")]
    steps: Annotated[int, Setting(
        TRAINING, "Steps to train in this call; -1 goes on until Ctrl-C, which saves", at_least=1,
        special=(-1, "until Ctrl-C"), per_call=True)] = -1
    model_name: Annotated[str, Setting(
        RUN, "Model to start from: a folder in `model_dir`")] = "124M"
    model_dir: Annotated[str, Setting(
        RUN, "Folder that holds the models", per_call=True)] = "models"
    combine: Annotated[int, COMBINE] = 50000
    batch_size: Annotated[int, Setting(
        TRAINING, "Windows of text in a micro-batch", at_least=1)] = 1
    learning_rate: Annotated[float, Setting(
        OPTIMIZER, "Size of the optimizer's step", above=0)] = 0.0001
    accumulate_gradients: Annotated[int, Setting(
        TRAINING, "Micro-batches in a step: k of n windows give the step of one batch of k x n",
        at_least=1)] = 5
    restore_from: Annotated[str, Setting(
        RUN, "Where to start: 'latest' continues the run, or starts it from the model if it is "
        "new; 'fresh' starts from the model; anything else is a folder, or a checkpoint's prefix, "
        "to start from", recorded=False)] = "latest"
    run_name: Annotated[str, Setting(
        RUN, "Run to write: a folder in `checkpoint_dir`", recorded=False)] = "run1"
    checkpoint_dir: Annotated[str, Setting(
        RUN, "Folder that holds the runs", recorded=False)] = "checkpoint"
    sample_every: Annotated[int, Setting(
        SAVING, "Steps between sample texts; 0 for none", at_least=0, per_call=True)] = 100
    sample_length: Annotated[int, Setting(
        SAVING, "Tokens in a sample text", at_least=1, per_call=True)] = 1023
    sample_num: Annotated[int, Setting(
        SAVING, "Sample texts each time", at_least=0, per_call=True)] = 1
    multi_gpu: Annotated[bool, Setting(
        MEMORY, "Spread the model's blocks over all GPUs, if there are several",
        recorded=False)] = False
    save_every: Annotated[int, Setting(
        SAVING, "Steps between checkpoints", at_least=1, per_call=True)] = 1000
    print_every: Annotated[int, Setting(
        SAVING, "Steps between lines with the loss", at_least=1, per_call=True)] = 1
    max_checkpoints: Annotated[int, Setting(
        SAVING, "Checkpoints to keep; 0 keeps all. The one that a call continued from is kept, too",
        at_least=0, per_call=True)] = 1
    use_memory_saving_gradients: Annotated[bool | None, Setting(
        MEMORY, "Recompute activations in the backward pass instead of storing them: less memory, "
        "more time. None does so where the device's memory is too small otherwise",
        default_help="where the device's memory is too small otherwise")] = None
    only_train_transformer_layers: Annotated[bool, Setting(
        MEMORY, "Train neither the embeddings nor the last layer norm, which saves memory")] = False
    optimizer: Annotated[str, Setting(
        OPTIMIZER, "Update rule: 'adam', 'adafactor' or 'sgd'", choices=OPTIMIZERS)] = "adam"
    overwrite: Annotated[bool, Setting(
        RUN, "When a run is continued, remove its earlier checkpoints and events",
        recorded=False)] = False
    reuse: Annotated[bool, Setting(
        None, "Accepted for old scripts; a session's model is always reused",
        recorded=False)] = False
    _: dataclasses.KW_ONLY
    sequence_length: Annotated[int | None, Setting(
        TRAINING, "Tokens in a window; fewer need less memory. None for the model's n_ctx",
        at_least=2, default_help="the model's n_ctx")] = None
    train_last_blocks: Annotated[int | None, Setting(
        MEMORY, "Train only this many blocks, the last ones. None for the whole model", at_least=1,
        default_help="the whole model")] = None
    precision: Annotated[str, Setting(
        MEMORY, "Type of the activations and matrix products: 'float32', 'bfloat16' or 'float16'. "
        "Weights and optimizer state are always float32. float16 scales the loss, and skips steps "
        "that overflow. A GPU that lacks the type gets the next best, and a line says so",
        choices=PRECISIONS)] = "float32"
    lora_rank: Annotated[int | None, Setting(
        LORA, "Train an adapter of this rank (LoRA) and leave the model's weights as they are: "
        "much less memory, and checkpoints of a few MB. None trains the model itself", at_least=1,
        default_help="none: the model itself is trained")] = None
    lora_alpha: Annotated[float, Setting(
        LORA, "The adapter's updates are scaled by `lora_alpha` / `lora_rank`", above=0)] = 16.0
    lora_dropout: Annotated[float, Setting(
        LORA, "Share of the adapter's inputs that is dropped", at_least=0, below=1)] = 0.0
    lora_targets: Annotated[str | Sequence[str], Setting(
        LORA, "Layers that get an update: 'c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj', several "
        "of them, or 'all'", repeatable=True)] = ("c_attn",)
    base_precision: Annotated[str, Setting(
        LORA, "Type that holds the matrices of the model that the adapter is for. 'bfloat16' and "
        "'float16' take half the memory", choices=PRECISIONS)] = "float32"
    shard_optimizer: Annotated[bool, Setting(
        MEMORY, "With several workers, each holds the optimizer's state for a share of the "
        "variables (ZeRO, stage 1). An error then loses the steps since the last checkpoint",
        recorded=False)] = False
    dropout: Annotated[float, Setting(
        OPTIMIZER, "Share of embeddings, attention weights and residuals that is dropped",
        at_least=0, below=1)] = 0.0
    weight_decay: Annotated[float, Setting(
        OPTIMIZER, "Decay of the weights, decoupled from the gradient (AdamW); biases and gains do "
        "not decay", at_least=0)] = 0.0
    gradient_clip: Annotated[float, Setting(
        OPTIMIZER, "Limit of the gradients' global norm; 0 for none. Without accumulation it costs "
        "the memory of one copy of the gradients", at_least=0)] = 0.0
    seed: Annotated[int | None, Setting(
        TRAINING, "Whole number that makes windows and samples repeatable; None draws another each "
        "time. A run that is continued keeps its own", at_least=0, default_help="random",
        per_call=True)] = None
    epochs: Annotated[float | None, Setting(
        TRAINING, "How often this call goes through the dataset, instead of `steps`", above=0,
        default_help="none", per_call=True)] = None
    sampling: Annotated[str, Setting(
        TRAINING, "How windows are drawn: at 'random', or by 'epoch', in which each token comes "
        "once", choices=SAMPLING)] = "random"
    pad_documents: Annotated[bool, PAD_DOCUMENTS] = False
    encoding: Annotated[str | None, ENCODING] = None
    column: Annotated[str | int | None, COLUMN] = None
    template: Annotated[str | None, TEMPLATE] = None
    train_on: Annotated[str | None, Setting(
        RUN, "Learn only this column of `template`, and read the rest of each row without "
        "learning it. A string that is no column: learn only what comes after it in each row",
        default_help="all is learned")] = None
    header: Annotated[bool | None, HEADER] = None
    delimiter: Annotated[str | None, DELIMITER] = None
    cache_dir: Annotated[str | None, CACHE_DIR] = None
    val_dataset: Annotated[str | Sequence[str] | None, Setting(
        VALIDATION, "Text to measure the validation loss on; read like `dataset`",
        default_help="none")] = None
    val_split: Annotated[float, Setting(
        VALIDATION, "Share of the dataset's end to validate on, such as 0.05; instead of "
        "`val_dataset`", at_least=0, below=1)] = 0.0
    val_every: Annotated[int, Setting(
        VALIDATION, "Steps between validations; there is one after the last step, too",
        at_least=1)] = 100
    val_batch_count: Annotated[int, Setting(
        VALIDATION, "Batches in the fixed set of windows that is validated on, at most",
        at_least=1)] = 40
    patience: Annotated[int, Setting(
        VALIDATION, "Validations in a row without a better loss that end the training; 0 for "
        "never. The best weights are kept: load_gpt2(sess, 'best')", at_least=0)] = 0
    warmup_steps: Annotated[int, Setting(
        OPTIMIZER, "The run's first steps, over which the learning rate rises to its full size",
        at_least=0)] = 0
    lr_schedule: Annotated[str, Setting(
        OPTIMIZER, "Learning rate: 'constant', or 'linear' or 'cosine', which fall until the last "
        "step", choices=SCHEDULES)] = "constant"
    min_learning_rate: Annotated[float, Setting(
        OPTIMIZER, "Learning rate of the last step, if `lr_schedule` makes it fall",
        at_least=0)] = 0.0
    on_step: Annotated[OnStep | None, Setting(
        None, "Called after each step with a history.Entry (step, seconds, loss, learning_rate, "
        "tokens_per_second, validation_loss); if it returns False, the training ends",
        recorded=False)] = None
    verbose: Annotated[int | bool, Setting(
        SAVING, "0 prints nothing but errors", recorded=False)] = 1
    # fmt: on

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range, or settings that exclude each other."""
        super().__post_init__()
        object.__setattr__(self, "lora_targets", resolve_targets(self.lora_targets))
        check_lora(self)
        if self.epochs is not None and self.steps != -1:
            raise ValueError(f"give steps={self.steps} or epochs={self.epochs:g}, not both")
        if self.lr_schedule != "constant" and self.epochs is None and self.steps == -1:
            raise ValueError(
                f"lr_schedule={self.lr_schedule!r} falls until the last step: give steps or epochs"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} must be from 0 to "
                f"learning_rate={self.learning_rate}"
            )
        if self.val_dataset is not None and self.val_split:
            raise ValueError(
                f"give val_dataset={self.val_dataset!r} or val_split={self.val_split}, not both"
            )
        if self.patience and not self.validates:
            raise ValueError(
                f"patience={self.patience} needs a validation set: give val_dataset or val_split"
            )

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter to train; None trains the model itself."""
        return lora_config(self)

    @property
    def validates(self) -> bool:
        """Whether there is a validation set."""
        return self.val_dataset is not None or self.val_split > 0

    @property
    def samples(self) -> bool:
        """Whether samples are generated."""
        return self.sample_every > 0 and self.sample_num > 0

    def check_workers(self, count: int) -> None:
        """Raises ValueError if a step has fewer micro-batches than there are workers."""
        if self.accumulate_gradients < count:
            raise ValueError(
                f"accumulate_gradients={self.accumulate_gradients} micro-batches in a step are "
                f"fewer than the {count} workers: give accumulate_gradients={count} or more, or "
                "fewer workers"
            )

    @property
    def step(self) -> StepSettings:
        """The settings that shape a step's graph."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(StepSettings)}
        recompute = bool(self.use_memory_saving_gradients)
        return StepSettings(**{**values, "use_memory_saving_gradients": recompute})


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The settings that shape a training step's graph, and the memory that it needs.

    Made by `TrainingSettings.step`, which has the meanings, defaults and ranges.
    """

    batch_size: int
    accumulate_gradients: int
    use_memory_saving_gradients: bool
    only_train_transformer_layers: bool
    optimizer: str
    sequence_length: int | None
    train_last_blocks: int | None
    precision: str
    dropout: float
    weight_decay: float
    gradient_clip: float
    lora_rank: int | None
    lora_alpha: float
    lora_dropout: float
    lora_targets: tuple[str, ...]
    base_precision: str
    shard_optimizer: bool

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter to train; None trains the model itself."""
        return lora_config(self)

    @property
    def accumulates(self) -> bool:
        """Whether gradients are summed up before any of them is applied.

        The norm of all of them, and whether all are finite, is known only then.
        """
        return bool(
            self.accumulate_gradients > 1 or self.gradient_clip or self.precision == "float16"
        )

    def trained_blocks(self, n_layer: int) -> int | None:
        """How many blocks, the last ones, are trained alone; None trains the whole model.

        Raises:
            ValueError: the model does not have that many.
        """
        count = self.train_last_blocks
        if count is not None and count > n_layer:
            raise ValueError(f"train_last_blocks={count}, but the model has {n_layer} blocks")
        return n_layer if count is None and self.only_train_transformer_layers else count


def lora_config(settings: TrainingSettings | StepSettings) -> LoraConfig | None:
    """The adapter that settings ask for, None if they ask for none."""
    if settings.lora_rank is None:
        return None
    return LoraConfig(settings.lora_rank, settings.lora_alpha, tuple(settings.lora_targets))


def check_lora(settings: TrainingSettings) -> None:
    """Raises ValueError for settings that need an adapter without one, or exclude it."""
    if settings.lora_rank is not None:
        if settings.train_last_blocks is not None:
            raise ValueError(
                f"give lora_rank={settings.lora_rank} or "
                f"train_last_blocks={settings.train_last_blocks}, not both"
            )
        return
    defaults = {
        "lora_alpha": TrainingSettings.lora_alpha,
        "lora_dropout": TrainingSettings.lora_dropout,
        "lora_targets": resolve_targets(TrainingSettings.lora_targets),
        "base_precision": TrainingSettings.base_precision,
    }
    for name, default in defaults.items():
        value = getattr(settings, name)
        if value != default:
            raise ValueError(f"{name}={value!r} is for an adapter: give lora_rank, too, such as 8")


def step_settings(**changes: Any) -> StepSettings:
    """finetune()'s defaults for a training step, but for `changes`."""
    return TrainingSettings(dataset="", **changes).step


_SHARED = fields_of(TrainingSettings)

# The headings of `memory --help`, in its order.
MODEL_AND_DEVICE, SETTINGS = "model and device", "settings"


def _of_training(name: str) -> Setting:
    """The setting of this name in TrainingSettings, under the heading of `memory --help`."""
    return dataclasses.replace(_SHARED[name].setting, group=SETTINGS)


@dataclasses.dataclass(frozen=True)
class MemoryPlanSettings(Settings):
    """All that memory_plan() can be told: meanings, ranges and defaults are finetune()'s."""

    GROUPS: ClassVar = (MODEL_AND_DEVICE, SETTINGS)

    # fmt: off
    model_name: Annotated[str | HParams, Setting(
        MODEL_AND_DEVICE, "Model whose memory is planned. In Python, a published model's name, or "
        "HParams. On the command line, a folder in `model_dir`, or a published model's "
        "name")] = TrainingSettings.model_name
    batch_size: Annotated[int, _of_training("batch_size")] = TrainingSettings.batch_size
    sequence_length: Annotated[
        int | None, _of_training("sequence_length")] = TrainingSettings.sequence_length
    optimizer: Annotated[str, _of_training("optimizer")] = TrainingSettings.optimizer
    accumulate_gradients: Annotated[
        int, _of_training("accumulate_gradients")] = TrainingSettings.accumulate_gradients
    use_memory_saving_gradients: Annotated[bool, Setting(
        SETTINGS, "Recompute activations in the backward pass instead of storing them",
        default_help="with and without")] = True
    only_train_transformer_layers: Annotated[
        bool, _of_training("only_train_transformer_layers")
    ] = TrainingSettings.only_train_transformer_layers
    train_last_blocks: Annotated[
        int | None, _of_training("train_last_blocks")] = TrainingSettings.train_last_blocks
    precision: Annotated[str, _of_training("precision")] = TrainingSettings.precision
    gradient_clip: Annotated[float, _of_training("gradient_clip")] = TrainingSettings.gradient_clip
    lora_rank: Annotated[int | None, _of_training("lora_rank")] = TrainingSettings.lora_rank
    lora_targets: Annotated[
        str | Sequence[str], _of_training("lora_targets")] = TrainingSettings.lora_targets
    base_precision: Annotated[
        str, _of_training("base_precision")] = TrainingSettings.base_precision
    workers: Annotated[int, Setting(
        MODEL_AND_DEVICE, "Processes that train together, each on a device of its own; the plan is "
        "of the one that needs most", at_least=1)] = 1
    shard_optimizer: Annotated[
        bool, _of_training("shard_optimizer")] = TrainingSettings.shard_optimizer
    # fmt: on

    @property
    def step(self) -> StepSettings:
        """The settings that shape a step's graph; those that are not here have their defaults."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["model_name"], values["workers"]
        return step_settings(**values)


@dataclasses.dataclass(frozen=True)
class PlotSettings(Settings):
    """All that plot_history() can be told."""

    GROUPS: ClassVar = ("files",)

    # fmt: off
    run_name: Annotated[str, Setting(
        'files', "Run to draw: a folder in `checkpoint_dir`")] = TrainingSettings.run_name
    checkpoint_dir: Annotated[str, Setting(
        'files', "Folder that holds the runs")] = TrainingSettings.checkpoint_dir
    path: Annotated[str | None, Setting(
        'files', "PNG file to write. None for history.png in the run's folder",
        default_help="history.png in the run's folder")] = None
    # fmt: on
