"""The state of a run as a JSON document and tensors by name: nothing else is written, so nothing else can be read.

A checkpoint as Lightning makes it is a tree of dicts, lists, tuples, numbers, texts and tensors. Written as JSON, a
tensor is ``{"$tensor": name}``; with ``"like": parameter`` it is laid out as that parameter (the parameter itself, its
moments, its average). A tuple is ``{"$tuple": […]}``; a dict with a key that is no text, or begins with ``$``, is
``{"$dict": [[key, value]…]}``. Numbers keep every bit: Python writes the shortest text that reads back as the same
number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from nemo_aligner_diffusion.errors import CheckpointError

_TENSOR, _TUPLE, _DICT, _LIKE = "$tensor", "$tuple", "$dict", "like"
WEIGHTS = "state_dict"  # the branch whose tensors are saved under their plain names

Leaf = tuple[Tensor, str | None]  # as this process holds it, and the parameter whose layout it has (None: it is whole)


def take_apart(
    tree: Any, parameters: Mapping[str, Tensor], in_pieces: Collection[str] = ()
) -> tuple[Any, dict[str, Leaf]]:
    """The JSON document of ``tree``, and its tensors by the names they are saved under.

    Args:
        tree: see above.
        parameters: by name, as this process holds them. A tensor below a key that is one of these names, and of that
            parameter's shape, is laid out as it.
        in_pieces: those of which this process holds a part only.

    Raises:
        CheckpointError: the tree holds something else than plain values and dense tensors; says where.
    """
    leaves: dict[str, Leaf] = {}

    def walk(value: Any, path: tuple[str, ...], owner: str | None) -> Any:
        if isinstance(value, Tensor):
            like = owner if owner is not None and value.shape == parameters[owner].shape else None
            if like is None and value.ndim > 0 and owner in in_pieces:
                raise CheckpointError(
                    f"the tensor {'/'.join(path)} of the run's state has the shape {tuple(value.shape)}, and {owner}, "
                    "of which every process holds a part, another: how to put it together is not known"
                )
            name = "/".join(path[1:] if path[0] == WEIGHTS and len(path) > 1 else path)
            if name in leaves or value.is_sparse or value.is_quantized:
                raise CheckpointError(f"the tensor {'/'.join(path)} of the run's state cannot be saved")
            leaves[name] = (value, like)
            return {_TENSOR: name} if like is None else {_TENSOR: name, _LIKE: like}
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value)
        if isinstance(value, tuple):
            return {_TUPLE: [walk(item, (*path, str(i)), owner) for i, item in enumerate(value)]}
        if isinstance(value, list):
            return [walk(item, (*path, str(i)), owner) for i, item in enumerate(value)]
        if isinstance(value, Mapping):
            items = [
                (key, walk(item, (*path, str(key)), key if isinstance(key, str) and key in parameters else owner))
                for key, item in value.items()
            ]
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
                return dict(items)
            return {_DICT: [[walk(key, (*path, "key"), None), item] for key, item in items]}
        raise CheckpointError(
            f"{'.'.join(path)} of the run's state is {type(value).__name__!r}; a checkpoint holds numbers, texts, "
            "lists, dicts and tensors. A callback's state_dict() must give only these."
        )

    return walk(tree, (), None), leaves


def put_together(document: Any, tensor: Callable[[str, str | None], Tensor]) -> Any:
    """The inverse of :func:`take_apart`.

    Args:
        tensor: gives each tensor of its name, and of the parameter whose layout it has, or ``None``.
    """
    if isinstance(document, list):
        return [put_together(item, tensor) for item in document]
    if not isinstance(document, dict):
        return document
    if _TENSOR in document:
        return tensor(document[_TENSOR], document.get(_LIKE))
    if _TUPLE in document:
        return tuple(put_together(item, tensor) for item in document[_TUPLE])
    if _DICT in document:
        return {put_together(key, tensor): put_together(item, tensor) for key, item in document[_DICT]}
    return {key: put_together(item, tensor) for key, item in document.items()}
