"""``train_reward_model.py``: options, help, and errors without a traceback. ``--help`` imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.cli.train import exit_status, launch, parse_arguments, show

if TYPE_CHECKING:
    from nemo_aligner_diffusion.runtime.signals import Interruption


def help_text(program: str) -> str:
    """Usage, and every key with its default and meaning."""
    from nemo_aligner_diffusion.reward_training.configuration import documented_keys

    lines = [
        f"usage: {program} [key=value …] [--config-name NAME --config-path FOLDER] [--cfg] [--help]",
        "",
        "Trains a CLIP on preferences between pictures; export/reward.nemo is a reward for the diffusion trainers.",
        "",
        f"example: {program} model.data.train.webdataset.local_root_path=preferences/train \\",
        "             model.data.validation.webdataset.local_root_path=preferences/validation \\",
        "             exp_manager.explicit_log_dir=results/reward",
        "",
        "keys, with their defaults:",
        *(f"  {f'{key}={value}':<58} {comment}" for key, value, comment in documented_keys()),
        "",
        "--config-name NAME --config-path FOLDER  a YAML of your own over these",
        "--cfg                                    show the whole configuration and exit",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or the ``exit_code`` of the error that was printed."""
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: _main(words), is_whole_program=argv is None)


def _main(argv: Sequence[str]) -> int:
    from nemo_aligner_diffusion.reward_training.configuration import (
        CONFIG_NAME,
        RewardTrainingSettings,
        load_reward_config,
    )

    arguments = parse_arguments(CONFIG_NAME, argv)
    if arguments.show_help:
        print(help_text(os.path.basename(sys.argv[0]) or "train_reward_model.py"))
        return 0
    cfg = load_reward_config(arguments.overrides, arguments.config_name, arguments.config_path)
    if arguments.show_config:
        show(cfg)
        return 0

    def run(interruption: Interruption) -> int:
        from nemo_aligner_diffusion.reward_training.run import run_reward_training  # torch and all, only now

        return run_reward_training(cfg, interruption)

    return launch(RewardTrainingSettings.of(cfg), run)
