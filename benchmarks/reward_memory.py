"""Peak memory of a reward's forward and backward pass against the number of pictures (`rewards/base.py`).

Sums the allocator's own events, as :mod:`benchmarks.memory_vs_active_steps` does. Weights and pictures exist before and
do not count; the gradient in the pictures does, though it is the result: no way of computing saves it. Networks are of
middle size (12 layers of width 384 at 224 pixels) with random weights.

    python -m benchmarks.reward_memory
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory_vs_active_steps import peak_allocated_bytes
from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.rewards import CLIPReward, ImageReward, Reward, restore_reward
from nemo_aligner_diffusion.rewards.image_reward.reward import ImageRewardNetwork
from nemo_aligner_diffusion.rewards.image_reward.tokenizer import tokenizer_from_bytes

SETTINGS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "micro-batches of 1": {"micro_batch_size": 1},
    "checkpointing": {"activation_checkpointing": True},
    "both": {"micro_batch_size": 1, "activation_checkpointing": True},
}


def clip_reward(layers: int = 12, width: int = 384, size: int = 224) -> CLIPReward:
    """A CLIP whose vision tower is random and whose words are the embedded reward's."""
    from transformers import CLIPConfig, CLIPModel

    embedded = restore_reward(embedded_reward_path())
    assert isinstance(embedded, CLIPReward)
    words: Any = embedded.model.config.text_config
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    vision = {**sizes, "num_hidden_layers": layers, "image_size": size, "patch_size": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=words.to_dict(), vision_config=vision, projection_dim=width)
    return CLIPReward(CLIPModel(config), embedded.tokenizer)


def image_reward(layers: int = 12, width: int = 384, size: int = 224) -> ImageReward:
    """An ImageReward of random weights that knows two words."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    vision = {**sizes, "num_hidden_layers": layers, "image_size": size, "patch_size": 16}
    text = {**sizes, "num_hidden_layers": layers // 2, "vocab_size": 9, "max_position_embeddings": 35}
    tokenizer = tokenizer_from_bytes(b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\napple\n", 9, "benchmark")
    torch.manual_seed(0)
    return ImageReward(ImageRewardNetwork(vision, text, [1024, 128, 64, 16]), tokenizer)


def configured(reward: Any, micro_batch_size: int | None = None, activation_checkpointing: bool = False) -> Reward:
    """``reward`` itself, computing as told."""
    reward.micro_batch_size, reward.activation_checkpointing = micro_batch_size, activation_checkpointing
    result: Reward = reward
    return result


def gradient(reward: Reward, images: Tensor) -> Tensor:
    """Of the mean score in ``images`` ``(B, 3, H, W)``."""
    leaf = images.detach().requires_grad_()
    (result,) = torch.autograd.grad(reward(leaf, ["red apple"] * len(leaf)).mean(), leaf)
    return result


def peaks(reward: Any, batches: list[int], side: int, **settings: Any) -> list[int]:
    """Peak bytes of :func:`gradient` for each number of pictures of ``side`` pixels."""
    configured(reward, **settings)
    pictures = torch.rand(max(batches), 3, side, side, generator=torch.Generator().manual_seed(0))
    gradient(reward, pictures[:1])  # one-time allocations
    return [peak_allocated_bytes(partial(gradient, reward, pictures[:batch])) for batch in batches]


def difference_in_float64(reward: Reward, side: int) -> float:
    """How far the gradients under the settings lie apart, relative to the largest entry; in float64, two pictures."""
    reward.double()
    pictures = torch.rand(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, *others = [gradient(configured(reward, **settings), pictures) for settings in SETTINGS.values()]
    reward.float()
    return max(((other - first).abs().max() / first.abs().max()).item() for other in others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="pictures (default 1 2 4 8)")
    parser.add_argument("--side", type=int, default=512, help="of the pictures, pixels (default 512)")
    arguments = parser.parse_args()
    for build in (clip_reward, image_reward):
        reward = build()
        print(f"{type(reward).__name__}, {arguments.side}² pictures: MB (ratio to the first row)")
        print(" ".join([f"{'pictures':>9}", *(f"{name:>20}" for name in SETTINGS)]))
        columns = [peaks(reward, arguments.batches, arguments.side, **settings) for settings in SETTINGS.values()]
        for row, batch in enumerate(arguments.batches):
            cells = [f"{column[row] / 1e6:.1f} ({column[row] / column[0]:.2f})" for column in columns]
            print(" ".join([f"{batch:>9}", *(f"{cell:>20}" for cell in cells)]))
        print(f"largest relative difference of their gradients in float64: {difference_in_float64(reward, 256):.1e}")


if __name__ == "__main__":
    main()
