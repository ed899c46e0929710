"""What rewards of several parts share: the parts, and what becomes of a part's score before it counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest
from nemo_aligner_diffusion.rewards.settings import PRECISIONS, RewardSettings
from nemo_aligner_diffusion.settings import choice, number, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nemo_aligner_diffusion.rewards.base import Reward

BY_BASE = "base"
_SHAPING = ("normalize", "clip", "clip_mode")
_MODES = choice("hard", "smooth")


@dataclass(frozen=True)
class Shaping:
    """What becomes of a part's score ``s`` before it counts: first normalised, then clipped.

    Attributes:
        normalize: ``(mean, std)``: ``(s − mean) / std``; ``"base"``: the mean and standard deviation over the base
            model's validation pictures, to be measured before the first use; ``None``: ``s`` as it is.
        clip: ``(low, high)``, either of them ``None`` for no bound; ``None``: no clipping.
        clip_mode: ``hard`` cuts at the bounds: beyond them the part has no gradient at all. ``smooth`` is
            ``c + h·tanh((s − c) / h)`` with centre ``c`` and half-width ``h`` of the bounds: slope 1 at the centre,
            0.42 at a bound, vanishing beyond; it needs both bounds.
    """

    normalize: tuple[float, float] | str | None = None
    clip: tuple[float | None, float | None] | None = None
    clip_mode: str = "hard"

    @classmethod
    def read(cls, given: Mapping[str, Any], where: str) -> Shaping:
        """Of a part's keys ``normalize``, ``clip`` and ``clip_mode``; not yet checked."""
        normalize, clip = given["normalize"], given["clip"]
        if isinstance(normalize, Mapping):
            wrong = [key for key in normalize if key not in ("mean", "std")]
            if wrong or len(normalize) != 2:
                raise ConfigurationError(
                    f"{where}.normalize = {dict(normalize)!r}: expected mean and std, or base"
                    + (closest(str(wrong[0]), ("mean", "std")) if wrong else "")
                )
            normalize = (normalize["mean"], normalize["std"])
        return cls(normalize, tuple(clip) if isinstance(clip, list) else clip, given["clip_mode"] or cls.clip_mode)

    def check(self, where: str) -> None:
        """Raises :class:`ConfigurationError` where a value is impossible; ``where`` is the part's place."""
        if isinstance(self.normalize, tuple):
            mean, std = self.normalize
            number().read(f"{where}.normalize.mean", mean)
            number(above=0).read(f"{where}.normalize.std", std)
        elif self.normalize not in (None, BY_BASE):
            raise ConfigurationError(f"{where}.normalize = {self.normalize!r}: expected {{mean: …, std: …}}, or base")
        if self.clip is not None:
            if not isinstance(self.clip, tuple) or len(self.clip) != 2 or self.clip == (None, None):
                raise ConfigurationError(f"{where}.clip = {self.clip!r}: expected [low, high]; one of them may be null")
            low, high = (number(nullable=True).read(f"{where}.clip", bound) for bound in self.clip)
            if low is not None and high is not None and not low < high:
                raise ConfigurationError(f"{where}.clip = {list(self.clip)}: expected low < high")
        if _MODES.read(f"{where}.clip_mode", self.clip_mode) == "smooth" and (self.clip is None or None in self.clip):
            raise ConfigurationError(f"{where}.clip_mode = smooth: it needs both bounds, such as {where}.clip=[-3,3]")

    def bounded(self, score: Tensor) -> Tensor:
        """``score`` clipped."""
        if self.clip is None:
            return score
        low, high = self.clip
        if self.clip_mode == "hard":
            return score.clamp(low, high)
        assert low is not None
        assert high is not None
        centre, half = (high + low) / 2, (high - low) / 2
        return centre + half * ((score - centre) / half).tanh()


@dataclass(frozen=True)
class Part:
    """A part of a reward: what judges (settings, or a reward already made), how much it counts, and what becomes of its
    score."""

    reward: RewardSettings | Reward
    weight: float = 1.0
    shaping: Shaping = Shaping()


