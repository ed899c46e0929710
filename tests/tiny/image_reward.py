"""An ``ImageReward.pt`` small enough for tests, and the published computation written out in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "cat", "on", "mat", "##s", "!", "green")
VOCABULARY = ("\n".join(WORDS) + "\n").encode()
PAD, UNK, CLS, SEP = 0, 1, 2, 3

IMAGE_SIZE, PATCH = 32, 8
VISION_WIDTH, VISION_HEADS, VISION_LAYERS = 24, 3, 2
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS = 20, 2, 3
HEAD_WIDTHS = (TEXT_WIDTH, 18, 12, 10, 6, 1)
MAX_LENGTH = 12
# ImageReward.pt holds these too; scoring never touches them.
UNUSED = ("blip.vision_proj", "blip.text_proj")


def toy_checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the keys, and in the shapes but for their sizes, of ``ImageReward.pt``."""
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def tensor(name: str, *shape: int, scale: float) -> None:
        state[name] = torch.randn(shape, generator=random) * scale

    def dense(name: str, inputs: int, outputs: int) -> None:
        tensor(f"{name}.weight", outputs, inputs, scale=1.5 / math.sqrt(inputs))
        tensor(f"{name}.bias", outputs, scale=0.3)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=random) * 0.2
        tensor(f"{name}.bias", width, scale=0.2)

    see = "blip.visual_encoder"
    tensor(f"{see}.cls_token", 1, 1, VISION_WIDTH, scale=1)
    tensor(f"{see}.pos_embed", 1, (IMAGE_SIZE // PATCH) ** 2 + 1, VISION_WIDTH, scale=1)
    tensor(f"{see}.patch_embed.proj.weight", VISION_WIDTH, 3, PATCH, PATCH, scale=0.2)
    tensor(f"{see}.patch_embed.proj.bias", VISION_WIDTH, scale=0.3)
    for layer in range(VISION_LAYERS):
        block = f"{see}.blocks.{layer}"
        norm(f"{block}.norm1", VISION_WIDTH)
        norm(f"{block}.norm2", VISION_WIDTH)
        dense(f"{block}.attn.qkv", VISION_WIDTH, 3 * VISION_WIDTH)
        dense(f"{block}.attn.proj", VISION_WIDTH, VISION_WIDTH)
        dense(f"{block}.mlp.fc1", VISION_WIDTH, 4 * VISION_WIDTH)
        dense(f"{block}.mlp.fc2", 4 * VISION_WIDTH, VISION_WIDTH)
    norm(f"{see}.norm", VISION_WIDTH)

    read = "blip.text_encoder"
    state[f"{read}.embeddings.position_ids"] = torch.arange(MAX_LENGTH + 4).expand(1, -1).clone()
    tensor(f"{read}.embeddings.word_embeddings.weight", len(WORDS) + 2, TEXT_WIDTH, scale=1)
    tensor(f"{read}.embeddings.position_embeddings.weight", MAX_LENGTH + 4, TEXT_WIDTH, scale=1)
    norm(f"{read}.embeddings.LayerNorm", TEXT_WIDTH)
    for layer in range(TEXT_LAYERS):
        inside = f"{read}.encoder.layer.{layer}"
        for attention, source_width in (("attention", TEXT_WIDTH), ("crossattention", VISION_WIDTH)):
            dense(f"{inside}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            dense(f"{inside}.{attention}.self.key", source_width, TEXT_WIDTH)
            dense(f"{inside}.{attention}.self.value", source_width, TEXT_WIDTH)
            dense(f"{inside}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{inside}.{attention}.output.LayerNorm", TEXT_WIDTH)
        dense(f"{inside}.intermediate.dense", TEXT_WIDTH, 4 * TEXT_WIDTH)
        dense(f"{inside}.output.dense", 4 * TEXT_WIDTH, TEXT_WIDTH)
        norm(f"{inside}.output.LayerNorm", TEXT_WIDTH)
    dense(UNUSED[0], VISION_WIDTH, 8)
    dense(UNUSED[1], TEXT_WIDTH, 8)
    for place, inputs, outputs in zip((0, 2, 4, 6, 7), HEAD_WIDTHS[:-1], HEAD_WIDTHS[1:], strict=True):
        dense(f"mlp.layers.{place}", inputs, outputs)
    return state


def reference_score(state: dict[str, Tensor], pixels: Tensor, ids: list[list[int]]) -> Tensor:
    """Raw scores ``(B,)`` of normalised pictures ``(B, 3, S, S)``; ``ids`` without padding, one list for each.

    Written from the papers (ViT: arXiv 2010.11929; BERT: arXiv 1810.04805; BLIP: arXiv 2201.12086, fig. 2, the
    image-grounded text encoder) and the published head. One picture at a time and without padding, so that neither a
    mask nor a batch can hide a mistake.
    """
    state = {name: tensor.to(pixels.dtype) for name, tensor in state.items() if tensor.is_floating_point()}
    return torch.stack([_one(state, picture, tokens) for picture, tokens in zip(pixels, ids, strict=True)])


def _one(state: dict[str, Tensor], picture: Tensor, tokens: list[int]) -> Tensor:
    def dense(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    see = "blip.visual_encoder"
    patches = [  # rows first
        picture[:, top : top + PATCH, left : left + PATCH].reshape(-1)
        for top in range(0, IMAGE_SIZE, PATCH)
        for left in range(0, IMAGE_SIZE, PATCH)
    ]
    kernel = state[f"{see}.patch_embed.proj.weight"].flatten(1)
    x = torch.cat(
        [state[f"{see}.cls_token"][0], linear(torch.stack(patches), kernel, state[f"{see}.patch_embed.proj.bias"])]
    )
    x = x + state[f"{see}.pos_embed"][0]
    for layer in range(VISION_LAYERS):
        block = f"{see}.blocks.{layer}"
        q, k, v = dense(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + dense(f"{block}.attn.proj", _attention(q, k, v, VISION_HEADS))
        x = x + dense(f"{block}.mlp.fc2", gelu(dense(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{see}.norm", x, 1e-6)

    read = "blip.text_encoder"
    x = state[f"{read}.embeddings.word_embeddings.weight"][tokens]
    x = x + state[f"{read}.embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(f"{read}.embeddings.LayerNorm", x, 1e-12)
    for layer in range(TEXT_LAYERS):
        inside = f"{read}.encoder.layer.{layer}"
        for name, source in (("attention", None), ("crossattention", seen)):
            at = f"{inside}.{name}"
            keys = x if source is None else source
            q, k, v = dense(f"{at}.self.query", x), dense(f"{at}.self.key", keys), dense(f"{at}.self.value", keys)
            mixed = dense(f"{at}.output.dense", _attention(q, k, v, TEXT_HEADS))
            x = norm(f"{at}.output.LayerNorm", mixed + x, 1e-12)
        fed = dense(f"{inside}.output.dense", gelu(dense(f"{inside}.intermediate.dense", x)))
        x = norm(f"{inside}.output.LayerNorm", fed + x, 1e-12)
    x = x[0]
    for place in (0, 2, 4, 6, 7):
        x = dense(f"mlp.layers.{place}", x)
    return x[0]


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Queries ``(Q, D)`` over keys and values ``(K, D)``, one head after the other."""
    size = q.shape[-1] // heads
    mixed = []
    for head in range(heads):
        channels = slice(head * size, (head + 1) * size)
        weights = (q[:, channels] @ k[:, channels].T / math.sqrt(size)).softmax(dim=-1)
        mixed.append(weights @ v[:, channels])
    return torch.cat(mixed, dim=-1)
