"""What :func:`.tune` gives back: the tuned pipeline, its figures, and pictures before and after."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from nemo_aligner_diffusion.diffusion.generate import generate
from nemo_aligner_diffusion.errors import ConfigurationError, OutputError
from nemo_aligner_diffusion.evaluation.figures import encode_png, picture_grid, save_image
from nemo_aligner_diffusion.runtime.csv_table import read_rows
from nemo_aligner_diffusion.runtime.signals import Interrupted
from nemo_aligner_diffusion.training.export import export_weights

if TYPE_CHECKING:
    from nemo_aligner_diffusion.training.run import Ended


class Tuned:
    """A pipeline that was tuned.

    Attributes:
        pipeline: a plain ``diffusers`` pipeline with what was learnt switched on:
            ``result.pipeline("a red fox", generator=torch.manual_seed(0)).images[0]``; the user's own, if given.
        history: a row of figures for each optimizer step, as in ``metrics.csv``: ``step``, ``reward``, ``kl_penalty``,
            ``loss``, ``grad_norm``, ``lr``, …
        validation: a row for each validation, as in ``validation.csv``.
        interrupted: whether Ctrl-C ended it early.
        run_dir: the run directory; without ``output`` it goes when this object goes.
    """

    def __init__(self, ended: Ended, interrupted: bool, release: Callable[[], object]) -> None:
        module = self._module = ended.module.to(ended.device).eval()  # Lightning has left it on the CPU
        module.trainer = None  # which holds the optimizer
        self.interrupted = interrupted
        self.run_dir = ended.directory
        self.history = _rows(ended.directory / "metrics.csv")
        self.validation = _rows(ended.directory / "validation.csv")
        self._model = module.model
        self._sampling = module.sampling
        self._step = ended.step
        for _, parameter in self._model.trainable_parameters():
            parameter.grad = None
        weakref.finalize(self, release)

    @property
    def pipeline(self) -> Any:
        return self._model.pipe

    def compare(self, prompts: Sequence[str], seeds: Sequence[int] = (0,)) -> Comparison:
        """The base model's picture and the tuned one's, of every prompt with every seed, sampled as in training.

        Args:
            seeds: of ``torch.Generator().manual_seed``; the same noise for both.
        """
        if isinstance(prompts, str) or not prompts or not seeds:
            raise ConfigurationError(
                f"compare({prompts!r}, seeds={seeds!r}): expected a list of prompts and a list of seeds, such as "
                "compare(['a red fox'], seeds=[0, 1])"
            )
        pairs = [(prompt, int(seed)) for prompt in prompts for seed in seeds]
        texts, numbers = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
        tuned = generate(self._model, texts, numbers, self._sampling)
        with self._model.reference():
            base = generate(self._model, texts, numbers, self._sampling)
        return Comparison(texts, numbers, base, tuned, self._score(base, texts), self._score(tuned, texts), self._step)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write what was learnt, for ``load_lora_weights`` (an adapter) or ``from_pretrained`` (every weight).

        Returns:
            the file or folder.
        """
        try:
            path = export_weights(self._model, Path(folder).expanduser(), step=self._step)
        except OSError as error:
            raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
        assert path is not None  # one process holds all
        return path

    def _score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        try:
            return self._module.score(images, prompts).tolist()
        except Interrupted:
            raise KeyboardInterrupt from None


@dataclass(frozen=True)
class Comparison:
    """Pictures ``(N, 3, H, W)`` in [0, 1] before and after, and their rewards; a notebook shows it."""

    prompts: list[str]
    seeds: list[int]
    base: torch.Tensor
    tuned: torch.Tensor
    base_rewards: list[float]
    tuned_rewards: list[float]
    step: int

    @cached_property
    def image(self) -> Image.Image:
        """Base above tuned, prompt and reward with each."""
        title = f"after {self.step} step{'s' if self.step != 1 else ''}"
        rewards = {"base": self.base_rewards, "tuned": self.tuned_rewards}
        pictures = {"base": self.base, "tuned": self.tuned}
        return picture_grid(pictures, self.prompts, rewards=rewards, seeds=self.seeds, title=title)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As PNG; :attr:`image` has a ``save`` for other kinds of file."""
        path = Path(path).expanduser()
        if path.suffix.lower() != ".png":
            raise ConfigurationError(f"save({str(path)!r}): expected a name such as before_after.png")
        return save_image(self.image, path)

    def _repr_png_(self) -> bytes:
        return encode_png(self.image)


def _rows(file: Path) -> list[dict[str, Any]]:
    """A table's rows as numbers; what is missing is ``None``."""
    rows = read_rows(file)[0] if file.is_file() else []
    return [
        {name: int(text) if name == "step" else float(text) if text else None for name, text in row.items()}
        for row in rows
    ]
