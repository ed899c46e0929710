"""The keys of ``rm``: what each reward reads, and what its keys accept. See ``rewards/build.py`` for their meaning.

Imports nothing heavy. A test holds the names to those that ``rewards/`` knows.
"""

from __future__ import annotations

from nemo_aligner_diffusion.settings import (
    ANY,
    BOOL,
    FRACTION,
    PATH,
    Kind,
    choice,
    integer,
    number,
)

# Each reward and the entries of `rm` that it reads.
REWARDS: dict[str, tuple[str, ...]] = {
    "clip": ("model", "trainer", "augment"),
    "symmetry": ("augment",),
    "feature_symmetry": ("model", "distance", "trainer", "augment"),
    "compressibility": ("quality", "chroma_subsampling", "reduction", "augment"),
    "incompressibility": ("quality", "chroma_subsampling", "reduction", "augment"),
    "classifier": ("model", "target_class", "views", "trainer", "augment"),
    "detection": ("model", "query", "remove", "temperature", "trainer", "augment"),
    "custom": ("import_path", "kwargs", "augment"),
    "composite": ("parts", "trainer", "augment"),
    "ensemble": ("parts", "aggregate", "std_weight", "trainer", "augment"),
}
# Of `rm.model`, what each reward reads that has one; beside them all read _MODEL.
_MODEL = ("micro_batch_size", "activation_checkpointing")
MODEL_KEYS: dict[str, tuple[str, ...]] = {
    "clip": ("restore_from_path", "score", "tokenizer", *_MODEL),
    "feature_symmetry": ("restore_from_path", "tokenizer", *_MODEL),
    "classifier": ("from_pretrained", *_MODEL),
    "detection": ("from_pretrained", *_MODEL),
}
# What a reward cannot do without, and an example of it.
NEEDED: dict[str, dict[str, str]] = {
    "classifier": {"model.from_pretrained": "google/vit-base-patch16-224", "target_class": "goldfish"},
    "detection": {"model.from_pretrained": "google/owlv2-base-patch16-ensemble"},
    "custom": {"import_path": "my_package.my_module:my_reward"},
}
SCORES = ("pickscore", "hps", "clipscore")
REDUCTIONS = ("sum", "mean")
DISTANCES = ("cosine", "l2")
AGGREGATES = ("mean", "min", "mean_minus_std")
CLIP_MODES = ("hard", "smooth")
PRECISIONS = ("32", "16", "bf16", "64", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")

REWARD_KEYS: dict[str, Kind] = {
    "rm.name": choice(*REWARDS),
    "rm.model.restore_from_path": PATH,
    "rm.model.from_pretrained": PATH,
    "rm.model.micro_batch_size": integer(1, nullable=True),
    "rm.model.activation_checkpointing": BOOL,
    "rm.model.score": choice(*SCORES, nullable=True),
    "rm.model.tokenizer": PATH,
    "rm.trainer.precision": choice(*PRECISIONS),
    "rm.augment.crop_scale": Kind("float", low=0, high=1, open_low=True),
    "rm.augment.flip_probability": Kind("float", low=0, high=1),
    "rm.augment.colour_jitter": FRACTION,
    "rm.augment.dropout": FRACTION,
    "rm.augment.noise_std": number(0),
    "rm.augment.views": integer(1),
    "rm.quality": Kind("int", low=1, high=100),
    "rm.chroma_subsampling": BOOL,
    "rm.reduction": choice(*REDUCTIONS),
    "rm.distance": choice(*DISTANCES),
    "rm.target_class": Kind("text", nullable=True),
    "rm.views": Kind("int", low=1, high=10),
    "rm.query": Kind("text", nullable=True),
    "rm.remove": BOOL,
    "rm.temperature": number(0),
    "rm.import_path": Kind("text", nullable=True),
    "rm.kwargs.*": ANY,
    "rm.parts.*": ANY,
    "rm.aggregate": choice(*AGGREGATES),
    "rm.std_weight": number(0),
}
