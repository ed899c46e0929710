"""What every configuration key accepts: its type, range and choices. Defaults live in ``conf/``, next to their meaning.

Imports nothing heavy: a misspelt key must be reported in well under a second.

A key is written dotted. ``trainer.<loop>.x`` stands for the training loop's section, which carries the recipe's name
(``trainer.draftp_sd.x`` in ``draftp_sd.yaml``). A ``*`` at the end stands for anything below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError

LOOP = "<loop>"


@dataclass(frozen=True)
class Kind:
    """One key's type and range.

    Attributes:
        name: ``bool``, ``int``, ``float``, ``text``, ``path``, ``texts`` (list), ``ints``, ``floats`` (lists),
            ``paths`` (one path or a list), ``devices``, ``any``.
        low, high: bounds, both included unless ``open_low``/``open_high``; of each entry for lists.
        choices: the only values, compared without regard to case; the spelling given here is what is kept.
        length: number of entries of a list.
        nullable: whether ``null`` is a value.
    """

    name: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    length: int | None = None
    nullable: bool = False

    def describe(self) -> str:
        """The expectation in words, as error messages and the documentation show it."""
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        else:
            text = {
                "bool": "true or false",
                "int": "an integer",
                "float": "a number",
                "text": "text",
                "path": "a path",
                "paths": "a path or a list of paths",
                "texts": "a list of texts",
                "ints": "a list of integers",
                "floats": "a list of numbers",
                "devices": "an integer >= 1 or a list of device indices",
                "any": "anything",
            }[self.name]
            if self.length is not None:
                text = text.replace("a list of", f"a list of {self.length}")
            bounds = []
            if self.low is not None:
                bounds.append(f"{'>' if self.open_low else '>='} {self.low:g}")
            if self.high is not None:
                bounds.append(f"{'<' if self.open_high else '<='} {self.high:g}")
            text = " ".join([text, *([" and ".join(bounds)] if bounds else [])])
        return f"{text}, or null" if self.nullable else text

    def read(self, key: str, value: Any) -> Any:
        """``value`` as this kind.

        Raises:
            ConfigurationError: naming the key, the value and what was expected.
        """
        if value is None:
            if self.nullable or self.name == "any":
                return None
            raise self._wrong(key, value)
        reader = getattr(self, f"_read_{self.name}")
        result = reader(value)
        if result is None:
            hint = ""
            if value == "" and self.name in ("path", "paths"):
                hint = " (an unset shell variable? write null for the default)"
            raise self._wrong(key, value, hint)
        return result

    def _wrong(self, key: str, value: Any, hint: str = "") -> ConfigurationError:
        given = "null" if value is None else repr(value)
        return ConfigurationError(f"{key} = {given}: expected {self.describe()}{hint}")

    def _inside(self, value: float) -> bool:
        if self.low is not None and (value < self.low or (self.open_low and value == self.low)):
            return False
        return not (self.high is not None and (value > self.high or (self.open_high and value == self.high)))

    # Each reader returns None for a value that is not of its kind.
    def _read_any(self, value: Any) -> Any:
        return value

    def _read_bool(self, value: Any) -> bool | None:
        return value if isinstance(value, bool) else None

    def _read_int(self, value: Any) -> int | None:
        number = _number(value)
        if number is None or number != int(number) or not self._inside(number):
            return None
        return value if isinstance(value, int) else int(number)

    def _read_float(self, value: Any) -> float | int | None:
        number = _number(value)
        if number is None or not self._inside(number):
            return None
        # An integer stays one: trainer.<loop>.limit_val_batches counts batches with it.
        return value if isinstance(value, int) else number

    def _read_text(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        text = str(value)
        if not self.choices:
            return text
        return next((choice for choice in self.choices if choice.lower() == text.lower()), None)

    def _read_path(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        return str(value) or None

    def _read_paths(self, value: Any) -> str | list[str] | None:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return self._list(value, self._read_path)
        return self._read_path(value)

    def _read_texts(self, value: Any) -> list[str] | None:
        return self._list(value, self._read_text)

    def _read_ints(self, value: Any) -> list[int] | None:
        return self._list(value, self._read_int)

    def _read_floats(self, value: Any) -> list[float] | None:
        return self._list(value, self._read_float)

    def _read_devices(self, value: Any) -> int | list[int] | None:
        if isinstance(value, Sequence) and not isinstance(value, str):
            indices = Kind("ints", low=0)._read_ints(value)
            return indices if indices and len(set(indices)) == len(indices) else None
        return Kind("int", low=1)._read_int(value)

    def _list(self, value: Any, read: Any) -> list[Any] | None:
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            return None
        entries = [read(entry) for entry in value]
        if any(entry is None for entry in entries) or (self.length is not None and len(entries) != self.length):
            return None
        return entries


def _number(value: Any) -> float | int | None:
    """A finite number, also where YAML 1.1 or the shell left it a string (``1e-4``); None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


