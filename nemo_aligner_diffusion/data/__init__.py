"""Prompt shards in, batches out, and the writers of such shards."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Loaded on first use: the writers and the path handling work without torch and Lightning.
_HOMES = {
    "PromptDataModule": "datamodule",
    "PromptDataset": "prompts",
    "WrittenShards": "shards",
    "build_prompt_loader": "prompts",
    "expand_paths": "paths",
    "read_prompts": "prompts",
    "write_prompt_shards": "shards",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
