"""``normalize: base``: the scale of a reward's parts, measured once on the base model's pictures, before training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from nemo_aligner_diffusion.algorithms.picture_validation import PictureValidation
from nemo_aligner_diffusion.rewards.support.parted import (
    STATISTICS_FILE,
    PartedReward,
    apply_statistics,
    known_statistics,
    parted_rewards,
    statistics_of,
)
from nemo_aligner_diffusion.runtime.files import write_atomic

log = logging.getLogger(__name__)


class RewardNormalization(pl.Callback):
    """Measures what is not known yet before the first step, and keeps it in the run directory and the checkpoints.

    The mean and the standard deviation of each part's raw score are taken over all validation prompts and seeds, by the
    base model. A resumed run goes on with the figures that it began with; of a part whose settings have changed they
    are measured again.

    Args:
        run_dir: gets ``reward_normalization.json``: ``{"rm.parts.<part>": {"mean": …, "std": …, "of": …}}``.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.statistics: dict[str, dict[str, Any]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": self.statistics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.statistics = state_dict["statistics"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PictureValidation)
        apply_statistics(pl_module.reward, self.statistics)
        for parted in parted_rewards(pl_module.reward):
            for part in parted.unmeasured():
                parted.statistics[part] = statistics_of(
                    parted.place(part), self._raw_scores(trainer, pl_module, parted, part)
                )
                if trainer.is_global_zero:
                    log.info(
                        "%s: mean %.5g, standard deviation %.5g over the base model's pictures",
                        parted.place(part),
                        *parted.statistics[part],
                    )
        self.statistics = known_statistics(pl_module.reward)
        if self.statistics and trainer.is_global_zero:
            text = json.dumps(self.statistics, indent=1, ensure_ascii=False)
            write_atomic(self.run_dir / STATISTICS_FILE, text + "\n")

    on_validation_start = on_train_start  # a run that is resumed at its last step trains no more

    def _raw_scores(self, trainer: pl.Trainer, module: PictureValidation, parted: PartedReward, part: str) -> Tensor:
        """``(N,)``: of every (prompt, seed) pair once, in order; ranks share the work."""
        rows: list[int] = []
        scores: list[Tensor] = []
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            images = module.base_images(batch).to(module.device)
            with torch.no_grad():
                scores.append(parted.part(part)(images, batch["prompts"]))
            rows += batch["rows"]
        mine = {"rows": torch.tensor(rows, device=module.device), "scores": torch.cat(scores).double()}
        if trainer.world_size > 1:
            gathered: Any = module.all_gather(mine)
            mine = {name: value.flatten() for name, value in gathered.items()}
        by_row = dict(zip(mine["rows"].tolist(), mine["scores"].tolist(), strict=True))
        return torch.tensor([by_row[row] for row in sorted(by_row)], dtype=torch.float64)
