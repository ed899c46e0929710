"""The rewards that can be converted, and where their published weights lie. No heavy import: the command lists them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of published reward.

    Attributes:
        help: one line for the command.
        source: Hugging Face repository of the weights, where there is one usual place.
        source_help: what ``--source`` should be.
        file: the one file that is needed of a folder or repository.
        tokenizer: repository of the tokenizer, where the source doesn't carry its own.
        clip: aesthetic: the CLIP that the published heads rate.
        score: of a CLIP: ``pickscore``, ``hps`` or ``clipscore``.
        activation: of an OpenCLIP checkpoint of this kind, where all have the same.
        resize: how its own code prepares pictures that are no squares, where that isn't what the weights' folder says.
        without: options of the command that have no effect.
    """

    help: str
    source: str | None = None
    source_help: str = "a Hugging Face folder or repository of a CLIP, or an OpenCLIP checkpoint"
    file: str | None = None
    tokenizer: str | None = None
    clip: str | None = None
    score: str = "pickscore"
    activation: str | None = None
    resize: str | None = None
    without: tuple[str, ...] = ("clip", "head_activation")


_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_HPS = "an OpenCLIP checkpoint of HPSv2, such as "

KINDS: dict[str, Kind] = {
    "pickscore": Kind("PickScore: exp(logit_scale)·cos", "yuvalkirstain/PickScore_v1", tokenizer=_VIT_H),
    "clip": Kind("any CLIP, scored like PickScore (or see --score)"),
    "clipscore": Kind("CLIPScore: 2.5·max(cos, 0)", "openai/clip-vit-base-patch32", score="clipscore", resize="crop"),
    "hps": Kind(
        "HPSv2: cos",
        "xswu/HPSv2",
        _HPS + "HPS_v2_compressed.pt",
        file="HPS_v2_compressed.pt",
        tokenizer=_VIT_H,
        score="hps",
        activation="gelu",
        resize="pad",
    ),
    "hps_v2.1": Kind(
        "HPSv2.1: cos",
        "xswu/HPSv2",
        _HPS + "HPS_v2.1_compressed.pt",
        file="HPS_v2.1_compressed.pt",
        tokenizer=_VIT_H,
        score="hps",
        activation="gelu",
        resize="pad",
    ),
    "aesthetic": Kind(
        "LAION's aesthetic predictor: a head on a CLIP's image embedding",
        source_help="the head's .pth, such as sac+logos+ava1-l14-linearMSE.pth",
        clip="openai/clip-vit-large-patch14",
        resize="crop",
        without=("tokenizer", "score", "prompt_prefix", "text_heads"),
    ),
    "image_reward": Kind(
        "ImageReward: a BLIP with a head",
        "THUDM/ImageReward",
        "ImageReward.pt",
        file="ImageReward.pt",
        tokenizer="google-bert/bert-base-uncased",
        without=("clip", "head_activation", "score", "prompt_prefix", "activation", "resize"),
    ),
}
