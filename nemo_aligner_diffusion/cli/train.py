"""The command line of the training scripts: options, help, and errors without a traceback."""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.command_line import Parser
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest
from nemo_aligner_diffusion.runtime.ending import command, end
from nemo_aligner_diffusion.runtime.startup import Startup

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from nemo_aligner_diffusion.runtime.signals import Interruption
    from nemo_aligner_diffusion.training.settings import ProgramSettings

TOO_EARLY = "interrupted before training began"

USED_MOST = """\
  algorithm=leapalign                         the method; a rule of your own:
                                              model.algorithm=my_module:MyRule
  model.kl_coeff=0.1                          weight of the KL penalty; 0: none
  model.truncation_steps=1                    last steps with gradient (draft+)
  model.drtune.train_steps=4                  steps with gradient (drtune)
  model.optim.lr=3e-4                         learning rate
  model.micro_batch_size=8                    pictures a process handles at once
  model.global_batch_size=8                   pictures an optimizer step
  model.infer.inference_steps=20              sampling steps
  model.infer.unconditional_guidance_scale=3  classifier-free guidance
  model.peft.peft_scheme=sdlora               sdlora: LoRA; none: every weight
  model.from_pretrained=FOLDER                whole model: folder, hub id, file
  model.unet_config.from_pretrained=FILE      your denoiser
  model.first_stage_config.from_pretrained=FILE
                                              your VAE
  rm.model.restore_from_path=FILE.nemo        your reward
  model.data.train.webdataset.local_root_path='prompts-{0000..0127}.tar'
                                              your prompts, or pairs of pictures
  model.dpo.beta=5000                         β (dpo; dde, discounted likewise)
  model.preference.steps=[200,700]            noise levels trained (pairs)
  trainer.devices=1 trainer.num_nodes=1 trainer.precision=32
  trainer.draftp_sd.max_steps=60 trainer.draftp_sd.val_check_interval=20
  exp_manager.explicit_log_dir=results/mine   the run directory
  exp_manager.resume_if_exists=true           go on where the run stands"""


def parse_arguments(
    config_name: str, argv: Sequence[str], parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Hydra's options and, in any order among them, dotted ``overrides``.

    Args:
        config_name: where the command line names none.
        parser: with options of a program's own; one without any by default.

    Raises:
        ConfigurationError: an option that does not exist or lacks its value.
    """
    parser = parser or Parser(add_help=False)
    parser.usage = "%(prog)s [key=value …] [options]"
    parser.add_argument("--config-name", "-cn", metavar="NAME", default=config_name, help=f"default: {config_name}")
    parser.add_argument("--config-path", "-cp", "--config-dir", "-cd", metavar="FOLDER", help="of your own YAML")
    parser.add_argument("--cfg", "-c", action="store_true", dest="show_config", help="show the configuration and exit")
    parser.add_argument("--help", "-h", action="store_true", dest="show_help", help="show this text and exit")
    parser.add_argument("--resolve", action="store_true", help=argparse.SUPPRESS)  # it is always shown resolved
    arguments, words = parser.parse_known_args(["--cfg" if word.startswith("--cfg=") else word for word in argv])
    if arguments.show_config:
        words = [word for word in words if word not in ("job", "all", "hydra")]  # Hydra's --cfg job
    options = set(re.findall(r"--[a-z-]+", parser.format_help()))
    for word in words:
        if word.startswith("-"):
            hint = closest(word, options) or ": expected key=value or an option;"
            raise ConfigurationError(f"unknown option {word!r}{hint} {parser.prog} --help lists all")
    arguments.overrides = words
    return arguments


def _recipes_and_keys() -> str:
    from nemo_aligner_diffusion.config.recipes import groups, recipes

    def table(rows: Mapping[str, str]) -> list[str]:
        column = 4 + max(map(len, rows))
        width = min(max(shutil.get_terminal_size().columns, 80), 120)
        return [
            textwrap.fill(text, width, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column,
                          break_on_hyphens=False)
            for name, text in rows.items()
        ]  # fmt: skip

    lines = [
        "recipes (--config-name):",
        *table(recipes()),
        "",
        "groups (group=option):",
        *table({group: ", ".join(options) for group, options in groups().items()}),
        "",
        "keys used most, with example values:",
        USED_MOST,
        "",
        "All keys with their meaning: docs/configuration.md, and the comments in conf/.",
        "NeMo-Aligner's are understood.",
    ]
    return "\n".join(lines)


def main(config_name: str, argv: Sequence[str] | None = None) -> int:
    """Run a training script.

    Args:
        config_name: the script's recipe, which ``--config-name`` may change.
        argv: words of the command line; None: the process's.

    Returns:
        The exit status: 0, or the ``exit_code`` of the error that was printed.
    """
    startup = Startup()
    startup.enter("configuration")
    return command(TOO_EARLY)(lambda words: _main(config_name, words, startup))(argv)


def _main(config_name: str, argv: Sequence[str], startup: Startup) -> int:
    parser = Parser(
        "Trains a text-to-image model on a reward, or on pairs of pictures.\n"
        "Without any argument: embedded model, reward, prompts; its own pairs.",
        add_help=False,
    )
    arguments = parse_arguments(config_name, argv, parser)
    if arguments.show_help:
        parser.epilog = _recipes_and_keys()
        parser.print_help()
        return 0
    from nemo_aligner_diffusion.config.load import load_config
    from nemo_aligner_diffusion.training.settings import RunSettings

    shows = arguments.show_config
    cfg = load_config(arguments.config_name, arguments.overrides, arguments.config_path, config_name, fetch=not shows)
    if shows:
        show(cfg)
        return 0

    def run(interruption: Interruption) -> int:
        startup.enter("imports")
        from nemo_aligner_diffusion.training.run import run_training

        return run_training(cfg, interruption, startup)

    return launch(RunSettings.of(cfg), run)


def show(cfg: DictConfig) -> None:
    """``--cfg``."""
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(cfg), end="")


def launch(settings: ProgramSettings, run: Callable[[Interruption], int]) -> int:
    """Start the processes of a run where nobody has, or be one of them.

    Args:
        run: imports torch and all, and trains; signals are taken from here on.

    Returns:
        the exit status.
    """
    from nemo_aligner_diffusion.runtime.launch import start_processes
    from nemo_aligner_diffusion.runtime.messages import log_to_screen
    from nemo_aligner_diffusion.runtime.process import check_agrees, this_process
    from nemo_aligner_diffusion.runtime.signals import Interrupted, Interruption
    from nemo_aligner_diffusion.runtime.slurm import Requeue

    section, process = settings.exp_manager, this_process()
    devices, nodes = settings.trainer.devices_per_node, settings.trainer.num_nodes
    check_agrees(process, devices, nodes)
    code = start_processes(devices, nodes)
    if code is not None:
        return code
    interruption = Interruption()
    interruption.speaks = process.is_rank_zero
    with interruption:
        try:
            code = run(interruption)
            if not interruption.speaks:  # loggers and the like are the first process's
                end(code)
            return code
        except Interrupted:
            log_to_screen()  # it may not have come to that
            if interruption.speaks:
                print(TOO_EARLY, file=sys.stderr)
            requeue = Requeue.for_this_run(section, section, is_writer=process.is_rank_zero)
            if requeue is None:
                return interruption.exit_code
            interruption.dismiss()
            requeue.leave(interruption.reason)
            return requeue.exit_code(interruption.exit_code)


# Console commands
train = train_draftp = functools.partial(main, "draftp_sd")
train_drtune = functools.partial(main, "drtune_sd")
