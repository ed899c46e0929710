"""The settings of learning from pairs (``model.preference``): what becomes of pictures and labels. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.settings import BOOL, PART, Kind, Settings, choice, integer, number, part, setting


@dataclass(frozen=True)
class SelfMadeSettings(Settings):
    """Pairs that the embedded model makes itself, where no shards are named; each two seeds of a prompt are a pair."""

    section = "model.preference.self_made"

    labeller: str = setting(
        "colourfulness",
        Kind("text"),
        "what prefers: a reward without files: colourfulness, symmetry, clip (the embedded CLIP) …",
    )
    label_noise: float = setting(0.0, PART, "share of the labels that are turned round, keyed by pair; in [0, 1]")
    tie_margin: float | None = setting(
        None, number(0, nullable=True), "scores closer than this are a tie; in the labeller's units, null: its own"
    )
    prompts: int = setting(100, integer(1), "prompts, drawn from those embedded for training; integer >= 1")
    seeds: int = setting(4, integer(2), "pictures n of each prompt, n(n-1)/2 pairs; integer >= 2")
    steps: int = setting(10, integer(1), "sampling steps of these pictures, without guidance; integer >= 1")


@dataclass(frozen=True)
class PairSettings(Settings):
    """Learning from preferences between two pictures of a prompt."""

    section = "model.preference"
    title = "Preferences"

    pairs: str = setting(
        "shards",
        choice("shards", "online"),
        "shards, or online: two pictures of each prompt by the model as it stands, the reward (rm) prefers one",
    )
    steps: tuple[int, int] | None = setting(
        None,
        Kind("ints", low=0, length=2, nullable=True),
        "[first, end]: noise levels t that are trained, first <= t < end, of 1000 as a rule; null: all",
    )
    label_smoothing: float = setting(
        0.0,
        Kind("float", low=0, high=0.5, open_high=True),
        "probability that a label is wrong (conservative DPO); in [0, 0.5)",
    )
    crop: str = setting(
        "center",
        choice("center", "random"),
        "of a picture whose short side is resized to the model's: its middle, or a place keyed by seed and sample",
    )
    flip: bool = setting(False, BOOL, "mirror each picture with probability 1/2, keyed by seed and sample")
    vae_sample: bool = setting(
        True, BOOL, "latents: a sample of the VAE's posterior for each use, as Diffusion-DPO's code; false: its mode"
    )
    tie_weight: float = setting(
        0.0, PART, "weight of a pair with equal shares; in [0, 1], 0: left out when the shards are indexed"
    )
    self_made: SelfMadeSettings = part(SelfMadeSettings)
