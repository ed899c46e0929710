"""The tables of ``docs/configuration.md``, of comments in ``conf/`` and the schema, and of ``docs/algorithms.md``.

python -m nemo_aligner_diffusion.config.docs docs
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.config.load import conf_directory
from nemo_aligner_diffusion.config.schema import LOOP, kind_of
from nemo_aligner_diffusion.rewards.registry import rewards

BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->"
LINE = re.compile(r"(?P<indent> *)(?P<key>[\w+]+):(?P<value>.*?) # (?P<comment>.*)")

# Section of the tables -> files that explain its keys, the one whose defaults are shown first.
SECTIONS: dict[str, list[str]] = {
    "Run": ["draftp_sd.yaml"],
    "Machine": ["trainer/default.yaml"],
    "Training loop": ["loop/default.yaml"],
    "Results, logging, resuming": ["exp_manager/default.yaml"],
    "Model and sampling": ["model/stable_diffusion.yaml"],
    "Method": [
        "algorithm/draft_plus.yaml",
        "algorithm/base.yaml",
        *(f"algorithm/{method.option}.yaml" for method in methods().values()),
    ],
    "What is trained": ["peft/sdlora.yaml"],
    "Optimizer": ["optim/fused_adam.yaml", "optim/sgd.yaml"],
    "Learning-rate schedule": ["sched/warmup_hold.yaml", "sched/cosine.yaml"],
    "Prompts": ["data/prompts.yaml"],
    "Reward": [
        "rm/clip.yaml",
        "rm/base.yaml",
        *(f"rm/{name}.yaml" for name in rewards()),
    ],
    "Report": ["report/default.yaml"],
}


def documented_keys(section: str | None = None) -> dict[str, tuple[str, str]]:
    """Dotted key -> (default, meaning), of one section or all. Methods' own values are those of ``draft_plus``."""
    result: dict[str, tuple[str, str]] = {}
    for name in [section] if section else SECTIONS:
        for file in SECTIONS[name]:
            for key, entry in _file_keys(file).items():
                result.setdefault(key, entry)
    return result


def _file_keys(file: str) -> dict[str, tuple[str, str]]:
    path = conf_directory() / file
    text = path.read_text(encoding="utf-8")
    header = re.match(r"# @package (\S+)", text)
    group = file.partition("/")[0] if "/" in file else ""
    package = header.group(1) if header else f"trainer.{LOOP}" if group == "loop" else group
    result: dict[str, tuple[str, str]] = {}
    sections: list[str] = []
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        match = LINE.fullmatch(line)
        if not match:
            continue
        depth = len(match["indent"]) // 2
        sections[depth:] = [match["key"]]
        key = ".".join(filter(None, [package, *sections]))
        if kind_of(key, LOOP) is not None:
            value = match["value"].strip()
            if not value and following.strip().startswith("["):  # a list too long for its line stands on the next
                value = following.strip()
            result[key] = (value, match["comment"].strip())
    return result


def tables() -> str:
    """Markdown: one table a section, ``key | default | meaning``."""
    parts: list[str] = []
    for section in SECTIONS:
        parts += [f"### {section}", "", "| key | default | meaning, range |", "| --- | --- | --- |"]
        for key, (default, meaning) in documented_keys(section).items():
            shown = key.replace(LOOP, "draftp_sd")
            parts.append(f"| `{shown}` | `{default}` | {meaning.replace('|', chr(92) + '|')} |")
        parts.append("")
    return "\n".join(parts)


def method_table() -> str:
    """Markdown: a row for each method, from the first line of its docstring and the keys of its settings."""
    lines = ["| `algorithm=` | method | what it does | its keys |", "| --- | --- | --- | --- |"]
    for method in methods().values():
        what = (method.__doc__ or "").strip().splitlines()[0]
        source = re.sub(r"arXiv (\S+)", r"[\1](https://arxiv.org/abs/\1)", method.source)
        own = f"model.{method.option}."
        short = dict.fromkeys(f"{own}*" if key.startswith(own) else key for key in method.keys().values())
        keys = ", ".join(f"`{key}`" for key in short) or "–"
        lines.append(f"| `{method.option}` | {method.title} ({source}) | {what} | {keys} |")
    return "\n".join([*lines, ""])


def main(folder: str) -> None:
    for name, table in (("configuration.md", tables()), ("algorithms.md", method_table())):
        page = Path(folder) / name
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        page.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
