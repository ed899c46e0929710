"""``train_reward_model.py``: options, help, and errors without a traceback. ``--help`` imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.cli.train import TOO_EARLY, launch, parse_arguments, show
from nemo_aligner_diffusion.command_line import Parser
from nemo_aligner_diffusion.config.recipes import conf_directory
from nemo_aligner_diffusion.runtime.ending import command

if TYPE_CHECKING:
    from nemo_aligner_diffusion.runtime.signals import Interruption

EXAMPLE = """\
example: %(prog)s model.data.train.webdataset.local_root_path=preferences/train \\
             model.data.validation.webdataset.local_root_path=preferences/validation \\
             exp_manager.explicit_log_dir=results/reward

keys, with their defaults (model.optim.lr=1e-4 sets lr of optim of model):

"""


@command(TOO_EARLY)
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = Parser(
        "Trains a CLIP on preferences between pictures; export/reward.nemo is a reward for the diffusion trainers.",
        add_help=False,
    )
    arguments = parse_arguments("reward_model", argv, parser)
    if arguments.show_help:
        keys = (conf_directory() / "reward_model.yaml").read_text(encoding="utf-8")
        parser.epilog = EXAMPLE + keys.replace("%", "%%")
        parser.print_help()
        return 0
    from nemo_aligner_diffusion.reward_training.configuration import RewardTrainingSettings, load_reward_config

    cfg = load_reward_config(arguments.overrides, arguments.config_name, arguments.config_path)
    if arguments.show_config:
        show(cfg)
        return 0

    def run(interruption: Interruption) -> int:
        from nemo_aligner_diffusion.reward_training.run import run_reward_training  # torch and all, only now

        return run_reward_training(cfg, interruption)

    return launch(RewardTrainingSettings.of(cfg), run)
