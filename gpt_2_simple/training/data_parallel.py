"""A worker's share of the micro-batches in, the step of all of them out: training by a cluster.

Every worker runs the same loop. A step's micro-batches are dealt out to the workers, and their
gradients are summed once a step: the settings alone decide what a step is, not the number of
workers. Worker 0 reads and writes the run; the others get its state when they begin.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from .. import encoder, session
from ..common.errors import first_line
from ..common.folders import read_hparams
from ..common.report import say
from ..data.token_file import hash_json
from ..distributed.channel import WorkerLost
from ..distributed.cluster import Cluster
from ..distributed.collectives import Collectives
from ..storage.checkpoint_manager import CheckpointManager
from ..storage.optimizer_state import OptimizerState
from ..storage.runs import RunState
from . import history
from .run_logger import RunLogger
from .settings import TrainingSettings
from .sharded_optimizer import ShardedState
from .trainer import Data, Diverged, Feeds, Result, Start, Trainer
from .validation import Validation

# Settings that may differ between workers: places, as each machine has its own, and what worker 0
# alone does.
_MAY_DIFFER = {
    *("dataset", "val_dataset", "model_dir", "checkpoint_dir", "cache_dir"),
    *("on_step", "verbose", "print_every"),
}

# How many tokens of a dataset are hashed at once.
_HASHED_TOKENS = 1 << 22


# --- before the training --------------------------------------------------------------------------


@contextlib.contextmanager
def telling_failures(cluster: Cluster) -> Iterator[None]:
    """An error that ends this block is told to all other workers, which then end too."""
    try:
        yield
    except BaseException as error:
        _tell(cluster, error)
        raise


def _tell(cluster: Cluster, error: BaseException) -> None:
    """Tells the other workers of an error here, unless one of them caused it."""
    if isinstance(error, WorkerLost):
        return
    reason = first_line(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        reason = "it was stopped by Ctrl-C"
    cluster.channel.fail(f"{cluster.spec.name(cluster.spec.index)} failed: {reason}")


def check_settings(cluster: Cluster, settings: TrainingSettings) -> None:
    """Raises ValueError if the workers' settings differ, or do not give each of them work."""
    values = {name: getattr(settings, name) for name in vars(settings) if name not in _MAY_DIFFER}
    texts = {name: json.dumps(value, default=str) for name, value in values.items()}
    _check_same(cluster, texts, "run the same script with the same settings on all workers")
    count, micro_batches = cluster.spec.count, settings.accumulate_gradients
    settings.check_workers(count)
    least, n_more = divmod(micro_batches, count)
    if n_more:
        say(
            f"accumulate_gradients={micro_batches} gives {n_more} of the {count} workers "
            f"{least + 1} micro-batches, and the others {least}, which then wait: "
            f"accumulate_gradients={(least + 1) * count} would use all of them"
        )


def _check_same(cluster: Cluster, mine: dict[str, Any], remedy: str) -> None:
    """Raises ValueError, on all workers, if their values differ from worker 0's."""
    gathered = cluster.channel.gather(mine)
    for index, other in enumerate(gathered):
        for name, value in gathered[0].items():
            if other.get(name) != value:
                raise ValueError(
                    f"{cluster.spec.name(index)} has {name}={other.get(name)}, and worker 0 has "
                    f"{name}={value}: {remedy}"
                )


def build_model(
    sess: tf.compat.v1.Session, model: str, run: str, settings: TrainingSettings
) -> session.GraphState:
    """Builds the model for a worker that writes nothing; it gets the weights from worker 0.

    Args:
        sess: a session.
        model: the model's folder, for its sizes and its vocabulary.
        run: the run's folder, which may be on worker 0's disk alone.
        settings: the run's.
    """
    hparams = read_hparams(model)
    vocabulary = encoder.get_encoder(model)
    encoder.check_vocabulary(vocabulary, hparams.n_vocab, model)
    gpus = session.get_available_gpus() if settings.multi_gpu else []
    state = session.build_model(sess, hparams, gpus, settings.base_precision)
    state.loaded_folder, state.encoder = os.path.abspath(run), vocabulary
    return state


