"""What every configuration key accepts, gathered from the classes of settings. Defaults live in ``conf/``, too."""

from __future__ import annotations

import functools

from nemo_aligner_diffusion.algorithms.registry import method_keys
from nemo_aligner_diffusion.config.layers import Vocabulary
from nemo_aligner_diffusion.config.nemo_names import ALIASES
from nemo_aligner_diffusion.config.recipes import recipes
from nemo_aligner_diffusion.rewards.registry import reward_keys, rewards, sections_of
from nemo_aligner_diffusion.settings import Kind
from nemo_aligner_diffusion.training.settings import RunSettings

KEYS: dict[str, Kind] = {**RunSettings.schema(), **method_keys(), **reward_keys()}
# Each reward and the entries of `rm` that it reads.
REWARDS: dict[str, set[str]] = {name: sections_of(name) for name in rewards()}


@functools.cache
def vocabulary(loop: str) -> Vocabulary:
    """The keys of a recipe, whose name the training loop's section carries (``trainer.draftp_sd.x``).

    Another recipe's name there means this one, too.
    """
    return Vocabulary(KEYS, ALIASES, loop, set(recipes()), nemos=True)
