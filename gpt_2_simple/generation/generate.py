"""Settings in, generated texts out: generate() and the functions that share its settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from ..common.report import verbosity
from ..common.settings import session_function
from ..storage.load import ensure_draft, ensure_loaded
from . import output, text_stream
from .request import GenerationRequest, build_request
from .settings import GenerationSettings
from .text_stream import GeneratedText

# generate_to_file() does not take these either in gpt-2-simple 0.8.1.
_NOT_TO_FILE = ("sample_dir", "return_as_list")

# What generate_stream() does not take: it generates one text, from the session's model, and prints
# nothing.
_NOT_STREAMED = (
    *("run_name", "checkpoint_dir", "model_name", "model_dir", "sample_dir", "return_as_list"),
    *("destination_path", "sample_delim", "nsamples", "batch_size", "num_beams", "length_penalty"),
    *("stream", "verbose"),
)


@session_function(GenerationSettings)
def generate(sess: tf.compat.v1.Session, settings: GenerationSettings) -> list[str] | None:
    """Generates texts; prints them, returns them, or writes them to a file.

    When the context is full, the window slides: the model then sees the last n_ctx / 2 tokens.

    Args:
        sess: a session with a model, from load_gpt2() or finetune().
        settings: each of them is an argument.

    Returns:
        The texts if return_as_list, else None. After Ctrl-C, return_as_list returns the texts as
        far as they have come; without it they are printed or written, and KeyboardInterrupt is
        raised.

    Raises:
        FileNotFoundError: there is no such run or model.
        RuntimeError: the session holds no model, or is closed; or the weights are not finite
            numbers.
        ValueError: an argument is out of range.
    """
    return _generate(sess, settings)


@session_function(GenerationSettings, omit=_NOT_STREAMED, positional=["prefix"])
def generate_stream(sess: tf.compat.v1.Session, settings: GenerationSettings) -> Iterator[str]:
    """Generates one text and gives it in pieces while it is generated.

    The prefix must be a string, not a list.

    Args:
        sess: a session with a model, from load_gpt2() or finetune().
        settings: each of them is an argument.

    Returns:
        An iterator of pieces of text, never half a character. Joined, they are what generate()
        returns, except for newlines at the start of a text without its prefix.

    Raises:
        RuntimeError: the session holds no model, or is closed.
        ValueError: an argument is out of range.
    """
    if isinstance(settings.prefix, tuple):
        prefixes = list(settings.prefix)
        raise ValueError(f"prefix={prefixes!r} must be a string: a stream is one text")
    return text_stream.stream_text(sess, _request(sess, settings), 0)


@session_function(
    GenerationSettings,
    omit=_NOT_TO_FILE,
    defaults={"destination_path": "gpt_2_gen_texts.txt"},
)
def generate_to_file(sess: tf.compat.v1.Session, settings: GenerationSettings) -> None:
    """Generates texts into a file.

    The file appears whole when all texts are there, or when something ends the work early.

    Args:
        sess: a session with a model, from load_gpt2() or finetune().
        settings: each of them is an argument.

    Raises:
        FileNotFoundError: there is no such run or model, or no folder for the file.
        RuntimeError: the session holds no model, or is closed; or the weights are not finite
            numbers.
        ValueError: an argument is out of range.
    """
    _generate(sess, settings)


def _generate(sess: tf.compat.v1.Session, settings: GenerationSettings) -> list[str] | None:
    with verbosity(settings.verbose), contextlib.ExitStack() as stack:
        request = _request(sess, settings)
        append: output.Append | None = None if settings.return_as_list else output.print_text
        if settings.destination_path:
            append = stack.enter_context(output.open_output(settings.destination_path))
        delimiter = settings.sample_delim if settings.n_texts > 1 else ""
        if settings.stream and append:
            for index in range(settings.n_texts):
                with contextlib.closing(text_stream.stream_text(sess, request, index)) as pieces:
                    for piece in pieces:
                        append(piece)
                append(f"\n{delimiter}")
            return None
        texts: list[str] = []
        generated = stack.enter_context(
            contextlib.closing(text_stream.generate_texts(sess, request))
        )
        try:
            for _, text in generated:
                texts.append(text)
                if append:
                    append(f"{text}\n{delimiter}")
        except KeyboardInterrupt:
            if not settings.return_as_list:
                raise
    return texts if settings.return_as_list else None


def iterate_texts(
    sess: tf.compat.v1.Session, settings: GenerationSettings
) -> Iterator[GeneratedText]:
    """Generates texts as generate() does, and gives each when it is finished.

    After Ctrl-C it gives the texts as far as they have come, before KeyboardInterrupt.
    """
    return text_stream.generate_texts(sess, _request(sess, settings))


def _request(sess: tf.compat.v1.Session, settings: GenerationSettings) -> GenerationRequest:
    """The request, for the session's model or the one that the settings name."""
    named = (settings.run_name, settings.checkpoint_dir, settings.model_name, settings.model_dir)
    state = ensure_loaded(sess, *named)
    request = build_request(settings, state.encoder, state.hparams)
    if settings.draft_model is None:
        return request
    return request._replace(draft=ensure_draft(state, settings.draft_model, settings.model_dir))
