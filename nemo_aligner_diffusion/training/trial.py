"""A reward tried once before a run, so that one that cannot be trained on costs no trajectory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from nemo_aligner_diffusion.algorithms.picture_validation import PictureValidation
from nemo_aligner_diffusion.diffusion.generate import generate
from nemo_aligner_diffusion.errors import RewardError

log = logging.getLogger(__name__)


def try_out(module: PictureValidation, prompts: Sequence[str], gradient: bool = True) -> None:
    """Score a micro-batch of pictures of one sampling step, of the size that training's have, and differentiate.

    Args:
        gradient: whether the method needs one.

    Raises:
        RewardError: the scores are of another shape, have no gradient in the pictures, or none of either is finite.
    """
    prompts = list(prompts)[: module.decode_micro_batch_size]
    one_step = replace(module.sampling, steps=1)
    pictures = generate(module.model, prompts, list(range(len(prompts))), one_step, len(prompts))
    with torch.set_grad_enabled(gradient):
        pictures = pictures.to(module.model.device).requires_grad_(gradient)
        scores = module.scores(pictures, prompts)[0]
        found = {"scores": scores.detach()}
        if gradient:
            found["gradients in the pictures"] = torch.autograd.grad(scores.sum(), pictures)[0]
    for what, values in found.items():
        if not values.isfinite().any():
            raise RewardError(
                f"{_name(module)} gave {what} of which none is finite, for {len(prompts)} pictures of one sampling "
                "step that it was tried on; look for a division by zero, a logarithm or a root of 0"
            )
    if gradient and not found["gradients in the pictures"].any():
        log.warning(
            "%s: its gradient in the pictures is zero in a trial on pictures of one sampling step; rounding and "
            "comparisons have none, and where there is none nothing is learnt",
            _name(module),
        )


def _name(module: PictureValidation) -> str:
    return str(getattr(module.reward, "origin", module.reward.name))
