"""The registry of mutations: a case is a category, whether it is hostile, and the bytes of a file."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz.seeds import Seed, seeds

Mutation = Callable[[random.Random], bytes]


@dataclass(frozen=True)
class Category:
    """``hostile``: every case must be refused; otherwise a case may also turn out to do no harm."""

    name: str
    group: str
    hostile: bool
    weight: int  # how often it is drawn, against the others
    mutate: Mutation


@dataclass(frozen=True)
class Case:
    number: int
    category: Category
    content: bytes


CATEGORIES: list[Category] = []


def category(group: str, *, hostile: bool, weight: int = 8) -> Callable[[Mutation], Mutation]:
    """Register a function of a random generator that returns a file's bytes."""

    def register(mutate: Mutation) -> Mutation:
        CATEGORIES.append(Category(mutate.__name__, group, hostile, weight, mutate))
        return mutate

    return register


def all_categories() -> list[Category]:
    """Every category, after importing the modules that register them."""
    from tests.fuzz import pickle_cases, reward_cases, tar_cases, yaml_cases, zip_cases  # noqa: F401

    return CATEGORIES


def make_case(number: int, seed: int = 0) -> Case:
    """Case ``number`` of the series ``seed``: always the same."""
    known = all_categories()
    drawn = random.Random(f"{seed} {number}")
    # The first round visits each category once, so that a short series misses none.
    chosen = known[number] if number < len(known) else drawn.choices(known, [c.weight for c in known])[0]
    return Case(number, chosen, chosen.mutate(drawn))


def any_seed(drawn: random.Random) -> Seed:
    return drawn.choice(list(seeds().values()))
