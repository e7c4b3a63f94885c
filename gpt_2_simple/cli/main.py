"""Command line arguments in, calls of the public functions out, and an exit status.

The tables below say what each command takes. Their defaults are shown by --help, and a test holds
them to the functions' signatures; a flag that is not given is not passed on, so that the functions'
own defaults act. Nothing here imports TensorFlow before there is a command to run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from types import ModuleType
from typing import Any, NamedTuple

from ..common.files import write_whole
from ..common.report import complain, progress, say, verbosity
from ..storage.download import MODEL_NAMES

PROGRAM = "gpt_2_simple"
DEBUG_VARIABLE = "GPT2_DEBUG"
EXIT_INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
EXIT_CLOSED_PIPE = 141  # and for one whose reader went away, as in `... | head`

Options = dict[str, Any]


class Option(NamedTuple):
    """A flag.

    Attributes:
        default: the function's; for --help alone, and for the type.
        help: what it means; one sentence without a full stop.
        kind: makes the value from the text; by default the type of the default, or str.
        shown: the default in words, where repr(default) would not tell.
        many: whether it may be given several times, which makes a list.
    """

    default: Any
    help: str
    kind: Callable[[str], Any] | None = None
    shown: str | None = None
    many: bool = False


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        run: takes the given options by name, returns the exit status.
        summary: one sentence.
        examples: command lines to paste.
        groups: title to {name of a flag: Option}.
        own_defaults: those that differ from the function's.
        positional: the flag that may be given without its name.
        required: whether it must be given.
    """

    run: Callable[[Options], int]
    summary: str
    examples: Sequence[str]
    groups: dict[str, dict[str, Option]]
    own_defaults: Options = {}
    positional: str | None = None
    required: bool = False

    def options(self) -> dict[str, Option]:
        """All groups in one."""
        return {name: option for group in self.groups.values() for name, option in group.items()}


# --- what the commands do -----------------------------------------------------------------------


def _module(name: str) -> ModuleType:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its notes on CPU features help nobody here
    return importlib.import_module(f"gpt_2_simple.{name}")


def _pass_to(module: str, function: str) -> Callable[[Options], int]:
    def run(options: Options) -> int:
        getattr(_module(module), function)(**options)
        return 0

    return run


def _ensure_model(gpt2: ModuleType, options: Options, default: str | None = None) -> None:
    """Downloads the model if it is one of OpenAI's; whoever needs another says that it is missing.

    Args:
        gpt2: the module of the public functions.
        options: `model_name` and `model_dir`, if given.
        default: the name if none is given; None is no model.
    """
    name = options.get("model_name", default)
    folder = {"model_dir": options["model_dir"]} if "model_dir" in options else {}
    if name in MODEL_NAMES and not gpt2.is_gpt2_downloaded(model_name=name, **folder):
        gpt2.download_gpt2(model_name=name, **folder)


def _finetune(options: Options) -> int:
    gpt2 = _module("gpt_2")
    _ensure_model(gpt2, options, default="124M")
    with contextlib.closing(gpt2.start_tf_sess()) as sess:
        result = gpt2.finetune(sess, **_FINETUNE.own_defaults | options)
    return EXIT_INTERRUPTED if getattr(result, "interrupted", False) else 0


def _generate(options: Options) -> int:
    options = _GENERATE.own_defaults | options
    output = _take_output(options)
    if "prefix_file" in options:
        _take_prefixes(options)
    gpt2 = _module("gpt_2")
    _ensure_model(gpt2, options)
    load = {name: options.pop(name) for name in _LOAD if name in options}
    verbose, seed, stream = options.get("verbose", 1), options.get("seed"), options.get("stream")
    with verbosity(verbose), contextlib.closing(gpt2.start_tf_sess()) as sess:
        gpt2.load_gpt2(sess, **load, verbose=0 if stream else verbose)
        if stream:
            gpt2.generate(sess, **options)
            return 0
        for number in _counted(output.nfiles):
            if seed is not None:
                options["seed"] = seed + number
            with _new_file(output) as path, _format(output, path, options) as settings:
                gpt2.generate(sess, destination_path=path, **settings)
    return 0


