"""Options in, calls of the public functions out: the commands of the command line.

A flag that is not given is not passed on, so that the functions' own defaults act. TensorFlow is
imported when a command needs it, and not before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from types import ModuleType
from typing import Annotated, Any, ClassVar

from ..common.files import check_writable
from ..common.folders import model_folder, read_hparams
from ..common.published import MODEL_NAMES, published_hparams
from ..common.report import progress, say, verbosity
from ..common.settings import Setting, Settings, fields_of
from ..data.text_files import find_files
from ..distributed import launcher
from ..distributed.launcher import LaunchSettings
from ..exchange.settings import ExportSettings, GgufSettings
from ..generation.settings import FILES, TEXT, GenerationSettings
from ..serving.settings import ServeSettings
from ..storage.settings import LoadSettings, QuantizeSettings
from ..training.settings import MEMORY as MEMORY_GROUP
from ..training.settings import PlotSettings, TrainingSettings
from .folder_commands import MODELS, RUNS
from .json_output import OUTPUT, JsonSettings, tells
from .memory_command import MEMORY
from .parser import Command, Options
from .plain_commands import (
    ADD_TOKENS,
    CREATE,
    DOWNLOAD,
    ENCODE,
    ENCODE_CSV,
    IMPORT,
    MERGE,
    PUSH,
    check_weights,
    load_module,
    take_options,
)

EXIT_INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


def _ensure_model(
    gpt2: ModuleType,
    model_name: str | None,
    model_dir: str,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Downloads the model if it is one of OpenAI's and is not there; `check` is called before."""
    model = {"model_name": model_name, "model_dir": model_dir}
    if model_name in MODEL_NAMES and not gpt2.is_gpt2_downloaded(**model):
        check()
        gpt2.download_gpt2(**model)


# --- finetune -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClusterSettings(Settings):
    """Where `finetune` trains."""

    GROUPS: ClassVar = TrainingSettings.GROUPS

    # fmt: off
    ray: Annotated[str | None, Setting(
        MEMORY_GROUP, "Train on the Ray cluster of this address, such as 10.0.0.1:6379, or on a "
        "'local' one, with so many `workers`; the run comes back",
        default_help="none: on this machine")] = None
    # fmt: on


def _finetune(options: Options) -> int:
    options = {**FINETUNE.own_defaults, **options}
    if (address := options.pop("ray", None)) is not None:
        return _finetune_on_ray(options, address)
    settings = LaunchSettings(**options)  # wrong ones are told before a model is downloaded
    _check_files(settings)
    del options["workers"]
    workers = 1 if settings.workers == 1 else launcher.count_workers(settings.workers)
    check = functools.partial(_check_before_download, settings)
    gpt2 = load_module("gpt_2" if workers == 1 else "storage.download")
    _ensure_model(gpt2, settings.model_name, settings.model_dir, check)
    if workers > 1:
        with verbosity(settings.verbose):
            reached = launcher.train_in_processes(settings, workers)
        return EXIT_INTERRUPTED if reached["interrupted"] else 0
    with contextlib.closing(gpt2.start_tf_sess()) as sess:
        result = gpt2.finetune(sess, **options)
    return EXIT_INTERRUPTED if getattr(result, "interrupted", False) else 0


def _finetune_on_ray(options: Options, address: str) -> int:
    if options.get("workers") == launcher.AUTO:
        raise ValueError("workers='auto' is for this machine: give --ray a number of workers")
    settings = TrainingSettings(**take_options(dict(options), fields_of(TrainingSettings)))
    _check_files(settings)
    check = functools.partial(_check_before_download, settings)
    downloads = load_module("storage.download")
    _ensure_model(downloads, settings.model_name, settings.model_dir, check)
    train = load_module("distributed.ray").finetune_on_ray
    result = train(**options, address=None if address == "local" else address)
    return EXIT_INTERRUPTED if result.interrupted else 0


def _check_files(settings: TrainingSettings) -> None:
    """Raises what finetune() would raise for missing files, before TensorFlow is imported."""
    for dataset in (settings.dataset, settings.val_dataset):
        if dataset is not None:
            find_files(dataset)
    if settings.model_name not in MODEL_NAMES:  # those are downloaded
        model_folder(settings.model_dir, settings.model_name)


