"""Base against tuned on fixed prompts and seeds: the prompts, and the files and figures that come of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from nemo_aligner_diffusion.algorithms.picture_validation import PictureValidation, ValidationPictures
from nemo_aligner_diffusion.evaluation.figures import picture_grid, save_image
from nemo_aligner_diffusion.runtime.files import write_atomic


def validation_loader(
    prompts: Sequence[str], seeds: Sequence[int], batch_size: int, rank: int, world_size: int
) -> DataLoader[Any]:
    """Batches ``{"prompts": [...], "seeds": [...], "rows": [...]}`` of this rank's share of all (prompt, seed) pairs.

    Seeds of a prompt stand together. Every rank gets equally many pairs: the last ones wrap around, and a row that
    comes twice is the same picture twice.
    """
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    share = -(-len(pairs) // world_size)
    rows = [(rank + world_size * i) % len(pairs) for i in range(share)]
    batches = []
    for start in range(0, share, batch_size):
        chosen = rows[start : start + batch_size]
        texts, numbers = zip(*(pairs[row] for row in chosen), strict=True)
        batches.append({"prompts": list(texts), "seeds": list(numbers), "rows": chosen})
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class ValidationFiles(pl.Callback):
    """Writes ``samples/step_NNNNNN.png`` and ``validation_samples.json``.

    Args:
        run_dir: the run directory.
        max_prompts: prompts in the grid (all their seeds are shown).
    """

    def __init__(self, run_dir: Path, max_prompts: int) -> None:
        self.run_dir = run_dir
        self.max_prompts = max_prompts

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PictureValidation)
        pictures = pl_module.validation_pictures
        if pictures is None or not trainer.is_global_zero:
            return
        step = trainer.global_step
        self._write_grid(pictures, step, pl_module.reward.measures)
        rows = [
            {"prompt": prompt, "seed": seed, "base_reward": base, "reward": tuned}
            for prompt, seed, base, tuned in zip(
                pictures.prompts, pictures.seeds, pictures.base_rewards, pictures.tuned_rewards, strict=True
            )
        ]
        text = json.dumps({"step": step, "prompts": rows}, indent=1, ensure_ascii=False)
        write_atomic(self.run_dir / "validation_samples.json", text + "\n")

    def _write_grid(self, pictures: ValidationPictures, step: int, rewarded: bool) -> None:
        shown = list(dict.fromkeys(pictures.prompts))[: self.max_prompts]
        rows = [row for row, prompt in enumerate(pictures.prompts) if prompt in shown]
        grid = picture_grid(
            {"base": pictures.base[rows], "tuned": pictures.tuned[rows]},
            [pictures.prompts[row] for row in rows],
            rewards={
                "base": [pictures.base_rewards[row] for row in rows],
                "tuned": [pictures.tuned_rewards[row] for row in rows],
            }
            if rewarded
            else None,
            seeds=[pictures.seeds[row] for row in rows],
            title=f"step {step}",
        )
        save_image(grid, self.run_dir / "samples" / f"step_{step:06d}.png")
