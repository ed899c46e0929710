"""The tables of ``docs/configuration.md``, of the classes of settings, of ``docs/algorithms.md``, and of the recipes in
``docs/models.md``.

python tests/settings_page.py docs
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.config.families import family_layer
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.diffusion.settings import FAMILIES
from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.rewards.registry import rewards
from nemo_aligner_diffusion.settings import LOOP, Settings
from nemo_aligner_diffusion.training.settings import RunSettings

_OF_NO_CLASS = {
    "rm.name": ("clip", f"which reward: {', '.join(rewards())}; the other files of conf/rm are presets of clip"),
    "rm.parts": ("{}", "parts of a composite or ensemble, by name: each has the keys of its own reward, and what "
                 "becomes of its score: weight, normalize, clip, clip_mode ([rewards.md](rewards.md))"),
    "rm.kwargs": ("{}", "keyword arguments of a custom reward; any names"),
}  # fmt: skip
FAMILYS = "its family's"  # of conf/family
BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->"


def documented_keys() -> dict[str, dict[str, tuple[str, str]]]:
    """Title of a table -> dotted key -> (default, meaning)."""
    tables: dict[str, dict[str, tuple[str, str]]] = {}
    _add(RunSettings, "", tables)
    methods_own = tables.setdefault("Method", {})
    for method in methods().values():
        methods_own |= {key: entry for key, entry in _entries(method).items() if key not in methods_own}
    rewards_own = tables.setdefault("Reward", dict(_OF_NO_CLASS))
    for reward in (rewards()["clip"], Augmentation, *rewards().values()):
        rewards_own |= {key: entry for key, entry in _entries(reward).items() if key not in rewards_own}
    return tables


def _add(section: type[Settings], title: str, tables: dict[str, dict[str, tuple[str, str]]]) -> None:
    title = section.title or title
    tables.setdefault(title, {}).update(_entries(section))
    for kind in section.part_classes().values():
        _add(kind, title, tables)


def _entries(section: type[Settings]) -> dict[str, tuple[str, str]]:
    defaults, meanings = section.defaults(), section.meanings()
    defaults |= dict.fromkeys(getattr(section, "needs", ()), "???")
    defaults |= {field: FAMILYS for field, key in section.keys().items() if key in family_layer("embedded").leaves}
    return {key: (_written(defaults[field]), meanings[field]) for field, key in section.keys().items()}


def _written(value: Any) -> str:
    """As YAML writes it."""
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def tables() -> str:
    """Markdown: one table a section, ``key | default | meaning``."""
    parts: list[str] = []
    for title, entries in documented_keys().items():
        parts += [f"### {title}", "", "| key | default | meaning, range |", "| --- | --- | --- |"]
        for key, (default, meaning) in entries.items():
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


def recipe_table() -> str:
    """Markdown: a row for each file of ``conf/family``."""
    columns = ("family", "guidance", "steps", "size", "learning rate, weight decay", "rank, alpha", "micro-batch",
               "gradient clip", "DRaFT+: K, KL")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for family in FAMILIES:
        cfg = load_config("draftp_sd", [f"family={family}"])
        infer, optim, lora = cfg.model.infer, cfg.model.optim, cfg.model.peft.lora_tuning
        size = "its own" if infer.height is None else f"{infer.height}²"
        own = [_or_own(infer.unconditional_guidance_scale), _or_own(infer.inference_steps), size]
        alpha = "rank" if lora.alpha is None else lora.alpha
        steps = f"{cfg.model.truncation_steps}, {cfg.model.kl_coeff:g}"
        cells = [f"`{family}`", *own, f"{optim.lr:g}, {optim.weight_decay:g}", f"{lora.adapter_dim}, {alpha}",
                 cfg.model.micro_batch_size, f"{cfg.trainer.draftp_sd.gradient_clip_val:g}", steps]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def _or_own(value: float | None) -> str:
    return "its own" if value is None else f"{value:g}"


def main(folder: str) -> None:
    for name, table in (
        *(("configuration.md", tables()), ("algorithms.md", method_table()), ("models.md", recipe_table())),
    ):
        page = Path(folder) / name
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        page.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
