"""Archives that are whole but whose weights, configuration and tokenizer do not belong together."""

from __future__ import annotations

import io
import random
from typing import Any

import torch

from tests.fuzz.cases import any_seed, category
from tests.fuzz.seeds import CONFIG, WEIGHTS, Seed, seeds, torch_file


def _state(seed: Seed) -> dict[str, Any]:
    state: dict[str, Any] = dict(torch.load(io.BytesIO(seed.content(WEIGHTS)), weights_only=True))
    return state


@category("reward", hostile=True, weight=40)
def misfitting_weights(drawn: random.Random) -> bytes:
    """Tensors missing, added, renamed, of other shapes or types than the configuration says."""
    seed = any_seed(drawn)
    state = _state(seed)
    name = drawn.choice([key for key in state if "logit_scale" not in key])
    tensor = state[name]
    way = drawn.randrange(8)
    if way == 0:
        del state[name]
    elif way == 1:
        state[drawn.choice(("extra", "model.extra", f"{name}.x", "x" * 5000, "", "\u0000"))] = torch.zeros(3)
    elif way == 2:
        state[f"{name}2"] = state.pop(name)
    elif way == 3:
        state[name] = torch.zeros(*tensor.shape, 2)
    elif way == 4:
        state[name] = torch.zeros(0)
    elif way == 5:
        state[name] = tensor.reshape(-1)[:-1].clone()
    elif way == 6:
        state[name] = torch.zeros(
            tensor.shape, dtype=drawn.choice((torch.int64, torch.bool, torch.uint8, torch.complex64))
        )
    else:
        state[name] = torch.zeros(tuple(length + 1 for length in tensor.shape), dtype=tensor.dtype)
    return seed.with_content(WEIGHTS, torch_file(state)).pack()


@category("reward", hostile=False, weight=8)
def strangers_configuration(drawn: random.Random) -> bytes:
    """The configuration of one archive with the weights or tokenizer of another."""
    first, second = (drawn.choice(list(seeds().values())) for _ in range(2))
    name = drawn.choice((CONFIG, WEIGHTS))
    return first.with_content(name, second.content(name)).pack()


@category("reward", hostile=False, weight=8)
def giants(drawn: random.Random) -> bytes:
    """An architecture of terabytes, or one of very many layers, beside weights of some kilobytes."""
    seed = any_seed(drawn)
    config = seed.config
    sections = [
        section for section in _mappings(config) if any("hidden" in str(key) or "layers" in str(key) for key in section)
    ]
    section = drawn.choice(sections or [config])
    for key, value in section.items():
        if isinstance(value, int) and not isinstance(value, bool) and drawn.random() < 0.5:
            section[key] = value * drawn.choice((10, 1000, 10**6, 10**9))
    return seed.with_config(config).pack()


def _mappings(node: Any) -> list[dict[Any, Any]]:
    inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    return ([node] if isinstance(node, dict) else []) + [found for value in inner for found in _mappings(value)]