BOOL = Kind("bool")
TEXT = Kind("text")
PATH = Kind("path", nullable=True)
PATHS = Kind("paths", nullable=True)
ANY = Kind("any")
FRACTION = Kind("float", low=0, high=1, open_high=True)
SHARE = Kind("float", low=0, high=1, nullable=True)


def integer(low: int | None = None, *, nullable: bool = False) -> Kind:
    return Kind("int", low=low, nullable=nullable)


def number(low: float | None = None, *, above: float | None = None, nullable: bool = False) -> Kind:
    return Kind("float", low=low if above is None else above, open_low=above is not None, nullable=nullable)


def choice(*choices: str, nullable: bool = False) -> Kind:
    return Kind("text", choices=choices, nullable=nullable)


ALGORITHMS = ("draft", "draft_k", "draft_lv", "draft+", "drtune", "refl", "alignprop")
# The names that diffusion/sampler.py, training/optimizers.py, training/schedules.py and rewards/ know (a test holds
# them together: this file may not import torch).
SAMPLERS = ("DDIM", "PLMS", "Euler", "DPM++2M", "DPM++2M_SDE", "UniPC", "DPM", "DPMSolver++", "PARA_DDIM")
OPTIMIZERS = ("fused_adam", "adamw", "adam", "sgd")
SCHEDULES = ("WarmupHoldPolicy", "CosineAnnealing", "constant")
# Each reward and the entries of `rm` that it reads.
REWARDS: dict[str, tuple[str, ...]] = {
    "clip": ("model", "trainer"),
    "symmetry": (),
    "compressibility": ("quality", "chroma_subsampling", "reduction"),
    "incompressibility": ("quality", "chroma_subsampling", "reduction"),
    "composite": ("parts", "trainer"),
}
SCORES = ("pickscore", "hps", "clipscore")
REDUCTIONS = ("sum", "mean")
PRECISIONS = ("32", "16", "bf16", "64", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")

KEYS: dict[str, Kind] = {
    "name": TEXT,
    "trainer.num_nodes": integer(1),
    "trainer.devices": Kind("devices"),
    "trainer.accelerator": choice("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.precision": choice(*PRECISIONS),
    "trainer.log_every_n_steps": integer(1),
    f"trainer.{LOOP}.max_epochs": integer(1, nullable=True),
    f"trainer.{LOOP}.max_steps": integer(1),
    f"trainer.{LOOP}.val_check_interval": integer(0),
    f"trainer.{LOOP}.limit_val_batches": number(0),
    f"trainer.{LOOP}.save_interval": integer(0),
    f"trainer.{LOOP}.gradient_clip_val": number(0, nullable=True),
    "exp_manager.explicit_log_dir": PATH,
    "exp_manager.exp_dir": PATH,
    "exp_manager.name": TEXT,
    "exp_manager.version": Kind("text", nullable=True),
    "exp_manager.create_wandb_logger": BOOL,
    "exp_manager.wandb_logger_kwargs.*": ANY,
    "exp_manager.create_tensorboard_logger": BOOL,
    "exp_manager.resume_if_exists": BOOL,
    "exp_manager.resume_ignore_no_checkpoint": BOOL,
    "exp_manager.max_time_per_run": Kind("text", nullable=True),
    "exp_manager.ema.enable": BOOL,
    "exp_manager.ema.decay": FRACTION,
    "exp_manager.ema.every_n_steps": integer(1),
    "exp_manager.ema.validate_original_weights": BOOL,
    "exp_manager.ema.cpu_offload": BOOL,
    "model.from_pretrained": PATH,
    "model.unet_config.from_pretrained": PATH,
    "model.first_stage_config.from_pretrained": PATH,
    "model.seed": Kind("int", low=0, high=2**63 - 1),
    "model.micro_batch_size": integer(1),
    "model.global_batch_size": integer(1),
    "model.decode_micro_batch_size": integer(1, nullable=True),
    "model.tensor_model_parallel_size": integer(1),
    "model.activation_checkpointing": BOOL,
    "model.infer.unconditional_guidance_scale": number(0),
    "model.infer.inference_steps": Kind("int", low=1, high=1000),
    "model.infer.sampler_type": choice(*SAMPLERS),
    "model.infer.eta": Kind("float", low=0, high=1),
    "model.infer.height": integer(8, nullable=True),
    "model.infer.width": integer(8, nullable=True),
    "model.nan_policy.max_consecutive": integer(0),
    "model.algorithm": choice(*ALGORITHMS),
    "model.reward_scale": number(above=0),
    "model.reward_margin": number(nullable=True),
    "model.kl_coeff": number(0),
    "model.truncation_steps": integer(1),
    "model.drtune.train_steps": integer(1),
    "model.drtune.early_stop_steps": integer(0),
    "model.draft_lv.samples": integer(1),
    "model.refl.window": Kind("ints", low=0, length=2, nullable=True),
    "model.alignprop.min_truncation_steps": integer(1),
    "model.alignprop.max_truncation_steps": integer(1, nullable=True),
    "model.peft.peft_scheme": choice("sdlora", "none"),
    "model.peft.lora_tuning.adapter_dim": integer(1),
    "model.peft.lora_tuning.alpha": number(above=0, nullable=True),
    "model.peft.lora_tuning.dropout": FRACTION,
    "model.peft.lora_tuning.target_modules": Kind("texts"),
    "model.optim.name": choice(*OPTIMIZERS),
    "model.optim.lr": number(above=0),
    "model.optim.weight_decay": number(0),
    "model.optim.betas": Kind("floats", low=0, high=1, open_high=True, length=2),
    "model.optim.eps": number(above=0),
    "model.optim.momentum": FRACTION,
    "model.optim.nesterov": BOOL,
    "model.optim.sched.name": choice(*SCHEDULES),
    "model.optim.sched.warmup_steps": integer(0, nullable=True),
    "model.optim.sched.warmup_ratio": SHARE,
    "model.optim.sched.hold_steps": integer(0, nullable=True),
    "model.optim.sched.hold_ratio": SHARE,
    "model.optim.sched.constant_steps": integer(0, nullable=True),
    "model.optim.sched.constant_ratio": SHARE,
    "model.optim.sched.min_lr": number(0),
    "model.data.num_workers": integer(0),
    "model.data.shuffle_buffer": integer(0),
    "model.data.on_bad_sample": choice("error", "skip"),
    "model.data.train.webdataset.local_root_path": PATHS,
    "model.data.validation.webdataset.local_root_path": PATHS,
    "model.data.validation.prompts": Kind("texts", nullable=True),
    "model.data.validation.max_prompts": integer(1),
    "model.data.validation.seeds": Kind("ints", low=0),
    "rm.name": choice(*REWARDS),
    "rm.model.restore_from_path": PATH,
    "rm.model.micro_batch_size": integer(1, nullable=True),
    "rm.model.activation_checkpointing": BOOL,
    "rm.model.score": choice(*SCORES, nullable=True),
    "rm.model.tokenizer": PATH,
    "rm.trainer.precision": choice(*PRECISIONS),
    "rm.quality": Kind("int", low=1, high=100),
    "rm.chroma_subsampling": BOOL,
    "rm.reduction": choice(*REDUCTIONS),
    "rm.parts.*": ANY,
    "report.enable": BOOL,
    "report.max_prompts": integer(1),
}


# Two ways to say one thing: a layer that gives one of them takes the other back.
EITHER_OR: dict[str, str] = {
    f"model.optim.sched.{name}_{way}": f"model.optim.sched.{name}_{other}"
    for name in ("warmup", "hold", "constant")
    for way, other in (("steps", "ratio"), ("ratio", "steps"))
}


def kind_of(key: str, loop: str) -> Kind | None:
    """The kind of a dotted key, None for a key the schema does not know. ``loop``: name of the loop's section."""
    if key.startswith(f"trainer.{loop}."):
        key = f"trainer.{LOOP}." + key.removeprefix(f"trainer.{loop}.")
    if key in KEYS:
        return KEYS[key]
    for pattern, kind in KEYS.items():
        if pattern.endswith(".*") and (key.startswith(pattern[:-1]) or key == pattern[:-2]):
            return kind
    return None


def known_keys(loop: str) -> list[str]:
    """Every key, with the loop's section under its own name; sections of free content end in ``*``."""
    return [key.replace(LOOP, loop) for key in KEYS]


def is_section(key: str, loop: str) -> bool:
    return any(known.startswith(key + ".") for known in known_keys(loop))


def is_free_section(key: str) -> bool:
    """Whether anything may stand below ``key`` (an empty mapping is then a value)."""
    return f"{key}.*" in KEYS


MAX_TIME = re.compile(r"\d+:\d\d:\d\d:\d\d")


def read_values(leaves: Mapping[str, Any], loop: str) -> dict[str, Any]:
    """Check every leaf against its kind and return it converted. Keys are known already.

    Raises:
        ConfigurationError: for the first value that is not what its key accepts.
    """
    result: dict[str, Any] = {}
    for key, value in leaves.items():
        kind = kind_of(key, loop)
        assert kind is not None, key
        result[key] = kind.read(key, value)
    limit = result.get("exp_manager.max_time_per_run")
    if limit is not None and not MAX_TIME.fullmatch(limit):
        raise ConfigurationError(
            f"exp_manager.max_time_per_run = {limit!r}: expected days:hours:minutes:seconds such as 00:03:45:00, "
            "or null"
        )
    return result
