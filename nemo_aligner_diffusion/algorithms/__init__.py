"""What is supervised: one short file per method, and the Lightning modules that run them."""

from nemo_aligner_diffusion.algorithms.alignprop import AlignProp
from nemo_aligner_diffusion.algorithms.draft import DRaFT
from nemo_aligner_diffusion.algorithms.draft_lv import DRaFTLV
from nemo_aligner_diffusion.algorithms.draft_plus import DRaFTPlus
from nemo_aligner_diffusion.algorithms.drtune import DRTune
from nemo_aligner_diffusion.algorithms.refl import ReFL
from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning

__all__ = ["AlignProp", "DRTune", "DRaFT", "DRaFTLV", "DRaFTPlus", "ReFL", "RewardTuning"]