class _Output(NamedTuple):
    """Where texts go.

    Attributes:
        nfiles: how many files.
        folder: made if need be, for files with names of the present second.
        path: the file's path, if it was given a name.
        json_lines: whether each text is a line of JSON, with its prefix.
    """

    nfiles: int
    folder: str
    path: str | None
    json_lines: bool


def _take_output(options: Options) -> _Output:
    """Takes what concerns files out of `options`, and checks it."""
    wanted, form = options.pop("destination_path", None), options.pop("format", None)
    output = _Output(
        nfiles=options.pop("nfiles"),
        folder=options.pop("folder"),
        path=wanted,
        json_lines=form == "jsonl" if form else (wanted or "").endswith(".jsonl"),
    )
    if options.get("stream") and (wanted or form or output.nfiles > 1):
        raise ValueError(
            "--stream prints the text and writes no file: leave out --destination_path, --format "
            "and --nfiles"
        )
    if wanted is not None and output.nfiles > 1:
        raise ValueError(f"--destination_path is one file, but --nfiles asks for {output.nfiles}")
    if wanted is not None and os.path.lexists(wanted):
        raise FileExistsError(f"{wanted} exists, and no file is replaced: give it another name")
    return output


def _take_prefixes(options: Options) -> None:
    """Puts the lines of --prefix_file in the place of --prefix."""
    path = options.pop("prefix_file")
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


