"""Settings in, generated texts out: generate() and its like."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from ..common.checks import check_whole
from ..common.report import verbosity
from ..storage.load import THE_LOADED, ensure_loaded
from . import output, text_stream
from .request import as_strings, make_request, with_tokens
from .settings import Beams, SamplingParams
from .stopping import StopCriteria


def generate(
    sess: tf.compat.v1.Session,
    run_name: str = THE_LOADED,
    checkpoint_dir: str = "checkpoint",
    model_name: str | None = None,
    model_dir: str = "models",
    sample_dir: str = "samples",
    return_as_list: bool = False,
    truncate: str | None = None,
    destination_path: str | None = None,
    sample_delim: str = "=" * 20 + "\n",
    prefix: str | Sequence[str] | None = None,
    seed: int | None = None,
    nsamples: int = 1,
    batch_size: int | None = 1,
    length: int = 1023,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.0,
    include_prefix: bool = True,
    *,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token: str | int | None = None,
    include_stop: bool = False,
    min_length: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    bad_words: Sequence[str] | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stream: bool = False,
    verbose: int = 1,
) -> list[str] | None:
    """Generates texts; prints them, returns them, or writes them to a file.

    Past the end of the context the window slides: the model then sees the last n_ctx / 2 tokens.

    Args:
        sess: a session with a model, from load_gpt2() or finetune().
        run_name: the run to generate from; needed only if it is not what the session holds.
        checkpoint_dir: where runs are.
        model_name: generate from this model, not from a run; after finetune() from that model, as
            in 0.8.1, from what the session holds.
        model_dir: where models are.
        sample_dir: accepted for old scripts; nothing is written there.
        return_as_list: return the texts, do not print them.
        truncate: end each text before the first occurrence of this after the prefix.
        destination_path: write the texts to this file, do not print them.
        sample_delim: written after each text, unless there is only one.
        prefix: what each text starts with; a list gives `nsamples` texts for each of its strings,
            in order.
        seed: a whole number; the same gives the same texts, whatever the batch size. None draws
            another each time.
        nsamples: texts to generate; for a single prefix a multiple of batch_size.
        batch_size: texts to generate at once; None for as many as is sensible.
        length: tokens to generate, prefix not counted.
        temperature: below 1 is bolder on likely tokens; 0 always takes the likeliest.
        top_k: sample from the k likeliest tokens only; 0 for all.
        top_p: sample from the likeliest tokens that make up this probability (Holtzman et al.
            2019), of those that top_k leaves; 0 for all.
        include_prefix: False leaves the prefix out of the texts.
        max_new_tokens: in place of `length`: the name that other libraries have for it.
        stop: a string, or several: each text ends before the first of them.
        stop_token: a token's id, or its text such as '<|endoftext|>' or a newline, that ends it.
        include_stop: keep the `stop` or `stop_token` at the end.
        min_length: tokens before `stop_token` may come.
        repetition_penalty: above 1 makes tokens of the text so far less likely (Keskar et al.
            2019).
        no_repeat_ngram_size: no run of this many tokens comes twice; 0 for no such rule.
        bad_words: words that must not be written, at the start of a text or after a space; a token
            that holds more, such as "cathedral" for "cat", is another word.
        num_beams: above 1: search the likeliest text, following this many at once (beam search);
            nothing is drawn, so temperature, top_k, top_p and seed do not count, and nsamples is
            how many of the texts found are wanted, the best first.
        length_penalty: of num_beams: the texts found are compared by log-probability / tokens **
            length_penalty.
        stream: print each text as it comes; generate_stream() gives the pieces instead.
        verbose: 0 prints nothing.

    Returns:
        The texts if return_as_list, else None. Ctrl-C returns what there is; without
        return_as_list that is printed or written, and KeyboardInterrupt raised.

    Raises:
        FileNotFoundError: no such run or model.
        RuntimeError: the session holds no model, or is closed; or its weights are not numbers.
        ValueError: an argument is out of range.
    """
    generated: list[str] = []
    with verbosity(verbose), contextlib.ExitStack() as stack:
        end = _end(truncate, stop, include_stop, include_prefix)
        settings = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            min_length=min_length,
        )
        beams = Beams(num_beams, length_penalty)
        if stream and num_beams > 1:
            raise ValueError(
                f"num_beams={num_beams} cannot stream: a search may yet change what it has found; "
                "leave stream or num_beams out"
            )
        length = _new_tokens(length, max_new_tokens)
        request = make_request(prefix, nsamples, batch_size, length, settings, seed, end, beams)
        state = ensure_loaded(sess, run_name, checkpoint_dir, model_name, model_dir)
        request = with_tokens(request, state.encoder, stop_token, bad_words)
        write = None if return_as_list else output.print_text
        if destination_path:
            write = stack.enter_context(output.file_writer(destination_path))
        delimiter = "" if request.total == 1 else sample_delim
        if stream and write:
            for piece in text_stream.stream_text(sess, state, request):
                write(piece or f"\n{delimiter}")
            return None
        try:
            for text in text_stream.generate_texts(sess, state, request):
                generated.append(text)
                if write:
                    write(f"{text}\n{delimiter}")
        except KeyboardInterrupt:
            if not return_as_list:
                raise
    return generated if return_as_list else None


def _new_tokens(length: int, max_new_tokens: int | None) -> int:
    if max_new_tokens is None:
        return length
    check_whole("max_new_tokens", max_new_tokens, 1)
    return max_new_tokens


def _end(
    truncate: str | None, stop: str | Sequence[str] | None, include_stop: bool, include_prefix: bool
) -> StopCriteria:
    if truncate is not None and not isinstance(truncate, str):
        raise ValueError(f"truncate={truncate!r} must be a string; stop= takes several")
    stops = () if stop is None else as_strings("stop", stop)
    return StopCriteria(truncate, stops, include_stop, None, include_prefix)


def generate_stream(
    sess: tf.compat.v1.Session,
    prefix: str | None = None,
    *,
    length: int = 1023,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | None = None,
    include_prefix: bool = True,
    max_new_tokens: int | None = None,
    truncate: str | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token: str | int | None = None,
    include_stop: bool = False,
    min_length: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    bad_words: Sequence[str] | None = None,
) -> Iterator[str]:
    """Generates one text and gives it in pieces, as it comes; the arguments are generate()'s.

    Returns:
        An iterator of pieces of text, never half a character. Joined, they are what generate()
        returns, but for newlines at the start of a text without its prefix.
    """
    if prefix is not None and not isinstance(prefix, str):
        raise ValueError(f"prefix={prefix!r} must be a string: a stream is of one text")
    settings = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_length=min_length,
    )
    end = _end(truncate, stop, include_stop, include_prefix)
    length = _new_tokens(length, max_new_tokens)
    request = make_request(prefix, 1, 1, length, settings, seed, end)
    state = ensure_loaded(sess, THE_LOADED, "checkpoint", None, "models")
    request = with_tokens(request, state.encoder, stop_token, bad_words)
    return (piece for piece in text_stream.stream_text(sess, state, request) if piece)


def generate_to_file(
    sess: tf.compat.v1.Session,
    run_name: str = THE_LOADED,
    checkpoint_dir: str = "checkpoint",
    model_name: str | None = None,
    model_dir: str = "models",
    truncate: str | None = None,
    destination_path: str = "gpt_2_gen_texts.txt",
    sample_delim: str = "=" * 20 + "\n",
    prefix: str | Sequence[str] | None = None,
    seed: int | None = None,
    nsamples: int = 1,
    batch_size: int | None = 1,
    length: int = 1023,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.0,
    include_prefix: bool = True,
    **options: Any,
) -> None:
    """Generates texts into a file; the arguments, `options` too, are generate()'s.

    The file appears whole when all texts are there, or when something ends the work early.
    """
    generate(
        sess,
        run_name=run_name,
        checkpoint_dir=checkpoint_dir,
        model_name=model_name,
        model_dir=model_dir,
        truncate=truncate,
        destination_path=destination_path,
        sample_delim=sample_delim,
        prefix=prefix,
        seed=seed,
        nsamples=nsamples,
        batch_size=batch_size,
        length=length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        include_prefix=include_prefix,
        **options,
    )
