"""The house as its imports draw it: which room imports which, and the picture ``docs/house.svg``.

python tests/house.py docs/house.svg
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

NAME = "nemo_aligner_diffusion"
ROOT = Path(__file__).resolve().parents[1] / NAME
# From the ground up: a room imports only rooms before it.
ROOMS = {
    "ground": "errors, settings, import paths, embedded files",
    "formats": "other people's files",
    "runtime": "processes, directory, signals, Slurm",
    "parallel": "tensor, FSDP, placements",
    "diffusion": "how a picture is made",
    "data": "where samples come from",
    "rewards": "what is maximised",
    "algorithms": "what is learnt from what",
    "evaluation": "metrics, figures, report",
    "training": "loop, callbacks, checkpoints",
    "config": "schema, NeMo's keys",
    "reward_training": "a reward of one's own",
    "planner": "what a run needs",
    "cli": "commands",
    "api": "tune()",
}
_TOP = {"api": "api", "tuned": "api", "__init__": "api"}  # modules that stand in no folder


def room_of(module: str) -> str:
    """The room of a module, written dotted and without the package's own name."""
    first, _, rest = module.partition(".")
    return first if rest or first in ROOMS else _TOP.get(first, "ground")


def modules() -> dict[str, Path]:
    """Dotted name without the package's -> file."""
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sorted(ROOT.rglob("*.py"))}


def imported(file: Path) -> set[str]:
    """Modules that a file imports, wherever in it, written in full; ``from x import y`` gives both x and x.y."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_imports(file: Path) -> set[str]:
    """Of :func:`imported` the project's own modules, without its name."""
    known = modules()
    names = {name.removeprefix(f"{NAME}.") for name in imported(file) if name.startswith(f"{NAME}.")}
    return {name for name in names if name in known or f"{name}.__init__" in known}


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> ``module > module`` of each import between the two."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, file in modules().items():
        for other in own_imports(file):
            rooms = room_of(module), room_of(other)
            if rooms[0] != rooms[1]:
                found[rooms].append(f"{module} > {other}")
    return dict(found)


def picture() -> str:
    """An SVG: the ground lowest, to the right of a room a mark under each room that it imports."""
    rooms, between = list(reversed(ROOMS)), arrows()
    row, column, left, top = 30, 26, 450, 122
    width, height = left + column * len(rooms) + 20, top + row * len(rooms) + 10
    # its own colours, so that the picture is legible on a dark page too
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="16" y="26" font-weight="bold">A room imports rooms below it, never above.</text>',
        '<text x="16" y="48" fill="#44505c">A dot: the room on the left imports the room named over it.</text>',
    ]
    for number, room in enumerate(rooms):
        y, x = top + row * number, left + column * number + column / 2
        parts += [
            f'<rect x="12" y="{y}" width="{left - 24}" height="{row - 4}" rx="3" fill="#eef2f7"/>',
            f'<text x="22" y="{y + 18}" font-weight="bold">{room}</text>',
            f'<text x="150" y="{y + 18}" fill="#44505c">{ROOMS[room]}</text>',
            f'<text transform="translate({x + 4} {top - 6}) rotate(-60)" font-size="12">{room}</text>',
            f'<rect x="{x - 8}" y="{y + 5}" width="16" height="16" fill="#c3ccd6"/>',
        ]
        for place, other in enumerate(rooms):
            if (room, other) in between:
                dot = left + column * place + column / 2
                parts.append(f'<circle cx="{dot}" cy="{y + 13}" r="8" fill="#1f6feb"/>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
