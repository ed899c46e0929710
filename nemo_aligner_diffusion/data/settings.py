"""The settings of prompts and of reading shards (``model.data``). No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nemo_aligner_diffusion.settings import PATH, PATHS, Kind, Settings, choice, integer, number, setting

OnBad = Literal["error", "skip"]


@dataclass(frozen=True)
class ReadingSettings(Settings):
    """How shards are read."""

    section = "model.data"

    num_workers: int = setting(
        0, integer(0), "processes that read prompts beside the training; integer >= 0; 0 suits local disks"
    )
    shuffle_buffer: int = setting(
        10000, integer(0), "prompts shuffled together; integer >= 0; 0: the order of the files and in them"
    )
    on_bad_sample: OnBad = setting(
        "error", choice("error", "skip"), "an unusable prompt: error stops the run, skip warns, counts and goes on"
    )
    on_bad_shard: OnBad | None = setting(
        None,
        choice("error", "skip", nullable=True),
        "a shard that is unreadable, damaged or vanishes: error or skip; null: as on_bad_sample",
    )
    index_folder: str | None = setting(
        None, PATH, "where indexes of shards are kept; a path, null: ~/.cache/nemo_aligner_diffusion/shard_index"
    )
    worker_timeout_seconds: float = setting(
        600.0, number(0), "longest wait for a batch of num_workers, then the run stops; >= 0; 0: no limit"
    )
    train_path: str | tuple[str, ...] | None = setting(
        None,
        PATHS,
        "a path, folder, list, glob or brace range such as prompts-{0000..0127}.tar; null: the embedded prompts",
        key="model.data.train.webdataset.local_root_path",
    )

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of :class:`~.datamodule.StreamDataModule`."""
        return {name: getattr(self, name) for name in ReadingSettings.kinds() if name != "train_path"}


@dataclass(frozen=True)
class PromptSettings(ReadingSettings):
    """Prompts: webdataset shards (.tar) or plain text files (one prompt a line)."""

    title = "Prompts"

    prompt_key: str | None = setting(
        None,
        Kind("text", nullable=True),
        "where the prompt is in .json members, of a list its first text; text, null: prompt, else caption",
    )
    validation_path: str | tuple[str, ...] | None = setting(
        None,
        PATHS,
        "as above; null: the first training prompts; without any, the embedded ones",
        key="model.data.validation.webdataset.local_root_path",
    )
    prompts: tuple[str, ...] | None = setting(
        None,
        Kind("texts", nullable=True),
        "a list of prompts in place of files; list of text, null: read the files",
        key="model.data.validation.prompts",
    )
    max_prompts: int = setting(
        24, integer(1), "the first so many are used; integer >= 1", key="model.data.validation.max_prompts"
    )
    seeds: tuple[int, ...] = setting(
        (0, 1),
        Kind("ints", low=0),
        "one picture for each prompt and seed; list of integers >= 0",
        key="model.data.validation.seeds",
    )
