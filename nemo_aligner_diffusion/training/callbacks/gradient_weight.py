"""``gradient_weight.csv``: how much pairs have counted at each noise level, of a run that learns from pairs."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from nemo_aligner_diffusion.algorithms.preference.module import PreferenceTuning
from nemo_aligner_diffusion.evaluation.run_files import LEVELS_FILE
from nemo_aligner_diffusion.runtime.files import write_atomic


class GradientWeightFile(pl.Callback):
    """Written with each validation and at the end; of other modules nothing."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, PreferenceTuning) or not trainer.is_global_zero:
            return
        width = pl_module.calls.levels.size / len(pl_module.weight_by_level)
        lines = ["t,pairs,gradient_weight\n"]
        for place, (pairs, total) in enumerate(pl_module.weight_by_level.tolist()):
            mean = repr(total / pairs) if pairs else "nan"
            lines.append(f"{(place + 0.5) * width:g},{pairs:.0f},{mean}\n")
        write_atomic(self.run_dir / LEVELS_FILE, "".join(lines))

    on_train_end = on_validation_end
