"""Prompts in, growing texts out: continuous batching on a thread of its own.

Requests join the running batch between chunks of tokens, and leave it when they end (Yu et al.
2022, Orca). Cache, prefill and sampling are those of `generation`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from .. import session
from ..common.errors import first_line
from ..encoder import Encoder
from ..generation import sequences
from ..generation.decode import Likeliest
from ..generation.kv_cache import model_precision
from ..generation.request import MAX_CACHE_BYTES, Prompt
from ..generation.sampling import BROKEN, HEALTHY, check_status
from ..generation.settings import SamplingParams
from ..generation.stopping import StopCriteria, ends_with
from ..generation.text_stream import GrowingText

# Prompt tokens that are computed between two chunks of new tokens: others wait for so many.
PREFILL_TOKENS = 256

# How long a chunk of new tokens takes: while requests wait to join, and otherwise.
BUSY_CHUNK_SECONDS, CHUNK_SECONDS = 0.05, 0.2
MAX_CHUNK = 64

STOP, LENGTH = "stop", "length"  # OpenAI's names for why a text ended


class QueueFullError(Exception):
    """As many requests wait as may."""


class ClosedError(Exception):
    """The engine takes no requests any more."""


class Failure(NamedTuple):
    """The request got no result."""

    status: int  # as an HTTP status
    message: str


class TokenScore(NamedTuple):
    """A token of a text, and how likely the model found it."""

    token: int
    offset: int  # characters of the new text, or tokens of the prompt, before it
    log_probability: float | None  # natural; None for a prompt's first token
    likeliest: list[tuple[int, float]]  # the likeliest tokens in its place, the best first


class PromptScores(NamedTuple):
    """How likely the model found the prompt's tokens."""

    tokens: list[TokenScore]


class Delta(NamedTuple):
    """What one of a request's texts got."""

    number: int  # of the text
    text: str
    tokens: list[TokenScore]  # of this text, if the request wants them
    finish_reason: str | None  # STOP or LENGTH, once the text is over
    n_tokens: int  # new tokens that the text has so far
    log_probability: float  # of all of them, if the request wants them scored
    first_token_at: float  # by time.monotonic()


Event = Delta | PromptScores | Failure


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """A prompt, and what to write after it.

    Attributes:
        prompt: what the texts start with; its tokens and `length` fit in the context.
        sampling: how tokens are chosen.
        length: new tokens a text, at most.
        stop: what ends a text.
        n_texts: texts to write.
        seed: as generate()'s; the texts' numbers count from first_text, as the texts of generate().
        first_text: see seed.
        n_likeliest: how many of the likeliest tokens to tell at each place; -1 for no scores.
        scores_prompt: whether the prompt's tokens are scored too.
        streams: whether each piece is told; otherwise only whole texts are.
        deadline: by time.monotonic(); then the texts end as they are.
        listener: is called on the engine's thread with each event; it must return at once.
    """

    prompt: Prompt
    sampling: SamplingParams
    length: int
    stop: StopCriteria
    n_texts: int
    seed: int
    first_text: int
    n_likeliest: int
    scores_prompt: bool
    streams: bool
    deadline: float
    listener: Callable[[Event], None]


class _Text:
    """One of a job's texts."""

    def __init__(self, job: Job, index: int, encoder: Encoder) -> None:
        request = job.request
        stream = sequences.random_stream(request.seed, request.first_text + index)
        tokens = list(request.prompt.tokens)
        self.job, self.index, self.n_tokens = job, index, 0
        self.sequence = sequences.Sequence(tokens, request.sampling, request.length, stream)
        self.text = GrowingText(request.prompt, encoder, request.stop, include_prefix=False)
        self.finish_reason: str | None = None
        self.log_probability = 0.0
        self.first_token_at = math.inf
        self._scores: collections.deque[TokenScore] = collections.deque()
        self._n_told = 0  # characters

    def append(self, tokens: Sequence[int], scores: Likeliest | None) -> None:
        """Adds tokens up to the text's end."""
        self.first_token_at = min(self.first_token_at, time.monotonic())
        for place, token in enumerate(tokens):
            offset = len(self.text.new_text)
            self.text.append([token])
            self.n_tokens += 1
            if scores is not None:
                score = _score(token, offset, scores, place, self.job.request.n_likeliest)
                self.log_probability += score.log_probability or 0.0
                if not ends_with([token], self.job.request.stop.stop_token):
                    self._scores.append(score)
            if self.text.ended:
                self.finish_reason = STOP
                return
        if self.n_tokens >= self.job.request.length:
            self.cut()

    def cut(self) -> None:
        """Ends the text where it is."""
        self.text.finish()
        self.finish_reason = LENGTH
        self.sequence.ended = True

    def take_delta(self) -> Delta:
        """What was not told yet."""
        text = self.text.take_ready()
        self._n_told += len(text)
        scores = []
        while self._scores and self._scores[0].offset < self._n_told:
            scores.append(self._scores.popleft())
        score = self.log_probability
        found = self.index, text, scores, self.finish_reason, self.n_tokens, score
        return Delta(*found, self.first_token_at)


