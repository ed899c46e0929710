"""What each model family is trained with, where neither recipe nor user say else: ``conf/family/<name>.yaml``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.config.layers import Layer, read_sections
from nemo_aligner_diffusion.config.recipes import FAMILY, conf_directory, groups
from nemo_aligner_diffusion.config.words import settled
from nemo_aligner_diffusion.diffusion.recognition import Recognised
from nemo_aligner_diffusion.diffusion.settings import SamplingSettings
from nemo_aligner_diffusion.keys import flatten

OTHER = "other"  # of what is not recognised


def family_of(found: Recognised) -> tuple[str, str]:
    """The family of a checkpoint, and why, half a sentence."""
    if found.architecture:
        return found.architecture, found.because
    return OTHER, f"not recognised: {found.because}"


def family_layer(name: str, algorithm: str = "", known: Mapping[str, Any] | None = None) -> Layer:
    """A family's settings, with those of a method and its kind.

    Its learning rates are Adam's, ``sgd`` has its own; a kind's rate is of all weights, a LoRA has the family's, and a
    kind's warm-up is of ``sched=warmup_hold``.

    Args:
        known: the other settings; dotted key → value.
    """
    known = known or {}
    content = dict(_content(name))
    with_methods = content.pop("methods")
    leaves = flatten({"model": content})
    if algorithm in methods():
        of_kind = flatten({"model": with_methods.get(methods()[algorithm].kind, {})})
        if known.get("model.peft.peft_scheme") != "none":
            of_kind.pop("model.optim.lr", None)
        if known.get("model.optim.sched.name") != "WarmupHoldPolicy":
            of_kind.pop("model.optim.sched.warmup_steps", None)
        leaves |= of_kind | flatten({"model": with_methods.get(methods()[algorithm].option, {})})
    if known.get("model.optim.name") == "sgd":
        del leaves["model.optim.lr"]
    return Layer(leaves, f"{FAMILY}={name}")


def family_keys() -> frozenset[str]:
    """Every key that some family, or a method's share of it, says."""
    contents = [_content(name) for name in groups()[FAMILY]]
    shares = [share for content in contents for share in content["methods"].values()]
    said = {key for content in (*contents, *shares) for key in flatten({"model": content})}
    return frozenset(key for key in said if not key.startswith("model.methods.")) | {"model.drtune.early_stop_steps"}


def sampling_of(name: str) -> SamplingSettings:
    """How a family's pictures are sampled."""
    return SamplingSettings.from_tree({"model": _content(name)})


@functools.cache
def _content(name: str) -> dict[str, Any]:
    content = settled(read_sections(conf_directory() / FAMILY / f"{name}.yaml"))
    assert isinstance(content, dict)
    return content
