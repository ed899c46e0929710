"""Where a run can be taken up again: the newest checkpoint that is whole, and whether it fits what is to be trained."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_aligner_diffusion.errors import CheckpointError, first_line
from nemo_aligner_diffusion.parallel.broadcast import from_first_process
from nemo_aligner_diffusion.runtime.directory import checkpoint_files
from nemo_aligner_diffusion.training.checkpoints.files import read_state, verify
from nemo_aligner_diffusion.training.checkpoints.tree import WEIGHTS

log = logging.getLogger(__name__)

RUN_STATE = "nemo_aligner_diffusion"  # the branch of the saved tree that is this program's own


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that can be read.

    Attributes:
        path: give it to ``trainer.fit(ckpt_path=...)``.
        step: optimizer steps it has behind it; ``step * global_batch_size`` samples are consumed.
        shapes: of the trained parameters, whole, by name.
        optimizer: names of what the groups of its optimizer are set to; empty: unknown.
    """

    path: Path
    step: int
    shapes: Mapping[str, tuple[int, ...]]
    optimizer: tuple[str, ...] = ()


def find_resume_point(folder: Path) -> ResumePoint | None:
    """The newest checkpoint in ``checkpoints/`` that is undamaged, or None if there is none at all.

    A damaged one (truncated, altered, not ours) is passed over with a warning, for the one before. Every byte is
    read; with a process group the first process does so and tells the others.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be read.
    """
    return from_first_process(lambda: _find_resume_point(folder))


def _find_resume_point(folder: Path) -> ResumePoint | None:
    skipped: list[tuple[Path, str]] = []
    for _, path in reversed(checkpoint_files(folder)):
        try:
            step, shapes, optimizer = _inspect(path)
        except Exception as error:  # whatever damage makes of JSON
            skipped.append((path, first_line(error)))
            continue
        for damaged, reason in skipped:
            log.warning("%s cannot be read (%s); resuming from %s instead", damaged, reason, path.name)
        return ResumePoint(path, step, shapes, optimizer)
    if skipped:
        listed = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise CheckpointError(
            f"none of the {len(skipped)} checkpoints in {folder} can be read ({listed}). Restore one, or remove the "
            "folder and start again with exp_manager.resume_ignore_no_checkpoint=True."
        )
    return None


def _inspect(path: Path) -> tuple[int, dict[str, tuple[int, ...]], tuple[str, ...]]:
    started = time.perf_counter()
    checked = verify(path)
    state = read_state(path)
    tree, tensors = state["tree"], state["tensors"]
    if RUN_STATE not in tree:
        raise ValueError("it was not written by this program")
    shapes = {name: tuple(int(length) for length in tensors[name]["shape"]) for name in tree[WEIGHTS]}
    log.info("%s checked: %.1f MB in %.1f s", path.name, checked / 1e6, time.perf_counter() - started)
    groups = [group for state in tree["optimizer_states"] for group in state["param_groups"]]
    return int(tree["global_step"]), shapes, tuple(sorted({str(key) for group in groups for key in group}))


def check_fits(resume: ResumePoint, module: torch.nn.Module) -> None:
    """Compare a checkpoint with what this run trains, before that is cut or sharded.

    Raises:
        CheckpointError: naming the parameters that are missing, extra, or of another shape.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in trained_parameters(module).items()}
    missing = sorted(set(expected) - set(resume.shapes))
    extra = sorted(set(resume.shapes) - set(expected))
    other = [
        f"{name} is {list(resume.shapes[name])} there and {list(shape)} here"
        for name, shape in expected.items()
        if name in resume.shapes and tuple(resume.shapes[name]) != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in (("not in it", missing), ("not trained here", extra), ("of another shape", other))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint {resume.path} does not fit this configuration: {'; '.join(problems)}. Resume with the "
            "settings in its config.yaml (model.peft above all), or give another exp_manager.explicit_log_dir."
        )


def check_moments(saved: Collection[str], optimizer: str) -> None:
    """Whether ``model.optim.name`` can go on with the state that a checkpoint holds: Adams with Adams', sgd with sgd's.

    Args:
        saved: names of what the groups of the checkpoint's optimizer are set to.

    Raises:
        CheckpointError: it cannot.
    """
    if saved and ("betas" in saved) == (optimizer == "sgd"):
        raise CheckpointError(
            f"model.optim.name = {optimizer}, but the checkpoint holds the moments of "
            f"{'an Adam' if 'betas' in saved else 'sgd'}, which it cannot go on with: resume with the model.optim.name "
            "of its config.yaml, or begin a run of its own with another exp_manager.explicit_log_dir"
        )


def trained_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """By every name they have."""
    named = module.named_parameters(remove_duplicate=False)  # a shared parameter has several names in a state dict
    return {name: parameter for name, parameter in named if parameter.requires_grad}