def _score(token: int, offset: int, scores: Likeliest, place: int, count: int) -> TokenScore:
    """The score at a place of scores [time] and [time, n]."""
    top = zip(scores.top_tokens[place], scores.top_log_probabilities[place], strict=True)
    likeliest = [(int(t), float(p)) for t, p in list(top)[:count]]
    return TokenScore(token, offset, float(scores.log_probabilities[place]), likeliest)


class Job:
    """A request in the engine. Any thread may call cancel()."""

    def __init__(self, request: EngineRequest, encoder: Encoder) -> None:
        self.request, self.is_cancelled = request, False
        self.texts = [_Text(self, i, encoder) for i in range(request.n_texts)]
        self.prompt_scores: list[TokenScore] = []

    def cancel(self) -> None:
        """Its client has gone: its rows are freed after the chunk that is being computed."""
        self.is_cancelled = True

    @property
    def running(self) -> list[_Text]:
        """The texts that are not over."""
        return [text for text in self.texts if text.finish_reason is None]

    def tell(self, event: Event) -> None:
        """Calls the listener; if it fails, the client has gone."""
        try:
            self.request.listener(event)
        except Exception:
            self.cancel()


class Engine:
    """One decode loop for one model."""

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        max_batch: int = 32,
        max_queue: int = 256,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        on_death: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Takes a session that holds a model.

        Args:
            sess: the session; while the engine runs, nothing else may load weights into it.
            max_batch: texts that grow at the same time.
            max_queue: requests that may wait.
            max_cache_bytes: bytes of keys and values; one request alone may take more.
            on_death: is called on the engine's thread if it cannot go on, with the reason.
        """
        state = session.graph_state(sess)
        self.sess, self.hparams, self.encoder = sess, state.hparams, state.encoder
        self.max_batch, self.max_queue, self.max_cache_bytes = max_batch, max_queue, max_cache_bytes
        self.on_death = on_death
        self.error: str | None = None  # why it cannot go on
        self._condition = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._is_closed = False
        self._generation = sequences.Generation(sess)
        self._texts: dict[int, _Text] = {}  # those in the batch, by the id of their sequence
        self._joining: list[Job] = []
        self._join: Iterator[sequences.PrefillPiece] = iter(())
        self._seconds_a_step = math.inf
        self._thread = threading.Thread(target=self._work, name="gpt_2_simple engine", daemon=True)

    # --- for any thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Builds what decoding needs, then starts the thread.

        Raises:
            RuntimeError: the weights are not finite numbers.
        """
        self._warm_up()
        self._thread.start()

    def submit(self, requests: Sequence[EngineRequest]) -> list[Job]:
        """Queues requests, all or none.

        Raises:
            QueueFullError, ClosedError: see there.
        """
        self._check_room(len(requests))  # making jobs takes a while
        jobs = [Job(request, self.encoder) for request in requests]
        with self._condition:
            self._check_room(len(jobs))
            self._waiting.extend(jobs)
            self._condition.notify()
        return jobs

    def _check_room(self, n_requests: int) -> None:
        if self._is_closed or self.error is not None:
            raise ClosedError(self.error or "the server is shutting down")
        if len(self._waiting) + n_requests > self.max_queue:
            raise QueueFullError

    def close(self) -> None:
        """Ends the thread after its present chunk; what is not finished fails."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def n_waiting(self) -> int:
        """Requests that wait to join."""
        return len(self._waiting) + len(self._joining)

    @property
    def n_running(self) -> int:
        """Texts that grow."""
        return len(self._texts)

    # --- the engine's thread ----------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Generates a little with each graph, so that no request waits for its making."""
        start = [self.encoder.end_of_text or 0] * 3
        for prompts in ([start], [start, start[:2]]):
            self._probe(prompts)

    def _probe(self, prompts: list[list[int]]) -> None:
        """Raises RuntimeError if the weights are not finite numbers."""
        generation = sequences.Generation(self.sess)
        stream = sequences.random_stream(0, 0)
        rows = [sequences.Sequence(list(p), SamplingParams(), 1, stream) for p in prompts]
        try:
            generation.add(rows)
            generation.decode(1)
            generation.check()
        finally:
            generation.free()

    def _work(self) -> None:
        while self._wait():
            try:
                self._round()
            except Exception as error:  # of TensorFlow: out of memory, a closed session
                self._fail_all(500, f"generating failed ({type(error).__name__})")
                self._restart(error)
        self._fail_all(503, self.error or "the server is shutting down")
        with contextlib.suppress(Exception):  # the session may be closed
            self._generation.free()

    def _wait(self) -> bool:
        """Waits until there is something to do; False once it is the end."""
        with self._condition:
            while not (self._waiting or self._joining or self._texts or self._is_closed):
                self._condition.wait()
            return not self._is_closed and self.error is None

    def _round(self) -> None:
        """A piece of the prompts that join, then a chunk of new tokens."""
        self._leave()
        if not self._joining:
            self._begin_join()
        if self._joining:
            self._continue_join()
        if self._texts:
            self._decode()
        self._leave()

    def _leave(self) -> None:
        """Removes texts that are over, whose client has gone, or whose time is over."""
        now = time.monotonic()
        with self._condition:
            waiting = [job for job in self._waiting if not self._is_over(job, now)]
            self._waiting.clear()
            self._waiting.extend(waiting)
        if self._joining and all(self._is_over(job, now) for job in self._joining):
            self._end_join()
        for job in {id(text.job): text.job for text in self._texts.values()}.values():
            if now >= job.request.deadline and not job.is_cancelled:
                for text in job.running:
                    text.cut()
                    job.tell(text.take_delta())
        over = [t for t in self._texts.values() if t.job.is_cancelled or t.finish_reason]
        self._remove(over)

    def _is_over(self, job: Job, now: float) -> bool:
        """Whether a job that has no token yet leaves; tells it if its time is over."""
        if now >= job.request.deadline and not job.is_cancelled:
            job.tell(Failure(408, "no token came within the time limit; try again later"))
            job.cancel()
        return job.is_cancelled

    def _remove(self, texts: list[_Text]) -> None:
        if texts:
            self._generation.remove([text.sequence for text in texts])
            for text in texts:
                del self._texts[id(text.sequence)]

    # --- joining ----------------------------------------------------------------------------------

    def _begin_join(self) -> None:
        """Takes the first of the queue, and others that fit in one piece with them."""
        jobs: list[Job] = []
        with self._condition:
            while self._waiting and self._fits([*jobs, self._waiting[0]]):
                jobs.append(self._waiting.popleft())
                if jobs[-1].request.scores_prompt:
                    break
        if not jobs:
            return
        rows = [text.sequence for job in jobs for text in job.texts]
        n_likeliest = jobs[0].request.n_likeliest if jobs[0].request.scores_prompt else -1
        self._joining = jobs
        self._join = self._generation.join(rows, PREFILL_TOKENS, n_likeliest)

    def _fits(self, jobs: list[Job]) -> bool:
        """Whether these jobs may join together now."""
        n_rows = len(self._texts) + sum(len(job.texts) for job in jobs)
        if n_rows > self.max_batch:
            return False
        requests = [job.request for job in jobs]
        longest = max(len(request.prompt.tokens) for request in requests)
        if len(jobs) > 1:
            is_large = len(jobs) * longest > PREFILL_TOKENS
            if is_large or requests[-1].scores_prompt:
                return False
        elif not self._texts:
            return True  # alone it has to fit
        running = [text.job.request for text in self._texts.values()]
        columns = max(len(r.prompt.tokens) + r.length for r in [*running, *requests])
        return self._generation.n_bytes(n_rows, columns) <= self.max_cache_bytes

    def _continue_join(self) -> None:
        """Computes one piece of the prompts; after the last one, their texts grow."""
        for piece in self._join:
            if piece.likeliest is not None:
                self._score_prompt(self._joining[0], piece.likeliest)
            if not piece.is_last:
                return
        for job in self._joining:
            self._texts |= {id(text.sequence): text for text in job.texts}
            if job.request.scores_prompt:
                job.tell(PromptScores(job.prompt_scores))
        self._end_join()

    def _score_prompt(self, job: Job, scores: Likeliest) -> None:
        tokens, found = job.request.prompt.tokens, job.prompt_scores
        if not found:
            found.append(TokenScore(tokens[0], 0, None, []))
        columns = Likeliest(*(part[0] for part in scores))
        for place in range(len(columns.log_probabilities)):
            i = len(found)
            found.append(_score(tokens[i], i, columns, place, job.request.n_likeliest))

    def _end_join(self) -> None:
        self._joining = []
        close = getattr(self._join, "close", None)
        if close is not None:
            close()
        self._join = iter(())

    # --- decoding ---------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Computes a chunk, and tells what came."""
        generation = self._generation
        texts = [self._texts[id(row)] for row in generation.rows]
        n_likeliest = max(text.job.request.n_likeliest for text in texts)
        is_busy = self._joining or self._waiting
        seconds = BUSY_CHUNK_SECONDS if is_busy else CHUNK_SECONDS
        steps = max(1, min(MAX_CHUNK, int(seconds / self._seconds_a_step)))
        steps = min(steps, *(row.n_missing for row in generation.rows))
        started = time.monotonic()
        chunk = generation.decode(steps, n_likeliest)
        self._seconds_a_step = (time.monotonic() - started) / chunk.tokens.shape[1]
        for i, text in enumerate(texts):
            scores = None
            if chunk.likeliest is not None and text.job.request.n_likeliest >= 0:
                scores = Likeliest(*(part[i] for part in chunk.likeliest))
            tokens = chunk.tokens[i]
            text.append(tokens[tokens >= 0].tolist(), scores)
            self._tell(text)

    def _tell(self, text: _Text) -> None:
        job, fault = text.job, text.sequence.status
        if job.is_cancelled:
            return
        if text.finish_reason is None and fault != HEALTHY:
            self._fail(job, fault)
        elif text.finish_reason is not None or job.request.streams:
            delta = text.take_delta()
            if delta.text or delta.tokens or delta.finish_reason is not None:
                job.tell(delta)

    def _fail(self, job: Job, fault: int) -> None:
        """Ends a job whose logits allow no token; the engine too if its weights are broken."""
        try:
            check_status(np.array([fault]), model_precision(self.sess))
        except (RuntimeError, ValueError) as error:
            job.tell(Failure(500 if fault == BROKEN else 400, str(error)))
            job.cancel()
        if fault == BROKEN:
            try:
                self._probe([[self.encoder.end_of_text or 0]])
            except RuntimeError as error:
                self._die(str(error))

    def _die(self, message: str) -> None:
        self.error = message
        self.on_death(message)

    def _fail_all(self, status: int, message: str) -> None:
        with self._condition:
            waiting = list(self._waiting) if self._is_closed or self.error else []
            for _ in waiting:
                self._waiting.popleft()
        running = {id(text.job): text.job for text in self._texts.values()}
        for job in [*running.values(), *self._joining, *waiting]:
            if not job.is_cancelled:
                job.tell(Failure(status, message))
                job.cancel()
        self._texts.clear()
        self._joining, self._join = [], iter(())

    def _restart(self, error: Exception) -> None:
        """Begins with an empty cache after an error, which may have lost the cache."""
        try:
            self._generation.free()
            self._generation = sequences.Generation(self.sess)
        except Exception:
            self._die(f"the engine cannot go on: {first_line(error)}")