@contextlib.contextmanager
def _format(output: _Output, path: str, options: Options) -> Iterator[Options]:
    """Yields generate()'s options; what the block wrote to `path` then gets its form.

    JSON lines are made of texts between delimiters that no text holds, also when Ctrl-C or an error
    ended the block.
    """
    if not output.json_lines:
        yield options
        return
    delimiter = f"{secrets.token_hex(16)}\n"
    try:
        yield options | {"sample_delim": delimiter}
    finally:
        with open(path, encoding="utf-8", errors="surrogatepass", newline="") as file:
            *texts, rest = file.read().split(f"\n{delimiter}")
        if rest:  # a single text has no delimiter
            texts.append(rest.removesuffix("\n"))
        prefix, nsamples = options.get("prefix", ""), options.get("nsamples", 1)
        prefixes = [prefix] if isinstance(prefix, str) else prefix
        # JSON writes a lone surrogate as Python's backslashreplace does.
        with write_whole(path) as lines:
            for number, text in enumerate(texts):
                record = {"prefix": prefixes[number // nsamples], "text": text}
                line = json.dumps(record, ensure_ascii=False) + "\n"
                lines.write(line.encode("utf-8", "backslashreplace"))


def _counted(nfiles: int) -> Iterator[int]:
    if nfiles == 1:
        yield 0
        return
    with progress(total=nfiles, desc="Generating", unit="file") as bar:
        for number in range(nfiles):
            yield number
            bar.update(1)


@contextlib.contextmanager
def _new_file(output: _Output) -> Iterator[str]:
    """Makes an empty file that nobody else has, and says what it was when it is written.

    If the block fails and it still is empty, it goes.
    """
    if output.path is not None:
        path = output.path
        with open(path, "x"):
            pass
    else:
        os.makedirs(output.folder, exist_ok=True)
        path = _claim_free_name(output.folder, "jsonl" if output.json_lines else "txt")
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


def _memory(options: Options) -> int:
    memory = _module("training.memory_plan")
    name = options.pop("model_name", "124M")
    hparams = _sizes(name, options.pop("model_dir", "models"))
    gigabytes = options.pop("gpu_gb", None)
    limit = None if gigabytes is None else int(gigabytes * memory.USABLE * 2**30)
    flag = "use_memory_saving_gradients"
    choices = [options[flag]] if flag in options else [False, True]
    if limit is not None and not options:
        fitting = memory.fitting_plans(hparams, limit)
    else:
        plans = [memory.memory_plan(hparams, **options | {flag: choice}) for choice in choices]
        if limit is None:
            for choice, plan in zip(choices, plans, strict=True):
                say(f"{flag}={choice}:\n{plan}")
            return 0
        fitting = [plan for plan in plans if plan.total <= limit]
    for plan in fitting:
        say(f"{memory.as_call(plan, name)}  # {plan.total / memory.MEGABYTE:,.0f} MB")
    if fitting:
        return 0
    complain(
        f"{PROGRAM}: nothing fits: {name} with these settings needs more than "
        f"{memory.USABLE:.0%} of {gigabytes:g} GB, about what such a card leaves. Take a smaller "
        "model, or see what --train_last_blocks, --sequence_length, --optimizer and --precision "
        "save"
    )
    return 1


def _sizes(model_name: str, model_dir: str) -> Any:
    """The sizes of the model in a folder, or else of the published one."""
    checkpoint = _module("common.folders")
    try:
        return checkpoint.read_hparams(checkpoint.model_folder(model_dir, model_name))
    except FileNotFoundError:
        with contextlib.suppress(ValueError):
            return _module("training.memory_plan").published_hparams(model_name)
        raise


def _plot(options: Options) -> int:
    say(_module("gpt_2").plot_history(**options))
    return 0


# --- what the commands take ---------------------------------------------------------------------


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def _count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else int(text)


def _word_or_number(text: str) -> str | int:
    return int(text) if re.fullmatch(r"\d+", text) else text


def _gigabytes(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size")
    return float(text)


def _form(text: str) -> str:
    if text not in ("text", "jsonl"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'text' nor 'jsonl'")
    return text


# load_gpt2's; generate needs no names after it.
_LOAD = (
    *("checkpoint", "run_name", "checkpoint_dir"),
    *("model_name", "model_dir", "multi_gpu", "precision"),
)

_MULTI_GPU = Option(False, "Spread the model's layers over all GPUs, if there are several")
_COMBINE = Option(50000, "Join small files until they hold this many characters")
_ENCODING = Option(None, "Encoding of the text files", shown="UTF-8")
_COLUMN = Option(
    None, "Column of a table, by name or by number from 0", _word_or_number, "the first"
)
_TEMPLATE = Option(None, "Several columns, as in '{title}: {body}'", shown="one column")
_HEADER = Option(None, "Whether a table's first row names its columns", bool, "a look at it tells")
_PAD_DOCUMENTS = Option(False, "Let no window reach from one file or row into the next")
_CACHE_DIR = Option(
    None,
    "Folder that keeps the tokens of much text for the next time",
    shown="$GPT_2_SIMPLE_CACHE, or ~/.cache/gpt_2_simple",
)
_VERBOSE = Option(1, "Print nothing but errors if this is 0")

_FINETUNE = Command(
    run=_finetune,
    summary="Train a model on your text, downloading it first if need be. Ctrl-C saves and stops.",
    examples=(
        "gpt_2_simple finetune shakespeare.txt --steps 1000",
        "gpt_2_simple finetune shakespeare.txt --run_name poems --restore_from fresh",
        "gpt_2_simple --mode finetune --dataset shakespeare.txt --overwrite True",
    ),
    positional="dataset",
    required=True,
    # gpt-2-simple 0.8.1's command line has these defaults, which its finetune() has not.
    own_defaults={
        "sample_every": 1000000,
        "save_every": 100,
        "print_every": 10,
        "multi_gpu": True,
    },
    groups={
        "text, model and run": {
            "dataset": Option(
                None,
                "Text to learn: files, a folder, a quoted glob, a .csv, or what 'encode' made",
                shown="none; required",
            ),
            "model_name": Option("124M", "Model to start from: a folder in --model_dir"),
            "model_dir": Option("models", "Folder that holds the models"),
            "run_name": Option("run1", "Run to write: a folder in --checkpoint_dir"),
            "checkpoint_dir": Option("checkpoint", "Folder that holds the runs"),
            "restore_from": Option(
                "latest",
                "Start from 'latest', which continues the run if there is one, from 'fresh', "
                "which is the model, or from a checkpoint's path",
            ),
            "overwrite": Option(
                False, "When continuing, remove the run's earlier checkpoints and events"
            ),
            "combine": _COMBINE,
            "encoding": _ENCODING,
            "column": _COLUMN,
            "template": _TEMPLATE,
            "header": _HEADER,
            "cache_dir": _CACHE_DIR,
        },
        "training": {
            "steps": Option(-1, "Steps to train now; -1 goes on until Ctrl-C"),
            "epochs": Option(
                None, "How often to go through the text now, instead of --steps", float, "none"
            ),
            "batch_size": Option(1, "Windows of text in a micro-batch"),
            "accumulate_gradients": Option(5, "Micro-batches in a step"),
            "sequence_length": Option(
                None, "Tokens in a window; fewer need less memory", int, "the model's n_ctx"
            ),
            "sampling": Option(
                "random",
                "Windows: at 'random', or by 'epoch', in which each token comes once",
            ),
            "pad_documents": _PAD_DOCUMENTS,
            "seed": Option(None, "Whole number that makes a run repeatable", int, "random"),
        },
        "optimizer": {
            "optimizer": Option("adam", "Update rule: adam, adafactor or sgd"),
            "learning_rate": Option(0.0001, "Size of the optimizer's step"),
            "warmup_steps": Option(0, "First steps, over which the learning rate rises"),
            "lr_schedule": Option(
                "constant",
                "Learning rate: 'constant', or 'linear' or 'cosine', which fall to the last step",
            ),
            "min_learning_rate": Option(0.0, "Where they fall to"),
            "weight_decay": Option(0.0, "Share of the weights that decays, as in AdamW"),
            "gradient_clip": Option(0.0, "Limit of the gradients' global norm; 0 for none"),
            "dropout": Option(0.0, "Share of activations that is dropped"),
        },
        "memory and speed": {
            "use_memory_saving_gradients": Option(
                None,
                "Recompute activations instead of storing them: less memory, more time",
                bool,
                "where the device's memory is too small otherwise",
            ),
            "only_train_transformer_layers": Option(
                False, "Leave the embeddings as they are, which saves memory"
            ),
            "train_last_blocks": Option(
                None, "Train only so many blocks, the last ones", int, "the whole model"
            ),
            "precision": Option(
                "float32", "Activations in float32, bfloat16 or float16; weights stay float32"
            ),
            "multi_gpu": _MULTI_GPU,
        },
        "validation": {
            "val_dataset": Option(
                None, "Text to measure the validation loss on, as --dataset", shown="none"
            ),
            "val_split": Option(0.0, "Share of the text's end to keep for that, such as 0.05"),
            "val_every": Option(100, "Steps between validations"),
            "val_batch_count": Option(40, "Batches in a validation, at most"),
            "patience": Option(
                0, "Validations in a row without a better loss that end the training; 0 for never"
            ),
        },
        "saving and printing": {
            "save_every": Option(1000, "Steps between checkpoints"),
            "max_checkpoints": Option(1, "Checkpoints to keep; 0 keeps all"),
            "print_every": Option(1, "Steps between lines with the loss"),
            "sample_every": Option(100, "Steps between sample texts; 0 for none"),
            "sample_length": Option(1023, "Tokens in a sample text"),
            "sample_num": Option(1, "Sample texts each time"),
            "verbose": _VERBOSE,
        },
    },
)

_GENERATE = Command(
    run=_generate,
    summary="Write texts with a trained run, or with a model as it is, into new files.",
    examples=(
        "gpt_2_simple generate --nsamples 5 --length 200",
        "gpt_2_simple generate --run_name poems --prefix 'Shall I' --top_k 40 --seed 1",
        "gpt_2_simple generate --model_name 124M --nfiles 10 --folder texts",
        "gpt_2_simple generate --prefix 'Shall I' --stop END --stop '###' --stream",
        "gpt_2_simple generate --prefix_file titles.txt --format jsonl",
    ),
    own_defaults={"nfiles": 1, "folder": "gen", "multi_gpu": True},
    groups={
        "model or run": {
            "run_name": Option("run1", "Run to load: a folder in --checkpoint_dir"),
            "checkpoint_dir": Option("checkpoint", "Folder that holds the runs"),
            "checkpoint": Option("latest", "Checkpoint of the run to load, such as 'model-1000'"),
            "model_name": Option(
                None,
                "Load this model from --model_dir in place of a run, downloading it if need be",
                shown="none: the run is loaded",
            ),
            "model_dir": Option("models", "Folder that holds the models"),
            "precision": Option(
                None,
                "Hold the weights in 'bfloat16' or 'float16': about half the memory",
                shown="float32",
            ),
            "multi_gpu": _MULTI_GPU,
        },
        "text": {
            "length": Option(1023, "Tokens to write, beside the prefix's"),
            "max_new_tokens": Option(
                None, "In place of --length: the name other libraries have for it", int, "--length"
            ),
            "prefix": Option(
                None, "Text to go on from; write --prefix='-x' if it starts with '-'", shown="none"
            ),
            "prefix_file": Option(
                None,
                "UTF-8 file with a prefix in each line, in place of --prefix; a file of texts then "
                "has --nsamples of each",
                shown="none",
            ),
            "include_prefix": Option(True, "Keep the prefix in the text"),
            "temperature": Option(0.7, "Above 1 is wilder, below 1 tamer, 0 takes the likeliest"),
            "top_k": Option(0, "Choose among the k likeliest tokens; 0 means all"),
            "top_p": Option(
                0.0,
                "Choose among the likeliest tokens that make up this probability; 0 means all",
            ),
            "seed": Option(
                None,
                "Whole number that makes the texts repeatable; each further file adds 1 to it",
                int,
                "random",
            ),
        },
        "end of the text": {
            "truncate": Option(
                None, "Cut the text where this first occurs after the prefix", shown="no cut"
            ),
            "stop": Option(None, "The same; may be given several times", shown="none", many=True),
            "stop_token": Option(
                None,
                "Token that ends a text: its number, or its text, such as '<|endoftext|>'",
                _word_or_number,
                "none",
            ),
            "include_stop": Option(False, "Keep the --stop or --stop_token in the text"),
            "min_length": Option(0, "Tokens before --stop_token may come"),
        },
        "rules": {
            "repetition_penalty": Option(
                1.0, "Above 1 makes tokens of the text so far less likely"
            ),
            "no_repeat_ngram_size": Option(
                0, "No run of this many tokens comes twice; 0 for no such rule"
            ),
            "bad_words": Option(
                None,
                "Words that must not be written; may be given several times",
                shown="none",
                many=True,
            ),
            "num_beams": Option(
                1, "Above 1: search the likeliest text, following so many at once; draw nothing"
            ),
            "length_penalty": Option(
                1.0, "Of num_beams: above 0 is kind to long texts, below 0 to short ones"
            ),
        },
        "files": {
            "nfiles": Option(1, "Files to write", _count),
            "nsamples": Option(1, "Texts in a file"),
            "batch_size": Option(
                1,
                "Texts to write at once, which must divide --nsamples, or 'auto', which is what "
                "--prefix_file has",
                _batch_size,
            ),
            "sample_delim": Option("=" * 20 + "\n", "What separates the texts of a file"),
            "folder": Option(
                "gen",
                "Folder for the files, gpt2_gentext_<date>_<time>.txt in UTC; made if missing, "
                "and no file in it is ever replaced",
            ),
            "destination_path": Option(
                None, "Write one file of this name instead; it must not exist", shown="none"
            ),
            "format": Option(
                None,
                "Either 'text', or 'jsonl', which makes each text a line of JSON with its prefix",
                _form,
                "text, but jsonl if --destination_path ends in .jsonl",
            ),
            "stream": Option(False, "Print the text as it comes, and write no file"),
            "verbose": _VERBOSE,
        },
    },
)

_DOWNLOAD = Command(
    run=_pass_to("storage.download", "download_gpt2"),
    summary="Download a model, or what is missing of it.",
    examples=(
        "gpt_2_simple download 355M",
        "gpt_2_simple download --model_name 124M --base_url https://example.org/gpt-2",
    ),
    positional="model_name",
    groups={
        "model": {
            "model_name": Option("124M", "One of " + ", ".join(MODEL_NAMES)),
            "model_dir": Option("models", "Folder that holds the models"),
            "base_url": Option(
                None,
                "Mirror that has models/<model_name>/",
                shown="$GPT2_BASE_URL, or OpenAI's server",
            ),
        }
    },
)

_CREATE = Command(
    run=_pass_to("gpt_2", "create_gpt2"),
    summary="Make a small model of your own that knows nothing yet, for finetune to start from.",
    examples=(
        "gpt_2_simple create shakespeare.txt --model_name nano",
        "gpt_2_simple create shakespeare.txt --model_name mine --n_layer 6 --vocab_size 2000",
    ),
    positional="dataset",
    groups={
        "model": {
            "dataset": Option(None, "Text for --vocab_size to train a vocabulary on", shown="none"),
            "model_name": Option(
                "nano", "New folder in --model_dir; nano, micro and mini name sizes too"
            ),
            "model_dir": Option("models", "Folder that holds the models"),
        },
        "size": {
            "n_layer": Option(None, "Layers", int, "the named size's"),
            "n_head": Option(None, "Attention heads in a layer", int, "the named size's"),
            "n_embd": Option(None, "Width; a multiple of --n_head", int, "the named size's"),
            "n_ctx": Option(None, "Tokens that it sees at once", int, "the named size's"),
            "vocab_size": Option(
                None, "Tokens in its vocabulary", int, "each byte and <|endoftext|>: 257"
            ),
            "seed": Option(None, "Whole number that makes the weights repeatable", int, "random"),
            "overwrite": Option(False, "Replace a model of this name"),
        },
    },
)

_ENCODE = Command(
    run=_pass_to("gpt_2", "encode_dataset"),
    summary="Turn text into tokens once, so that each finetune starts sooner.",
    examples=("gpt_2_simple encode shakespeare.txt --out_path shakespeare.npz",),
    positional="file_path",
    required=True,
    groups={
        "files": {
            "file_path": Option(
                None, "Text: a file, a folder or a quoted glob", shown="none; required"
            ),
            "out_path": Option("text_encoded.npz", "File to write: .npz, or .tokens for much text"),
            "model_name": Option("124M", "Model whose vocabulary is used"),
            "model_dir": Option("models", "Folder that holds the models"),
            "combine": _COMBINE,
            "encoding": _ENCODING,
            "column": _COLUMN,
            "template": _TEMPLATE,
            "header": _HEADER,
            "pad_documents": _PAD_DOCUMENTS,
            "cache_dir": _CACHE_DIR,
            "verbose": _VERBOSE,
        }
    },
)

_ENCODE_CSV = Command(
    run=_pass_to("data.dataset", "encode_csv"),
    summary="Turn a table into a text file in which tokens mark where each row starts and ends.",
    examples=("gpt_2_simple encode_csv tweets.csv --out_path tweets.txt --column text",),
    positional="csv_path",
    required=True,
    groups={
        "files": {
            "csv_path": Option(None, "Table: .csv, .tsv or .jsonl", shown="none; required"),
            "out_path": Option("csv_encoded.txt", "Text file to write"),
            "header": Option(True, "Whether the first row names the columns"),
            "start_token": Option("<|startoftext|>", "Put before each row"),
            "end_token": Option("<|endoftext|>", "Put after each row"),
            "column": _COLUMN,
            "template": _TEMPLATE,
            "encoding": Option(None, "Encoding of the table", shown="UTF-8"),
        }
    },
)

_MEMORY = Command(
    run=_memory,
    summary="Tell how much memory training needs, or what fits in yours: the best comes first.",
    examples=(
        "gpt_2_simple memory 774M --gpu_gb 16",
        "gpt_2_simple memory --model_name 355M --batch_size 2 --optimizer adafactor",
    ),
    positional="model_name",
    groups={
        "model and device": {
            "model_name": Option("124M", "Folder in --model_dir, or a published model's name"),
            "model_dir": Option("models", "Folder that holds the models"),
            "gpu_gb": Option(
                None,
                "The card's memory in GB of 2**30 bytes; 0.93 of it is taken to be usable",
                _gigabytes,
                "none: tables of what is needed",
            ),
        },
        "settings": {
            name: _FINETUNE.options()[name]
            for name in (
                "batch_size", "sequence_length", "optimizer", "accumulate_gradients",
                "only_train_transformer_layers", "train_last_blocks", "precision", "gradient_clip",
            )
        }
        | {
            "use_memory_saving_gradients": Option(
                True, "Recompute activations instead of storing them", shown="with and without"
            )
        },
    },
)  # fmt: skip

_PLOT = Command(
    run=_plot,
    summary="Draw a run's losses and learning rates into a PNG file.",
    examples=("gpt_2_simple plot run1",),
    positional="run_name",
    groups={
        "files": {
            "run_name": Option("run1", "Run to draw: a folder in --checkpoint_dir"),
            "checkpoint_dir": Option("checkpoint", "Folder that holds the runs"),
            "path": Option(None, "File to write", shown="history.png in the run's folder"),
        }
    },
)

COMMANDS = {
    "finetune": _FINETUNE,
    "generate": _GENERATE,
    "download": _DOWNLOAD,
    "create": _CREATE,
    "encode": _ENCODE,
    "encode_csv": _ENCODE_CSV,
    "memory": _MEMORY,
    "plot": _PLOT,
}

_METAVARS: dict[Any, str] = {
    str: "TEXT", float: "X", _gigabytes: "X", _word_or_number: "TEXT", _form: "FORM"
}  # fmt: skip

# gpt-2-simple 0.8.1 had one list of flags for both its modes.
_SHARED_FLAGS = (
    "dataset", "steps", "restore_from", "sample_every", "save_every", "print_every", "optimizer",
    "overwrite", "nfiles", "nsamples", "folder", "length", "temperature", "top_k", "top_p",
    "prefix", "truncate", "include_prefix", "sample_delim",
)  # fmt: skip


# --- from the command line to a call ------------------------------------------------------------


def _command_first(argv: Sequence[str]) -> list[str]:
    """Puts the command before the words and these before the flags, as argparse needs them.

    It also turns gpt-2-simple 0.8.1's `--mode finetune` into the command.
    """
    command: list[str] = []
    words: list[str] = []
    flags: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not _is_flag(token):
            words.append(token)
            continue
        name, equals, value = token.partition("=")
        takes_value = not equals and name not in ("-h", "--help", "--version", "--debug")
        values = [rest.pop(0)] if takes_value and rest and not _is_flag(rest[0]) else []
        if name == "--mode":
            command = [value] if equals else values
        else:
            flags += [token, *values]
    return command + words + flags


def _is_flag(token: str) -> bool:
    return re.match(r"-[A-Za-z-]", token) is not None and " " not in token.partition("=")[0]


def _version() -> str:
    try:
        return importlib.metadata.version(PROGRAM)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _parser() -> argparse.ArgumentParser:
    layout: dict[str, Any] = {
        "add_help": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [flags]",
        description="Fine-tune GPT-2 on your own text and generate from it.",
        epilog=_examples([command.examples[0] for command in COMMANDS.values()])
        + f"\n\n'{PROGRAM} COMMAND --help' lists the flags of a command.\n"
        "Exit status: 0 done, 1 error, 2 wrong usage, 130 stopped by Ctrl-C.",
        **layout,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=_examples(command.examples),
            prog=f"{PROGRAM} {name}",
            usage=" ".join([PROGRAM, name, *_word_names(command), "[flags]"]),
            **layout,
        )
        subparser.set_defaults(name=name, subparser=subparser)
        _add_flags(subparser, command)
        _add_general(subparser)
    _add_general(parser).add_argument(
        "--version", action="version", version=f"{PROGRAM} {_version()}", help="Show the version"
    )
    return parser


def _add_general(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("general")
    group.add_argument("-h", "--help", action="help", help="Show this help")
    group.add_argument(
        "--debug",
        action="store_true",
        help=f"Show an error's traceback; so does the variable {DEBUG_VARIABLE}=1",
    )
    return group


def _examples(lines: Sequence[str]) -> str:
    return "\n  ".join(["examples:", *lines])


def _word_names(command: Command) -> list[str]:
    if command.positional is None:
        return []
    name = command.positional.upper()
    return [name if command.required else f"[{name}]"]


def _add_flags(parser: argparse.ArgumentParser, command: Command) -> None:
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for title, options in command.groups.items():
        group = parser.add_argument_group(title)
        for name, option in options.items():
            _add_flag(group, name, option, command.own_defaults.get(name, option.default))
    if command in (_FINETUNE, _GENERATE):
        others = _FINETUNE.options() | _GENERATE.options()
        for name in _SHARED_FLAGS:
            if name not in command.options():
                _add_flag(parser, name, others[name], None, hidden=True)


def _add_flag(group: Any, name: str, option: Option, default: Any, hidden: bool = False) -> None:
    shown = repr(default) if option.shown is None else option.shown
    if default != option.default:
        shown += f"; in Python {option.default!r}"
    kind = option.kind or (str if option.default is None else type(option.default))
    settings: dict[str, Any] = {"type": kind, "metavar": _METAVARS.get(kind, "N")}
    if kind is bool:
        settings = {"type": _boolean, "nargs": "?", "const": True, "metavar": "True|False"}
    if option.many:
        settings["action"] = "append"
    text = f"{option.help} (default: {shown})"
    group.add_argument(
        f"--{name}",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS if hidden else text,
        **settings,
    )


def _read(argv: Sequence[str]) -> tuple[Command, Options]:
    """The command, and what was given for it by name."""
    given = vars(_parser().parse_args(_command_first(argv)))
    name, parser, words = given.pop("name"), given.pop("subparser"), given.pop("words")
    del given["debug"]
    command = COMMANDS[name]
    if words:
        # gpt-2-simple 0.8.1 took a dataset for generate too, and ignored it.
        _take_words(parser, "dataset" if name == "generate" else command.positional, words, given)
    if command.required and command.positional not in given:
        parser.error(f"{name} needs {command.positional.upper()}; see '{parser.prog} --help'")
    for flag in [flag for flag in given if flag not in command.options()]:
        complain(f"{PROGRAM}: note: {name} makes no use of {flag} {given.pop(flag)!r}")
    return command, given


def _take_words(
    parser: argparse.ArgumentParser, name: str | None, words: list[str], given: Options
) -> None:
    """Gives the words that stand without a flag to the flag that they stand for."""
    if name is None:
        parser.error(f"unrecognized: {' '.join(words)!r}")
    if name in given:
        parser.error(f"--{name} {given[name]!r} was given, and {' '.join(words)!r} beside it")
    if len(words) > 1 and name != "dataset":
        parser.error(f"{' '.join(words[1:])!r} is more than one {name}")
    given[name] = words if len(words) > 1 else words[0]


# --- errors and exit statuses -------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, as the console script `gpt_2_simple` does.

    Args:
        argv: the arguments after the program's name; None takes them from the process.

    Returns:
        The exit status: 0 done, 1 an error (told in one line on standard error), 2 wrong usage,
        130 stopped by Ctrl-C, 141 standard output was closed by its reader.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            with _one_line_warnings():
                command, options = _read(argv)
                return command.run(options)
        finally:
            if sys.stdout is not None:  # a daemon has none
                sys.stdout.flush()  # a closed pipe shows here rather than after the end
    except SystemExit as stop:  # argparse, after --help or wrong usage
        return int(stop.code or 0)
    except KeyboardInterrupt:
        complain(f"{PROGRAM}: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The way of Python's own documentation: what is still buffered must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except Exception as error:
        message = _message(error)
        wanted = "--debug" in argv or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
        if message is None or wanted:
            raise
        complain(f"{PROGRAM}: error: {message}")
        return 1


def _message(error: Exception) -> str | None:
    """What an error says, in one line; None if it is no error that a user can do anything about."""
    name = type(error).__name__
    if type(error).__module__.startswith("tensorflow"):
        # Its own words stand among places in the graph and in the code.
        noise = r"\s|$|Graph execution error|Detected at|Node:|Hint:|Original stack trace"
        lines = [line for line in str(error).splitlines() if not re.match(noise, line)]
        return f"{name}: {lines[0]}" if lines else name
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError, MemoryError)):
        return " ".join(str(error).split()) or name
    return None


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, *_: Any) -> None:
        complain(f"{PROGRAM}: warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