def _check_before_download(settings: TrainingSettings) -> None:
    """Raises what finetune() would raise after the download, as far as that is known before."""
    check_writable(settings.checkpoint_dir)
    run = os.path.join(settings.checkpoint_dir, settings.run_name)
    if os.path.lexists(run) and not os.path.isdir(run):
        raise NotADirectoryError(f"{run} is a file; give another run_name or checkpoint_dir")
    if os.path.isfile(os.path.join(run, "hparams.json")):
        of_run, of_model = read_hparams(run), published_hparams(settings.model_name)
        if of_run != of_model:
            raise ValueError(
                f"{run} was made from a model of other sizes ({of_run}) than "
                f"{settings.model_name} ({of_model}), which is not downloaded; give another "
                "run_name, or the model_name it was made from"
            )


FINETUNE = Command(
    run=_finetune,
    summary="Train a model on your text. A missing model is downloaded first. Ctrl-C saves and "
    "stops.",
    examples=(
        "gpt_2_simple finetune shakespeare.txt --steps 1000",
        "gpt_2_simple finetune shakespeare.txt --run_name poems --restore_from fresh",
        "gpt_2_simple finetune shakespeare.txt --workers auto",
        "gpt_2_simple finetune jokes.csv --ray 10.0.0.1:6379 --workers 4",
        "gpt_2_simple --mode finetune --dataset shakespeare.txt --overwrite True",
    ),
    settings=[LaunchSettings],
    own_settings=ClusterSettings,
    positional="dataset",
    # gpt-2-simple 0.8.1's command line has these defaults, which its finetune() has not. One worker
    # is this process.
    own_defaults={
        "workers": 1,
        "sample_every": 1000000,
        "save_every": 100,
        "print_every": 10,
        "multi_gpu": True,
    },
)


# --- generate -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OutputSettings(Settings):
    """Where `generate` takes prefixes from, and where its texts go."""

    GROUPS: ClassVar = (TEXT, FILES)

    # fmt: off
    prefix_file: Annotated[str | None, Setting(
        TEXT, "UTF-8 file with a prefix in each line, instead of `prefix`; each file of texts then "
        "has `nsamples` texts for each prefix", default_help="none")] = None
    nfiles: Annotated[int, Setting(FILES, "Files to write", at_least=1)] = 1
    folder: Annotated[str, Setting(
        FILES, "Folder for the files, gpt2_gentext_<date>_<time>.txt in UTC. It is made if it is "
        "missing, and no file in it is ever replaced")] = "gen"
    format: Annotated[str | None, Setting(
        FILES, "'text', or 'jsonl', which makes each text a line of JSON with its prefix",
        choices=("text", "jsonl"),
        default_help="text, but jsonl if --destination_path ends in .jsonl")] = None
    # fmt: on


def _generate(options: Options) -> int:
    options = {**GENERATE.own_defaults, **options}
    own = OutputSettings(**take_options(options, fields_of(OutputSettings)))
    if own.prefix_file is not None:
        _take_prefixes(own.prefix_file, options)
    output = _Output.of(own, options)
    load = take_options(options, _NAMES_OF_WEIGHTS)
    named = LoadSettings(**load)
    settings = GenerationSettings(**options)  # wrong ones are told before a model is downloaded
    check_weights(named, may_download=True)
    gpt2 = load_module("gpt_2")
    check = functools.partial(check_writable, os.path.dirname(output.path or "") or output.folder)
    _ensure_model(gpt2, named.model_name, named.model_dir, check)
    with verbosity(settings.verbose), contextlib.closing(gpt2.start_tf_sess()) as sess:
        gpt2.load_gpt2(sess, **load, verbose=0 if settings.stream else settings.verbose)
        if settings.stream:
            gpt2.generate(sess, **options)
            return 0
        for number in _counted(own.nfiles):
            if settings.seed is not None:
                options["seed"] = settings.seed + number
            output.write(gpt2, sess, options)
    return 0


# What load_gpt2() takes; generate() needs no names after it.
_NAMES_OF_WEIGHTS = (
    *("checkpoint", "run_name", "checkpoint_dir"),
    *("model_name", "model_dir", "multi_gpu", "precision", "adapter"),
)