@dataclass(frozen=True, kw_only=True)
class PartedSettings(RewardSettings, ABC):
    """Settings of a reward of several parts; :meth:`combine` makes one score of theirs.

    Attributes:
        least: number of parts.
        part_keys: what stands beside a part's own keys.
        members: the parts, by name.
    """

    free: ClassVar = {"parts": "members"}
    least: ClassVar[int] = 1
    part_keys: ClassVar[tuple[str, ...]] = ("weight", *_SHAPING)

    members: Mapping[str, Part] = field(default_factory=dict)
    precision: str = setting(
        "32",
        choice(*PRECISIONS),
        "what every part computes in: 32, 16 or bf16, 64, or Lightning's long names",
        "rm.trainer.precision",
    )

    def describe(self) -> str:
        return f"{self.name} of {', '.join(self.members)}"

    @classmethod
    def read_section(cls, value: Any, where: str) -> dict[str, Part]:
        parts = super().read_section(value, where)
        return {str(label): cls._read_part(str(label), part, f"{where}.{label}") for label, part in parts.items()}

    @classmethod
    def _read_part(cls, label: str, given: Any, where: str) -> Part:
        """``{weight, normalize, clip, clip_mode, name, its keys}``."""
        from nemo_aligner_diffusion.rewards.registry import read_reward

        if given is not None and not isinstance(given, Mapping):
            raise ConfigurationError(f"{where} = {given!r}: expected keys, such as {{weight: 1.0}}")
        settings = dict(given or {})
        weight = settings.pop("weight", None)
        if weight is not None and "weight" not in cls.part_keys:
            raise ConfigurationError(
                f"{where}.weight = {weight!r}: an {cls.name}'s parts count alike; expected no weight, or "
                f"{where.rpartition('.parts.')[0]}.name=composite"
            )
        weight = 1.0 if weight is None else number().read(f"{where}.weight", weight)
        shaping = Shaping.read({key: settings.pop(key, None) for key in _SHAPING}, where)
        return Part(read_reward(settings, where, label, (*cls.part_keys, "name"))[0], weight, shaping)

    def check(self, where: str = "rm") -> None:
        super().check(where)
        if not self.members:
            raise ConfigurationError(
                f"{where}.name = {self.name} needs {where}.parts, such as "
                f"{where}.parts={{clip:{{weight:1.0}},symmetry:{{weight:10.0}}}}"
            )
        if len(self.members) < self.least:
            raise ConfigurationError(
                f"{where}.name = {self.name} has one part, {next(iter(self.members))!r}, with nothing to agree with: "
                f"add another, such as {where}.parts.second={{name:clip,model:{{restore_from_path:second.nemo}}}}"
            )
        for label, part in self.members.items():
            part.shaping.check(f"{where}.parts.{label}")

    def measured(self, where: str = "rm") -> Iterator[str]:
        """The places of parts that are normalised by the base model's pictures, at any depth."""
        for label, part in self.members.items():
            here = f"{where}.parts.{label}"
            if part.shaping.normalize == BY_BASE:
                yield here
            if isinstance(part.reward, PartedSettings):
                yield from part.reward.measured(here)

    def without_gradient(self, where: str = "rm") -> Iterator[str]:
        for label, part in self.members.items():
            if isinstance(part.reward, RewardSettings):
                yield from part.reward.without_gradient(f"{where}.parts.{label}")

    @abstractmethod
    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        """The parts' shaped scores, each ``(B,)``, as one ``(B,)``."""

    def make(self, where: str, device: str | torch.device, dtype: torch.dtype) -> Reward:
        from nemo_aligner_diffusion.rewards.support.parted import PartedReward

        rewards = {
            label: part.reward.build(device, dtype, f"{where}.parts.{label}")
            if isinstance(part.reward, RewardSettings)
            else part.reward
            for label, part in self.members.items()
        }
        return PartedReward(self, rewards, where)
