"""Many cases in processes of their own, and what came of them by category."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_campaign(count: int, seed: int = 0, processes: int = 1, first: int = 0) -> list[dict[str, Any]]:
    """The results of cases ``first`` to ``count - 1`` of a series, in order; a process that dies breaks a property."""
    with ThreadPoolExecutor(processes) as pool:
        shares = list(pool.map(lambda start: _share(start, count, processes, seed), range(first, first + processes)))
    return sorted((result for share in shares for result in share), key=lambda result: int(result["number"]))


def _share(first: int, count: int, step: int, seed: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    while first < count:
        lines, ending = _worker(first, count, step, seed)
        results += [line for line in lines if "outcome" in line]
        started = [line["started"] for line in lines if "started" in line]
        done = [line["number"] for line in lines if "outcome" in line]
        if not started:
            raise RuntimeError(f"the fuzzing process did not start:\n{ending}")
        if len(started) == len(done):
            break
        number = started[-1]  # the process died on it; go on after it in a fresh one
        from tests.fuzz.cases import make_case

        category = make_case(number, seed).category
        died = {"outcome": "died", "message": ending[-300:], "seconds": 0.0, "peak_mib": 0.0, "bytes": 0}
        results.append(
            {"number": number, "category": category.name, "group": category.group, "broken": ["died"], **died}
        )
        first = number + step
    return results


def _worker(first: int, count: int, step: int, seed: int) -> tuple[list[dict[str, Any]], str]:
    words = ("--first", first, "--count", count, "--step", step, "--seed", seed)
    command = [sys.executable, "-m", "tests.fuzz.worker", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    ending = f"exit status {finished.returncode}: {finished.stderr[-2000:]}"
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")], ending


def broken_properties(results: list[dict[str, Any]]) -> list[str]:
    """One line for each property broken: case, category, what."""
    return [f"case {r['number']} ({r['category']}): {what}" for r in results for what in r["broken"]]


def table(results: list[dict[str, Any]]) -> str:
    """Figures by category, as a Markdown table; the last row is their sum or maximum."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["group"], result["category"]].append(result)
    rows = [_row(group, name.replace("_", " "), those) for (group, name), those in sorted(groups.items())]
    rows.append(_row("**all**", "", results))
    head = "| group | mutation | cases | refused | harmless | slowest, ms | peak, MiB |"
    return "\n".join([head, "|---|---|---:|---:|---:|---:|---:|", *rows])


def _row(group: str, name: str, results: list[dict[str, Any]]) -> str:
    def count(outcome: str) -> int:
        return sum(result["outcome"] == outcome for result in results)

    slowest = max(result["seconds"] for result in results) * 1000
    peak = max(result["peak_mib"] for result in results)
    return (
        f"| {group} | {name} | {len(results)} | {count('refused')} | {count('accepted')} | {slowest:.0f} | {peak:.0f} |"
    )