def _take_prefixes(path: str, options: Options) -> None:
    """Puts the lines of --prefix_file in the place of --prefix."""
    if "prefix" in options:
        raise ValueError(f"give --prefix {options['prefix']!r} or --prefix_file {path}, not both")
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.removesuffix("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    options["prefix"] = [line for line in lines if line.strip()]
    if not options["prefix"]:
        raise ValueError(f"{path} holds no prefix: write one a line")
    options.setdefault("batch_size", None)


@dataclasses.dataclass(frozen=True)
class _Output:
    """Where texts go.

    Attributes:
        folder: made if need be, for files with names of the present second.
        path: the file's path, if it was given a name.
        json_lines: whether each text is a line of JSON, with its prefix.
    """

    folder: str
    path: str | None
    json_lines: bool

    @classmethod
    def of(cls, own: OutputSettings, options: Options) -> _Output:
        """Takes the file's name out of `options`, and checks what concerns files."""
        path = options.pop("destination_path", None)
        if options.get("stream") and (path or own.format or own.nfiles > 1):
            raise ValueError(
                "--stream prints the text and writes no file: leave out --destination_path, "
                "--format and --nfiles"
            )
        if path is not None and own.nfiles > 1:
            raise ValueError(f"--destination_path is one file, but --nfiles asks for {own.nfiles}")
        if path is not None and os.path.lexists(path):
            raise FileExistsError(f"{path} exists, and no file is replaced: give it another name")
        form = own.format or ("jsonl" if (path or "").endswith(".jsonl") else "text")
        return cls(own.folder, path, form == "jsonl")

    def write(self, gpt2: ModuleType, sess: Any, options: Options) -> None:
        """Generates texts into a new file, and says its name."""
        with self._new_file() as path:
            if not self.json_lines:
                gpt2.generate(sess, destination_path=path, **options)
                return
            settings = GenerationSettings(**options)
            output = load_module("generation.output")
            with verbosity(settings.verbose), output.open_output(path) as append:
                for generated in load_module("generation.generate").iterate_texts(sess, settings):
                    append(output.json_line(*generated))

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[str]:
        """Makes an empty file that nobody else has, and says what it was when it is written.

        If the block fails and the file still is empty, it is removed.
        """
        if self.path is not None:
            path = self.path
            with open(path, "x"):
                pass
        else:
            os.makedirs(self.folder, exist_ok=True)
            path = _claim_free_name(self.folder, "jsonl" if self.json_lines else "txt")
        try:
            yield path
        except BaseException:
            with contextlib.suppress(OSError):
                if os.path.getsize(path) == 0:
                    os.remove(path)
                else:
                    say(f"Wrote {path}")
            raise
        say(f"Wrote {path}")


def _claim_free_name(folder: str, ending: str) -> str:
    stem = os.path.join(folder, f"gpt2_gentext_{datetime.now(timezone.utc):%Y%m%d_%H%M%S}")
    number = 1
    while True:
        path = f"{stem}.{ending}" if number == 1 else f"{stem}-{number}.{ending}"
        with contextlib.suppress(FileExistsError), open(path, "x"):
            return path
        number += 1


def _counted(nfiles: int) -> Iterator[int]:
    if nfiles == 1:
        yield 0
        return
    with progress(total=nfiles, desc="Generating", unit="file") as bar:
        for number in range(nfiles):
            yield number
            bar.update(1)


GENERATE = Command(
    run=_generate,
    summary="Write texts with a trained run, or with a model as it is, into new files.",
    examples=(
        "gpt_2_simple generate --nsamples 5 --length 200",
        "gpt_2_simple generate --run_name poems --prefix 'Shall I' --top_k 40 --seed 1",
        "gpt_2_simple generate --model_name 124M --nfiles 10 --folder texts",
        "gpt_2_simple generate --prefix 'Shall I' --stop END --stop '###' --stream",
        "gpt_2_simple generate --prefix_file titles.txt --format jsonl",
    ),
    settings=[GenerationSettings, LoadSettings],
    own_settings=OutputSettings,
    own_defaults={"multi_gpu": True},
)


# --- serve ----------------------------------------------------------------------------------------


def _serve(options: Options) -> int:
    settings = ServeSettings(**options)  # wrong ones are told before a model is downloaded
    check_weights(settings, may_download=True)
    gpt2 = load_module("gpt_2")
    for name in settings.model_name or ():
        _ensure_model(gpt2, name, settings.model_dir)
    gpt2.serve(**options)
    return 0


SERVE = Command(
    run=_serve,
    summary="Serve runs or models over HTTP, with OpenAI's completions API. Ctrl-C stops.",
    examples=(
        "gpt_2_simple serve --run_name run1",
        "gpt_2_simple serve --run_name poems --run_name prose --port 8080",
        "gpt_2_simple serve --model_name 124M --host 0.0.0.0 --api_key KEY",
    ),
    settings=[ServeSettings],
    positional="run_name",
)


# --- quantize -------------------------------------------------------------------------------------


def _quantize(options: Options) -> object:
    settings = QuantizeSettings(**options)  # wrong ones are told before a model is downloaded
    check_weights(settings, may_download=True)
    gpt2 = load_module("gpt_2")
    _ensure_model(gpt2, settings.model_name, settings.model_dir)
    return gpt2.quantize(**options)


QUANTIZE = Command(
    run=tells("path", _quantize),
    summary="Make the 8-bit weights of a run or a model, so that generate --precision int8 starts "
    "at once.",
    examples=(
        "gpt_2_simple quantize run1",
        "gpt_2_simple quantize --model_name 1558M",
    ),
    settings=[QuantizeSettings],
    own_settings=JsonSettings,
    positional="run_name",
)


# --- plot -----------------------------------------------------------------------------------------


def _plot(options: Options) -> object:
    return load_module("training.history").plot_history(**options)


PLOT = Command(
    run=tells("path", _plot, says_anyway=True),
    summary="Draw a run's losses and learning rates into a PNG file.",
    examples=("gpt_2_simple plot run1",),
    settings=[PlotSettings],
    own_settings=JsonSettings,
    positional="run_name",
)


# --- export ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FormatSettings(JsonSettings):
    """Which of the two exports `export` makes."""

    GROUPS: ClassVar = (*ExportSettings.GROUPS, OUTPUT)

    # fmt: off
    format: Annotated[str | None, Setting(
        GROUPS[1], "'huggingface', for transformers, vLLM and CTranslate2; or 'gguf', for "
        "llama.cpp and Ollama", choices=("huggingface", "gguf"),
        default_help="huggingface, but gguf if --quantization is given")] = None
    # fmt: on


def _export(options: Options) -> object:
    own = FormatSettings(**take_options(options, fields_of(FormatSettings)))
    form = own.format or ("gguf" if "quantization" in options else "huggingface")
    settings = GgufSettings if form == "gguf" else ExportSettings
    foreign = [name for name in options if name not in fields_of(settings)]
    if foreign:
        raise ValueError(f"--format {form} has no {', '.join(f'--{name}' for name in foreign)}")
    check_weights(settings(**options))
    return getattr(load_module(f"exchange.{form}"), f"export_{form}")(**options)


EXPORT = Command(
    run=tells("path", _export),
    summary="Write a run or a model for other programs: Hugging Face transformers, or llama.cpp.",
    examples=(
        "gpt_2_simple export run1",
        "gpt_2_simple export run1 --checkpoint best --precision bfloat16 --path mine",
        "gpt_2_simple export --model_name 124M --quantization q8_0",
    ),
    settings=[ExportSettings, GgufSettings],
    own_settings=FormatSettings,
    positional="run_name",
)


COMMANDS = {
    "finetune": FINETUNE,
    "generate": GENERATE,
    "serve": SERVE,
    "download": DOWNLOAD,
    "create": CREATE,
    "add_tokens": ADD_TOKENS,
    "encode": ENCODE,
    "encode_csv": ENCODE_CSV,
    "merge": MERGE,
    "quantize": QUANTIZE,
    "memory": MEMORY,
    "plot": PLOT,
    "export": EXPORT,
    "import": IMPORT,
    "push": PUSH,
    "runs": RUNS,
    "models": MODELS,
}

# gpt-2-simple 0.8.1 had one list of flags for both its modes: finetune and generate accept each
# other's of these.
LEGACY_FLAGS = (
    "dataset", "steps", "restore_from", "sample_every", "save_every", "print_every", "optimizer",
    "overwrite", "nfiles", "nsamples", "folder", "length", "temperature", "top_k", "top_p",
    "prefix", "truncate", "include_prefix", "sample_delim",
)  # fmt: skip
