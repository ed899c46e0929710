"""Preference pairs that a tiny CLIP can learn, shards of them, and a start for reward training."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nemo_aligner_diffusion.data.preferences.shards import PreferencePair, write_preference_shards
from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo

from .clip import tokenizer_files, toy_clip


def encode(array: np.ndarray, kind: str = "PNG") -> bytes:
    """``(H, W, 3)`` in [0, 1] as an encoded picture."""
    stream = io.BytesIO()
    Image.fromarray((array * 255).round().astype(np.uint8)).save(stream, kind)
    return stream.getvalue()


def picture(redness: float, seed: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Noise around a colour between blue (0) and red (1)."""
    noise = np.random.default_rng(seed).normal(0, 0.08, (*size, 3))
    return np.clip(np.array([0.2 + 0.6 * redness, 0.4, 0.8 - 0.6 * redness]) + noise, 0, 1)


def blue_pairs(
    count: int, seed: int = 0, prompts: Sequence[str] = ("a cat", "an apple", "red"), size: tuple[int, int] = (32, 32)
) -> list[PreferencePair]:
    """The bluer picture is preferred (the untrained toy prefers the redder one); less than 0.1 apart is a tie."""
    generator = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        first, second = generator.random(2)
        label = (0.5, 0.5) if abs(first - second) < 0.1 else (1.0, 0.0) if first < second else (0.0, 1.0)
        both = [
            encode(picture(red, seed * 100_000 + 2 * number + side, size)) for side, red in enumerate((first, second))
        ]
        pairs.append(PreferencePair((both[0], both[1]), prompts[number % len(prompts)], label))
    return pairs


def blue_shards(folder: Path, count: int, seed: int = 0, samples_per_shard: int = 40) -> Path:
    write_preference_shards(blue_pairs(count, seed), folder, samples_per_shard=samples_per_shard)
    return folder


def toy_nemo(path: Path, seed: int = 0) -> Path:
    """A tiny CLIP reward archive."""
    return convert_hf_clip_to_nemo(toy_clip(seed), tokenizer_files(), path)


def overrides(folder: Path, run: str = "run", **changed: object) -> list[str]:
    """The command line of a small training in ``folder`` (start.nemo, train/, validation/)."""
    settings: dict[str, object] = {
        "model.restore_from_path": folder / "start.nemo",
        "model.data.train.webdataset.local_root_path": folder / "train",
        "model.data.validation.webdataset.local_root_path": folder / "validation",
        "model.data.shuffle_buffer": 50,
        "model.micro_batch_size": 16,
        "model.global_batch_size": 16,
        "model.optim.lr": 2e-3,
        "model.optim.sched.warmup_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 20,
        "trainer.val_check_interval": 5,
        "trainer.save_interval": 0,
        "exp_manager.explicit_log_dir": folder / run,
        **{key.replace("__", "."): value for key, value in changed.items()},
    }
    return [f"{key}={value}" for key, value in settings.items()]


def run_told(words: list[str], step: int | None = None, number: int = signal.SIGTERM, rank: int = 0) -> int:
    """A training in this process; its exit code. In optimizer step ``step`` process ``rank`` gets a signal.

    Args:
        step: 0: inside ``trainer.fit``, before anything has been resumed; None: there is no signal.
    """
    from nemo_aligner_diffusion.reward_training.configuration import load_reward_config
    from nemo_aligner_diffusion.reward_training.run import run_reward_training

    with _told_in(step, number, rank):
        return run_reward_training(load_reward_config(words))


@contextlib.contextmanager
def _told_in(step: int | None, number: int, rank: int) -> Iterator[None]:
    from nemo_aligner_diffusion.reward_training.preference_clip import PreferenceCLIP

    name = "training_step" if step else "configure_optimizers"
    method = getattr(PreferenceCLIP, name)

    def told(module: PreferenceCLIP, *arguments: object) -> object:
        if step is not None and module.global_step == max(step - 1, 0) and module.trainer.global_rank == rank:
            os.kill(os.getpid(), number)
        return method(module, *arguments)

    setattr(PreferenceCLIP, name, told)
    try:
        yield
    finally:
        setattr(PreferenceCLIP, name, method)
