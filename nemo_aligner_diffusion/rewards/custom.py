"""A user's own reward, named by its import path in the user's configuration.

The path is Python code that will run: it is taken from the user's YAML or command line only, never from an archive, and
not from the ``config.yaml`` of a run directory, which may be somebody else's.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import RewardError, first_line
from nemo_aligner_diffusion.rewards.base import Reward, check_images
from nemo_aligner_diffusion.rewards.micro_batches import own_precision

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class CustomReward(Reward):
    """A :class:`Reward`, an ``nn.Module`` or any callable ``(images, prompts) -> (B,)``, held to the protocol.

    Modules are frozen and moved along with the reward, also those that a plain object holds as attributes. Pictures
    come in float32 (or float64) with autocast off; what to compute in is the reward's own decision.

    Args:
        judge: what scores.
        origin: where it came from, for messages.
    """

    name = "custom"

    def __init__(self, judge: Callable[..., Any], origin: str = "the custom reward") -> None:
        super().__init__()
        if not callable(judge):
            raise RewardError(
                f"{origin} is a {type(judge).__name__}; expected a Reward, an nn.Module, or a callable "
                "(images, prompts) -> one score for each picture."
            )
        self.judge = judge
        self.origin = origin
        held = [] if isinstance(judge, nn.Module) else vars(judge).values() if hasattr(judge, "__dict__") else []
        self.held = nn.ModuleList(module for module in held if isinstance(module, nn.Module))
        self._checked_gradient = False
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        check_images(images, prompts)
        if images.dtype != torch.float64:
            images = images.float()
        parts: dict[str, Tensor] = {}
        with own_precision(images.device.type):
            if isinstance(self.judge, Reward):
                score, parts = self.judge.scores(images, prompts)
            else:
                score = self.judge(images, prompts)
        self._check(score, images)
        score = score if score.dtype == torch.float64 else score.float()
        return score, parts if len(parts) > 1 else {self.name: score}

    def _check(self, score: Any, images: Tensor) -> None:
        if not isinstance(score, Tensor):
            raise RewardError(f"{self.origin} gave a {type(score).__name__}; expected a tensor ({len(images)},).")
        if score.shape != (len(images),) or not score.is_floating_point():
            raise RewardError(
                f"{self.origin} gave {tuple(score.shape)} {score.dtype} for {len(images)} pictures; expected one "
                f"floating-point score for each, ({len(images)},)."
            )
        if not (images.requires_grad and torch.is_grad_enabled()):
            return
        if not score.requires_grad:
            raise RewardError(self._without_gradient())
        if not self._checked_gradient:  # it may come from elsewhere than the pictures; one look is enough
            (gradient,) = torch.autograd.grad(score.sum(), images, retain_graph=True, allow_unused=True)
            if gradient is None:
                raise RewardError(self._without_gradient())
            self._checked_gradient = True

    def _without_gradient(self) -> str:
        return (
            f"{self.origin} gave scores without a gradient in the pictures, so there is nothing to train on. Something "
            "in it cuts the graph: torch.no_grad or inference_mode, .detach(), .item(), torch.tensor(…), a comparison, "
            "argmax, or a way through NumPy or PIL. Compute the score from the given images with torch operations."
        )


def load_custom(import_path: str, kwargs: Mapping[str, Any] | None = None, where: str = "rm") -> CustomReward:
    """The reward at ``package.module:name``.

    A class is called with ``kwargs`` and gives the reward. A function *is* the reward, ``kwargs`` are handed to it as
    keyword arguments with each call. Anything else callable is the reward as it stands, without ``kwargs``. The current
    directory is searched after everything that is installed.

    Raises:
        RewardError: the path cannot be imported, or what stands there cannot be a reward.
    """
    origin = f"{where}.import_path = {import_path!r}"
    found = _import(import_path, origin)
    settings = dict(kwargs or {})
    if inspect.isclass(found):
        try:
            judge: Any = found(**settings)
        except Exception as error:
            given = ", ".join(settings) or "no kwargs"
            raise RewardError(
                f"{origin}: {found.__name__}({given}) failed with {type(error).__name__}: {first_line(error)}. Its "
                f"arguments are {where}.kwargs."
            ) from error
    elif inspect.isroutine(found):
        _check_call(found, settings, origin, where)
        judge = functools.partial(found, **settings) if settings else found
    elif settings:
        raise RewardError(f"{origin} is an object already made; {where}.kwargs go to a class or a function only.")
    else:
        judge = found
    return CustomReward(judge, origin)


def _import(import_path: str, origin: str) -> Any:
    if not _PATH.fullmatch(import_path):
        raise RewardError(f"{origin}: expected package.module:name, such as my_rewards:Redness.")
    module_name, _, name = import_path.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: a file of the user's never hides an installed package
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise RewardError(f"{origin}: importing it needs {error.name!r}, which is not installed.") from error
        raise RewardError(
            f"{origin}: there is no module {error.name!r}. It must be installed, or lie in the current directory "
            f"({here}) or in one of PYTHONPATH."
        ) from error
    except Exception as error:  # the module is the user's: anything may happen
        raise RewardError(
            f"{origin}: importing {module_name} failed with {type(error).__name__}: {first_line(error)}"
        ) from error
    for step in name.split("."):
        if not hasattr(found, step):
            near = difflib.get_close_matches(step, [entry for entry in dir(found) if not entry.startswith("_")], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise RewardError(f"{origin}: {module_name} has no {name!r}{hint}")
        found = getattr(found, step)
    return found


def _check_call(function: Callable[..., Any], settings: Mapping[str, Any], origin: str, where: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin that does not tell
    try:
        signature.bind(None, None, **settings)
    except TypeError as error:
        raise RewardError(
            f"{origin} cannot be called as (images, prompts{''.join(f', {key}=…' for key in settings)}): {error}. Its "
            f"signature is {signature}; keyword arguments are {where}.kwargs."
        ) from error
