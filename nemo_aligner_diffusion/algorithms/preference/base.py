"""What a preference method is: weights over the training noise levels of a model. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from nemo_aligner_diffusion.algorithms.base import OF_ROLLOUTS, TrainingMethod
from nemo_aligner_diffusion.errors import ConfigurationError


class Levels(Protocol):
    """What a method is told of a model's training noise levels ``t = 0 … size−1``, by growing noise.

    ``z_t = alphas[t]·x + sigmas[t]·n``; of ε- and v-models ``alphas² + sigmas² = 1``, of flows their sum is 1.
    """

    size: int
    flow: bool

    @property
    def alphas(self) -> Numbers: ...

    @property
    def sigmas(self) -> Numbers: ...


class Numbers(Protocol):
    def tolist(self) -> list[float]: ...


@dataclass(frozen=True)
class PreferenceMethod(TrainingMethod):
    """The loss of a pair is ``−log σ(−β·(w_t(Δ^w − Δ^l) + Σ_{s>t}(c_s^w − c_s^l)))``; a method gives ``β, w, c``.

    ``Δ = d_θ − d_ref``, ``d(z, t)`` the mean over the elements of ``(ε − ε_θ(z_t, t))²`` (flows: ``(v − v_θ)²``);
    winner and loser share ``t`` and ``ε``. Design notes, section 4.

    Attributes:
        compares: whether there is such an argument; else the loss is ``w_t·d_θ(z^w)`` and no base model is called.
    """

    kind = "preference"
    data = "pairs"
    ignored: ClassVar[tuple[str, ...]] = (
        "model.kl_coeff",
        "model.kl_space",
        "model.reward_scale",
        "model.reward_margin",
        *OF_ROLLOUTS,
    )
    compares: ClassVar[bool] = True

    @property
    def scale(self) -> float:
        """``β``."""
        return float(getattr(self, "beta", 1.0))

    @abstractmethod
    def weights(self, levels: Levels) -> list[float]:
        """``w_t`` of each level.

        Raises:
            ConfigurationError: the method is not defined on these levels.
        """

    def corrections(self, levels: Levels) -> list[float] | None:
        """``v_s`` of each level, whose ``v_s·Δ(z, s)`` the table ``c`` averages; ``None``: no correction."""
        return None

    @property
    def correction_share(self) -> float:
        """What a new value counts in ``c``'s moving average."""
        return float(getattr(self, "correction_rate", 0.0))

    def check_weights(self, levels: Levels, first: int, end: int) -> None:
        """Whether what is used of the weights, for ``t`` in ``[first, end)``, is finite.

        Raises:
            ConfigurationError: it is not; names the level, and what would be right.
        """
        for values in (self.weights(levels), self.corrections(levels) or []):
            at = next((t for t, value in enumerate(values[:end]) if t >= first and value == float("inf")), None)
            if at is not None:
                cap = f", or {self.keys()['max_weight']}=1000"
                raise ConfigurationError(
                    f"model.algorithm = {self.name}: its weight at t = {at} is infinite, as that level is noise alone "
                    f"(a schedule of zero terminal signal); expected model.preference.steps=[{first},{at}]{cap}"
                )


def signal_shares(levels: Levels) -> list[float]:
    """``ᾱ_t`` of each level."""
    return [alpha**2 for alpha in levels.alphas.tolist()]


def refuse_flow(method: PreferenceMethod, levels: Levels) -> None:
    if levels.flow:
        raise ConfigurationError(
            f"model.algorithm = {method.name}: {method.title} is derived for models that predict noise or v, and this "
            "one is a flow; expected dpo, discounted, sft, or dde_single as an experiment"
        )
