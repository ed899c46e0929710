"""The command line of the training scripts: options, help, and errors without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError
from nemo_aligner_diffusion.runtime.ending import EndAtExit, end, is_first_to_say, write_error_file
from nemo_aligner_diffusion.runtime.startup import Startup
from nemo_aligner_diffusion.streams import take_screen

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from nemo_aligner_diffusion.runtime.signals import Interruption
    from nemo_aligner_diffusion.training.settings import ProgramSettings

_TOO_EARLY = "interrupted before training began"

USED_MOST = """\
  algorithm=leapalign                         the method; model.algorithm=my_module:MyRule: your own
  model.kl_coeff=0.1                          weight of the KL penalty; 0: none
  model.truncation_steps=1                    last sampling steps that get a gradient (draft_k, draft+)
  model.drtune.train_steps=4                  sampling steps that get a gradient (drtune)
  model.optim.lr=3e-4                         learning rate
  model.micro_batch_size=8                    pictures a process handles at once
  model.global_batch_size=8                   pictures an optimizer step
  model.infer.inference_steps=20              sampling steps
  model.infer.unconditional_guidance_scale=3  classifier-free guidance
  model.peft.peft_scheme=sdlora               sdlora: LoRA; none: every weight
  model.unet_config.from_pretrained=FILE      your denoiser; model.from_pretrained=FOLDER: your whole model
  model.first_stage_config.from_pretrained=FILE   your VAE
  rm.model.restore_from_path=FILE.nemo        your reward
  model.data.train.webdataset.local_root_path='prompts-{0000..0127}.tar'   your prompts
  trainer.devices=1 trainer.num_nodes=1 trainer.precision=32
  trainer.draftp_sd.max_steps=60 trainer.draftp_sd.val_check_interval=20
  exp_manager.explicit_log_dir=results/mine   the run directory
  exp_manager.resume_if_exists=true           go on where the run directory stands"""


@dataclass
class Arguments:
    """What the command line says. ``config_path`` is relative to the current folder."""

    config_name: str
    config_path: str | None = None
    show_help: bool = False
    show_config: bool = False
    overrides: list[str] = field(default_factory=list)


def parse_arguments(config_name: str, argv: Sequence[str]) -> Arguments:
    """Hydra's options (``--config-name``, ``--config-path``, ``--cfg``) and dotted overrides, in any order.

    Raises:
        ConfigurationError: an option that does not exist or lacks its value.
    """
    result = Arguments(config_name)
    words = list(argv)
    while words:
        word = words.pop(0)
        option, separator, value = word.partition("=")
        if option in ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd"):
            if not separator:
                if not words:
                    raise ConfigurationError(f"{option} needs a value")
                value = words.pop(0)
            if option in ("--config-name", "-cn"):
                result.config_name = value
            else:
                result.config_path = value
        elif option in ("--cfg", "-c"):
            if not separator and words and words[0] in ("job", "all", "hydra"):
                words.pop(0)
            result.show_config = True
        elif word in ("--help", "-h"):
            result.show_help = True
        elif word == "--resolve":
            pass  # the configuration is always shown resolved
        elif word.startswith("-"):
            raise ConfigurationError(
                f"unknown option {word!r}: expected key=value, --config-name NAME, --config-path FOLDER, --cfg, "
                "or --help"
            )
        else:
            result.overrides.append(word)
    return result


def help_text(program: str, config_name: str) -> str:
    """Usage, recipes, groups and the keys used most."""
    from nemo_aligner_diffusion.config.recipes import groups, recipes

    lines = [
        f"usage: {program} [key=value …] [group=option …] [--config-name NAME] [--config-path FOLDER] [--cfg] [--help]",
        "",
        "Trains a text-to-image model on a reward. Without any argument: the embedded model, reward and prompts.",
        "",
        f"recipes (--config-name; here {config_name}):",
        *(f"  {name:<14} {text}" for name, text in recipes().items()),
        "",
        "groups (group=option):",
        *(f"  {group:<14} {', '.join(options)}" for group, options in groups().items()),
        "",
        "keys used most, with example values:",
        USED_MOST,
        "",
        "--config-name NAME --config-path FOLDER  your own YAML; NeMo-Aligner's keys are understood",
        "--cfg                                    show the whole resolved configuration and exit",
        "All keys with their meaning: docs/configuration.md, and the comments in conf/.",
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
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: _main(config_name, words, startup), is_whole_program=argv is None)


def _main(config_name: str, argv: Sequence[str], startup: Startup) -> int:
    arguments = parse_arguments(config_name, argv)
    if arguments.show_help:
        print(help_text(os.path.basename(sys.argv[0]) or "train", arguments.config_name))
        return 0
    from nemo_aligner_diffusion.config.load import load_config
    from nemo_aligner_diffusion.training.settings import RunSettings

    cfg = load_config(arguments.config_name, arguments.overrides, config_dir=arguments.config_path, recipe=config_name)
    if arguments.show_config:
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


def exit_status(program: Callable[[], int], is_whole_program: bool) -> int:
    """Call ``program``; an error of the user's is one line on the screen, and an exit code.

    Args:
        is_whole_program: its exit status will be the process's; nothing of the caller's follows.
    """
    if is_whole_program:
        take_screen()
    ending = EndAtExit()  # before anything that registers what is to come before it
    try:
        code = program()
        ending.code = code if is_whole_program else None
        return code
    except AlignerError as error:
        if not error.said and is_first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr)
        write_error_file(f"error: {error}")
        end(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:  # while loading: nothing has been trained, there is nothing to close
        print(_TOO_EARLY, file=sys.stderr)
        return 130


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
                print(_TOO_EARLY, file=sys.stderr)
            requeue = Requeue.for_this_run(section, section, is_writer=process.is_rank_zero)
            if requeue is None:
                return interruption.exit_code
            interruption.dismiss()
            requeue.leave(interruption.reason)
            return requeue.exit_code(interruption.exit_code)


def train() -> int:
    """Console command ``nad-train``: any recipe by ``--config-name``."""
    return main("draftp_sd")


def train_draftp() -> int:
    """Console command ``nad-train-draftp``."""
    return main("draftp_sd")


def train_drtune() -> int:
    """Console command ``nad-train-drtune``."""
    return main("drtune_sd")
