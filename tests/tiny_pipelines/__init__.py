"""Tiny pipelines: real diffusers and transformers classes, random weights, tokenizers built in code."""

from __future__ import annotations

from . import dits, flows, main, newer, others, unets, videos
from .double import double_precision
from .row import PROMPTS, TinyPipeline, randomise

__all__ = ["MAIN", "PROMPTS", "ROWS", "TinyPipeline", "double_precision", "named", "randomise"]

MAIN = main.ROWS
ROWS = (*MAIN, *unets.ROWS, *dits.ROWS, *flows.ROWS, *videos.ROWS, *others.ROWS, *newer.ROWS)


def named(name: str) -> TinyPipeline:
    return next(row for row in ROWS if row.name == name)
