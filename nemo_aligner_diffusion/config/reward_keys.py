"""The keys of ``rm``, derived from the rewards' settings. Imports nothing heavy."""

from __future__ import annotations

from nemo_aligner_diffusion.rewards.registry import reward_keys, rewards, sections_of
from nemo_aligner_diffusion.settings import Kind

# Each reward and the entries of `rm` that it reads.
REWARDS: dict[str, set[str]] = {name: sections_of(name) for name in rewards()}
REWARD_KEYS: dict[str, Kind] = reward_keys()