def data_digest(chunks: Sequence[np.ndarray]) -> str:
    """Identifies a dataset's tokens, and where its chunks end."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "little"))
        for start in range(0, len(chunk), _HASHED_TOKENS):
            part = np.ascontiguousarray(chunk[start : start + _HASHED_TOKENS], dtype="<u4")
            digest.update(part.tobytes())
    return digest.hexdigest()[:16]


# --- training -------------------------------------------------------------------------------------


class _NoCheckpoints(CheckpointManager):
    """What a worker has that writes nothing."""

    def save(self, run: RunState) -> str:
        return ""

    def save_best(self) -> None:
        pass

    def overwrite(self) -> None:
        pass


class DataParallelTrainer(Trainer):
    """A Trainer on one of several workers."""

    def __init__(
        self,
        sess: tf.compat.v1.Session,
        state: session.GraphState,
        data: Data,
        settings: TrainingSettings,
        folder: str,
        start: Start,
    ):
        """See Trainer. A worker that writes nothing gives any Start that does not resume.

        Raises:
            ValueError: another worker has other data, or another model.
            WorkerLost: another worker failed.
        """
        assert state.cluster is not None
        self.cluster: Cluster = state.cluster
        self.channel = self.cluster.channel
        self.wants_to_stop = False
        self._check_data(state, data)
        super().__init__(sess, state, data, settings, folder, start)

    def _check_data(self, state: session.GraphState, data: Data) -> None:
        mine = {
            "dataset": data_digest(data.chunks),
            "validation set": data_digest(data.validation or []),
            "model": hash_json(vars(state.hparams)),
        }
        _check_same(self.cluster, mine, "these digests tell that the files differ; copy them again")

    # --- the beginning ----------------------------------------------------------------------------

    def _manage_checkpoints(self) -> CheckpointManager:
        if self.cluster.is_writer:
            return super()._manage_checkpoints()
        optimizer = self._optimizer_state()
        return _NoCheckpoints(self.sess, self.state, self.folder, 0, optimizer, None, self.adapter)

    def _optimizer_state(self) -> OptimizerState:
        self.collectives = self.state.build_once(Collectives, self.cluster)
        self.shares = None
        if not self.ops.slots:
            return super()._optimizer_state()
        variables, slots = self.ops.state_variables, self.ops.slots
        self.shares = ShardedState(self.sess, self.state, variables, slots, self.collectives)
        return self.shares

    def _open_logger(self, steps: int | None) -> RunLogger:
        if self.cluster.is_writer:
            return super()._open_logger(steps)
        return RunLogger(None, self.run, steps, self.settings.print_every)

    def _begin_run(self) -> RunState:
        """Gives all workers worker 0's place in the run, its weights and its optimizer's state."""
        run = super()._begin_run() if self.cluster.is_writer else RunState()
        run.sampler = self.sampler.state()
        told = self.channel.broadcast([run.to_json(), self.settings.on_step is not None])
        text, self._is_called_back = told
        if not self.cluster.is_writer:
            run = RunState.from_json(text)
            assert run.sampler is not None
            self.sampler.restore(run.sampler)
        shared = self.checkpoints.optimizer_state.variables.values()
        variables = [*session.named_variables(self.state).values(), *shared]
        if self.adapter is not None:
            variables += self.adapter.adapter.flatten()
        copy = self.state.build_once(_build_copy, self.collectives, *variables)
        self.collectives.run(self.sess, copy)
        if self.shares is not None:
            self.shares.deal_out()
        return run

    # --- the loop ---------------------------------------------------------------------------------

    def train(self) -> Result:
        """See Trainer.train(). The workers end together.

        Raises:
            WorkerLost: another worker failed; names it, and the last checkpoint.
        """
        try:
            result = super().train()
            self.channel.broadcast("saved")
        except WorkerLost as error:
            raise WorkerLost(f"{error}. {self._way_on()}") from error.__cause__
        return result

    def _way_on(self) -> str:
        latest = self.checkpoints.latest or self.channel.notes.get("latest")
        if latest is None:
            return "There is no checkpoint yet. Start all workers again"
        where = "" if self.cluster.is_writer else " of worker 0"
        return f"The last checkpoint{where} is {latest}: start all workers again, and they go on"

    @property
    def is_done(self) -> bool:
        """Whether the workers have agreed to end the training."""
        return self.run.step == self.last_step or self.has_ended or self.wants_to_stop

    def call_on_step(self, entry: history.Entry) -> None:
        """Worker 0 alone tells its caller; all go by the answer."""
        if self.cluster.is_writer:
            super().call_on_step(entry)
        if self._is_called_back:
            self.has_ended = self.channel.broadcast(self.has_ended)

    def take_step(self) -> history.Entry | None:
        """See Trainer.take_step(); names the worker whose loss is not finite."""
        try:
            return super().take_step()
        except Diverged as error:
            losses = self._statuses[:, 0]
            bad = [self.cluster.spec.name(i) for i in np.flatnonzero(~np.isfinite(losses)).tolist()]
            where = f", on {', '.join(bad)}" if 0 < len(bad) < len(losses) else ""
            raise Diverged(f"{error}{where}") from None

    def accumulate(self, batches: Sequence[Feeds]) -> bool:
        """Sums the gradients of this worker's micro-batches, and then those of all workers.

        A worker that is told to stop takes this step all the same, and tells the others in it.
        """
        *first, last = self.cluster.share(batches)
        for batch in first:
            self.sess.run(self.ops.add_micro_batch, batch)
        feed = {**last, self.ops.wants_stop: float(self.interruption.requested)}
        self._statuses = self.collectives.run(self.sess, self.ops.sum_over_workers, feed)
        if self._statuses[:, 2].any():
            self.wants_to_stop = True
            self.interruption.note()
        return True

    def apply_gradients(self, feed: Feeds) -> Any:
        """Takes the step's update, whose parts the workers send each other if they share it."""
        if self.shares is None:
            return super().apply_gradients(feed)
        return self.collectives.run(self.sess, self.ops.apply_gradients, feed)

    # --- between steps ----------------------------------------------------------------------------

    def validation_loss(self, validation: Validation) -> float | None:
        """Each worker measures its share of the batches; the sum is as of one worker."""
        starts = validation.starts
        totals: list[list[Any]] = []
        for start in self.cluster.share(starts):
            if self.interruption.requested:
                break
            totals.append([start, validation.total(start)])
        gathered = dict(pair for part in self.channel.gather(totals) for pair in part)
        if len(gathered) < len(starts):  # Ctrl-C came first
            self.wants_to_stop = True
            self.interruption.note()
            return None
        return validation.mean([gathered[start] for start in starts])

    def save(self) -> None:
        """Worker 0 saves the run, with the others' shares of the optimizer's state."""
        if self.cluster.is_writer:
            try:
                super().save()
            finally:
                if self.shares is not None:
                    self.shares.end_save()
            self.channel.note(latest=self.checkpoints.latest)
        elif self.shares is not None:
            self.shares.take_part_in_save()

    def save_before_error(self) -> None:
        """Worker 0 saves what an error is about to end; the others need not wait for that."""
        error = sys.exc_info()[1]
        if error is not None:
            _tell(self.cluster, error)
        if self.shares is None:
            super().save_before_error()
        elif self.cluster.is_writer:
            say(
                "The steps since the last checkpoint cannot be saved: shard_optimizer=True spreads "
                "the optimizer's state over the workers"
            )

    def restore_last_checkpoint(self) -> str:
        """Worker 0 goes back to its last checkpoint."""
        if self.cluster.is_writer:
            return super().restore_last_checkpoint()
        return "training stopped"

    def write_samples(self, step: int) -> None:
        """Worker 0 writes samples."""
        if self.cluster.is_writer:
            super().write_samples(step)


def _build_copy(collectives: Collectives, *variables: tf.Variable) -> tf.Operation:
    return collectives.copy_from_writer(variables)
