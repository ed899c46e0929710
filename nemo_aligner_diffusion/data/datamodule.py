"""The data of a training run as a LightningDataModule: layout from the trainer, position in its checkpoints."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any

import pytorch_lightning as pl

from nemo_aligner_diffusion.data.paths import PathSpec
from nemo_aligner_diffusion.data.prompts import PromptDataset
from nemo_aligner_diffusion.data.sample_stream import SampleStream
from nemo_aligner_diffusion.data.stream_loader import WORKER_TIMEOUT_SECONDS, StreamLoader
from nemo_aligner_diffusion.errors import DataError

logger = logging.getLogger(__name__)


class StreamDataModule(pl.LightningDataModule, ABC):
    """Training samples without end (or for ``epochs``), validation samples once each in file order.

    The data-parallel rank and size come from the trainer's strategy when it sets the module up (under tensor
    parallelism they are the data-parallel ones, so a tensor group sees one batch), or from ``rank`` and ``world_size``.
    Lightning saves the number of consumed samples in its checkpoints and a resumed run goes on with the next one,
    under another layout too. One iteration of the training loader covers all epochs: give the trainer ``max_steps``,
    not ``max_epochs``.

    Args:
        train: what :func:`~nemo_aligner_diffusion.data.paths.expand_paths` accepts.
        validation: the same, or None for no validation loader.
        micro_batch_size: samples a training batch on one rank.
        seed, shuffle_buffer, stream: arguments of :class:`~nemo_aligner_diffusion.data.sample_stream.SampleStream`, for
            training; ``on_bad_sample``, ``on_bad_shard`` and ``index_folder`` for validation too.
        num_workers, worker_timeout_seconds: see :class:`~nemo_aligner_diffusion.data.stream_loader.StreamLoader`;
            training only.
        validation_batch_size: samples a validation batch on one rank; ``micro_batch_size`` by default. Validation
            "wraps": an ``index`` not below the number of samples marks a repetition that fills the last batch.
        start_sample: global samples to leave out at the start; a loaded checkpoint overrides it.
        repeats: how many times in a row each training batch comes; a checkpoint in the middle of them goes on there.

    Raises:
        DataError: at ``setup`` when files are missing, a sample cannot be read, or sizes do not fit.
    """

    def __init__(
        self,
        train: PathSpec,
        validation: PathSpec | None = None,
        *,
        micro_batch_size: int,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        num_workers: int = 0,
        worker_timeout_seconds: float = WORKER_TIMEOUT_SECONDS,
        validation_batch_size: int | None = None,
        start_sample: int = 0,
        repeats: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
        **stream: Any,
    ) -> None:
        super().__init__()
        if (rank is None) != (world_size is None):
            raise DataError(f"rank is {rank} and world_size is {world_size}; expected both or neither")
        self.train = train
        self.validation = validation
        self.micro_batch_size = micro_batch_size
        self.validation_batch_size = validation_batch_size or micro_batch_size
        self.start_sample = start_sample
        self.repeats = repeats
        self._start_repeat = 0  # of the batch at start_sample: how many times it has come
        self._order = {"seed": seed, "shuffle_buffer": shuffle_buffer}
        self._workers = {"num_workers": num_workers, "worker_timeout_seconds": worker_timeout_seconds}
        self._stream = stream
        self._layout = None if rank is None or world_size is None else (rank, world_size)
        self._batches_before = 0  # the trainer's count when the current training loader was made
        self._train_samples: SampleStream | None = None
        self._contents: dict[str, Any] = {}  # of the training files
        self._contents_before: dict[str, Any] | None = None  # in the checkpoint that was loaded
        self._validation_loader: StreamLoader | None = None
        if validation is None and type(self).val_dataloader is StreamDataModule.val_dataloader:
            # Lightning must see a module that does not override the hook, or it warns about an empty loader.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @property
    def data_parallel(self) -> tuple[int, int]:
        """(rank, size) of the data-parallel group."""
        if self._layout is not None:
            return self._layout
        layout = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (int(layout["rank"]), int(layout["num_replicas"])) if layout else (0, 1)

    @property
    def samples_consumed(self) -> int:
        """Global samples whose micro-step is over, for the last time where batches are repeated: prefetched batches do
        not count, skipped steps do."""
        return self._consumed[0]

    @property
    def _consumed(self) -> tuple[int, int]:
        """That, and how many times the batch after them has come."""
        stream = self._train_samples
        if stream is None:
            return self.start_sample, self._start_repeat
        came = stream.start_repeat + self._batches_processed() - self._batches_before
        return stream.start_sample + came // stream.repeats * stream.step_size, came % stream.repeats

    @abstractmethod
    def build_dataset(self, paths: PathSpec, **options: Any) -> SampleStream:
        """A stream over ``paths``; ``options`` are arguments of :class:`.SampleStream`."""

    def build_loader(
        self,
        paths: PathSpec,
        num_workers: int = 0,
        worker_timeout_seconds: float = WORKER_TIMEOUT_SECONDS,
        **options: Any,
    ) -> StreamLoader:
        """A loader over ``paths``; ``options`` as of :meth:`build_dataset`."""
        return StreamLoader(self.build_dataset(paths, **options), num_workers, worker_timeout_seconds)

    def setup(self, stage: str | None = None) -> None:
        """Check the files and read one sample of each kind, before anything slow happens."""
        if stage in (None, "fit"):
            self._make_train_loader()
        if stage in (None, "fit", "validate") and self.validation is not None:
            shared = ("on_bad_sample", "on_bad_shard", "index_folder")
            self._validation_loader = self._make_loader(
                self.validation,
                micro_batch_size=self.validation_batch_size,
                shuffle_buffer=0,
                epochs=1,
                incomplete="wrap",
                **{name: self._stream[name] for name in shared if name in self._stream},
            )

    def train_dataloader(self) -> StreamLoader:
        """Return the loader from the first unconsumed sample on."""
        self.start_sample, self._start_repeat = self._consumed
        loader = self._make_train_loader()
        self._compare_contents()
        self._train_samples = loader.stream
        self._batches_before = self._batches_processed()
        return loader

    def val_dataloader(self) -> StreamLoader:
        """Return the validation loader that ``setup`` made."""
        assert self._validation_loader is not None
        return self._validation_loader

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what the order of the stream depends on."""
        consumed, came = self._consumed
        state = {"samples_consumed": consumed, "order": dict(self._order)} | ({"came": came} if came else {})
        return state | ({"contents": dict(self._contents)} if self._contents else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position; warn when seed or shuffle buffer differ: then it is a place in another order."""
        self.start_sample = int(state_dict["samples_consumed"])
        self._start_repeat = min(int(state_dict.get("came", 0)), self.repeats - 1)
        self._train_samples = None
        self._contents_before = state_dict.get("contents")
        for name, saved in state_dict.get("order", {}).items():
            now = self._order.get(name)
            if now != saved:
                logger.warning(
                    "the checkpoint was written with %s %s and this run has %s: samples are no longer seen exactly "
                    "once in the epoch under way; set it back to %s for an exact continuation",
                    name,
                    saved,
                    now,
                    saved,
                )

    def _make_loader(self, paths: PathSpec, **options: Any) -> StreamLoader:
        rank, world_size = self.data_parallel
        return self.build_loader(paths, rank=rank, world_size=world_size, **options)

    def _make_train_loader(self) -> StreamLoader:
        loader = self._make_loader(
            self.train,
            micro_batch_size=self.micro_batch_size,
            start_sample=self.start_sample,
            repeats=self.repeats,
            start_repeat=self._start_repeat,
            **self._order,
            **self._workers,
            **self._stream,
        )
        index = loader.stream.index
        self._contents = {"samples": len(index), "digest": index.digest}
        return loader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Give the ranks of a tensor group one batch, even if a file vanishes between their readings of it."""
        stream = self._train_samples
        if stream is None or stream.on_bad_shard == "error" or self.trainer is None or not self.trainer.training:
            return batch
        mesh = getattr(self.trainer.strategy, "device_mesh", None)
        if mesh is None or mesh["tensor_parallel"].size() == 1:
            return batch
        from nemo_aligner_diffusion.parallel.broadcast import first_of_group

        return first_of_group(batch, mesh["tensor_parallel"].get_group())

    def _compare_contents(self) -> None:
        """The files are those of the checkpoint (else a warning) and of all other ranks (else a DataError)."""
        now, before = self._contents, self._contents_before
        if before is not None and now != before:
            logger.warning(
                "the prompt files are not those of the checkpoint, which had %s samples; now there are %s, or others: "
                "samples are no longer seen exactly once in the epoch under way",
                before["samples"],
                now["samples"],
            )
        if self.trainer is not None and self.trainer.world_size > 1:
            theirs = self.trainer.strategy.broadcast(now)
            if self.trainer.strategy.reduce_boolean_decision(now != theirs, all=False):
                raise DataError(
                    "the ranks do not see the same training files: "
                    f"rank 0 finds {theirs}, rank {self.trainer.global_rank} {'the same' if now == theirs else now}; "
                    "is the same disk mounted on every node?"
                )

    def _batches_processed(self) -> int:
        """Training batches of this rank in the trainer's count, which resuming restores: only differences are used."""
        if self.trainer is None:
            return 0
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


class PromptDataModule(StreamDataModule):
    """The prompts of a training run; ``prompt_key`` is :class:`~.prompts.PromptDataset`'s.

    >>> data = PromptDataModule("prompts-{0000..0012}.tar", micro_batch_size=1, global_batch_size=8)  # doctest: +SKIP
    >>> trainer.fit(model, datamodule=data)  # doctest: +SKIP
    """

    def __init__(
        self, train: PathSpec, validation: PathSpec | None = None, *, prompt_key: str | None = None, **options: Any
    ) -> None:
        super().__init__(train, validation, **options)
        self.prompt_key = prompt_key

    def build_dataset(self, paths: PathSpec, **options: Any) -> PromptDataset:
        return PromptDataset(paths, prompt_key=self.prompt_key, **options)
