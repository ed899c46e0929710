"""Classifier-free guidance in a part of the trajectory alone (Kynkäänniemi et al. 2024, arXiv 2404.07724).

Elsewhere the network is called with the conditional half of its batch, and its prediction stands for both halves: the
pipeline's own formula, ``u + s (c − u)`` or any other that leaves equal halves as they are, then gives ``c``. Which
arguments have rows of samples, and which half of them is the conditional one, is read off the values of two calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nemo_aligner_diffusion.diffusion.network.dry_run import first_call, same
from nemo_aligner_diffusion.errors import ConfigurationError

if TYPE_CHECKING:
    from nemo_aligner_diffusion.diffusion.model import DiffusionModel

PROMPTS = ("a red apple on a table", "two birds", "a house")  # of which a call has the first two, another all three
Path = tuple[Any, ...]  # to an argument, or to an entry of one


@dataclass(frozen=True)
class GuidanceInterval:
    """Which steps without gradient are guided, and how a call is made without guidance.

    Attributes:
        low, high: fractions of the trajectory's ``T`` steps, 0 noise and 1 the picture: steps ``low·T <= i < high·T``,
            both bounds rounded, are guided.
        names: of the network's arguments, in order.
        rows: of each argument that has rows of samples, their dimension and how many a sample has, halves together.
        conditional: the half that the prompts are in: 0 or 1.
    """

    low: float
    high: float
    names: Sequence[str]
    rows: Mapping[Path, tuple[int, int]]
    conditional: int

    def part_of(self, step: int, steps: int) -> str:
        """Where in the trajectory: ``before``, ``guided`` or ``after``."""
        return "before" if step < round(self.low * steps) else "guided" if step < round(self.high * steps) else "after"

    def unguided(self, network: Callable[..., Any], samples: int, *args: Any, **kwargs: Any) -> Any:
        """What ``network`` gives for the conditional half, twice; a call that has no halves is made as it is."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        shapes = _shapes(given)
        if not all(path in shapes and shapes[path][d] == rows * samples for path, (d, rows) in self.rows.items()):
            return network(*args, **kwargs)  # the pipeline itself does not guide here (Z-Image's cfg_truncation)
        return tree_map(_twice, network(**self._half(given)), is_leaf=lambda x: isinstance(x, list))

    def _half(self, tree: Any, path: Path = ()) -> Any:
        if path in self.rows:
            return _parts(tree, self.rows[path][0], 2)[self.conditional]
        if isinstance(tree, Mapping):
            return {name: self._half(value, (*path, name)) for name, value in tree.items()}
        if type(tree) in (list, tuple):
            return type(tree)(self._half(value, (*path, i)) for i, value in enumerate(tree))
        return tree


def guidance_interval(
    model: DiffusionModel, interval: Sequence[float], inputs_of: Callable[[list[str]], dict[str, Any]]
) -> GuidanceInterval:
    """``interval`` for the calls of ``model``'s pipeline.

    Args:
        interval: ``low`` and ``high``, see :class:`GuidanceInterval`.
        inputs_of: of prompts, arguments of the pipeline's call as in training.

    Raises:
        ConfigurationError: its network is not called once a step for an unconditional and a conditional half.
    """
    calls = [first_call(model, PROMPTS[:n], inputs_of(list(PROMPTS[:n]))) for n in (2, 3)]
    of_two, of_three = map(_shapes, calls)
    rows: dict[Path, tuple[int, int]] = {}
    for path, shape in of_two.items():
        for d, (n, more) in enumerate(zip(shape, of_three.get(path, ()), strict=False)):
            if n % 4 == 0 and 2 * more == 3 * n:
                rows[path] = d, n // 2
    changed = [
        path for path, shape in of_two.items()
        if shape != of_three.get(path) and not any(path[:k] in rows for k in range(len(path) + 1))
    ]  # fmt: skip
    found = [_conditional(calls[0], path, d) for path, (d, _) in rows.items()]
    votes = {half for half in found if half is not None}
    if changed or len(votes) != 1:
        raise ConfigurationError(
            f"model.rollout_guidance_interval: {type(model.pipe).__name__} does not call its {model.trained} once for "
            "an unconditional and a conditional half of the batch: it guides by two calls, in another way, or at this "
            "scale not at all; expected null with it"
        )
    (low, high), names = interval, list(inspect.signature(model.denoiser.forward).parameters)
    return GuidanceInterval(low, high, names, rows, votes.pop())


def _conditional(call: Any, path: Path, dimension: int) -> int | None:
    """The half of an argument in which two samples differ, where they are alike in the other."""
    for name in path:
        call = call[name]
    leaves = [tree_leaves(part) for part in _parts(call, dimension, 4)]
    alike = [all(map(_alike, leaves[j], leaves[j + 1])) for j in (0, 2)]
    return alike.index(False) if sum(alike) == 1 else None


def _alike(x: Any, y: Any) -> bool:
    return same(x, y, least=1e-3) if isinstance(x, Tensor) else x == y  # rows of a batch are not rounded alike


def _shapes(tree: Any, path: Path = ()) -> dict[Path, tuple[int, ...]]:
    """Of all tensors in ``tree``, and as ``(length,)`` of all lists."""
    shape = tree.shape if isinstance(tree, Tensor) else (len(tree),) if isinstance(tree, list) else None
    found = {} if shape is None else {path: tuple(shape)}
    entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for name, value in entries:
        found |= _shapes(value, (*path, name))
    return found


def _parts(x: Any, dimension: int, count: int) -> Sequence[Any]:
    if isinstance(x, Tensor):
        return x.chunk(count, dimension)
    size = len(x) // count
    return [x[j * size : (j + 1) * size] for j in range(count)]


def _twice(x: Any) -> Any:
    return torch.cat([x, x]) if isinstance(x, Tensor) else x + x if isinstance(x, list) else x
