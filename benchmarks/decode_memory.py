"""Peak memory of a reward's gradient through a VAE's decoder, by the ways there are to decode.

Counted on tensors that have shapes and no memory, as the planner does, so that 1024² needs no GPU; ``--measure`` takes
the allocator's own events on this CPU beside it. The reward is trivial: the decoder alone makes the peak. Its weights
were there before and do not count.

    python -m benchmarks.decode_memory                        # SD's decoder, two pictures of 1024², bf16 and float32
    python -m benchmarks.decode_memory --measure --pixels 128 --width 32
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from benchmarks.memory_vs_active_steps import peak_allocated_bytes
from nemo_aligner_diffusion.diffusion.decoding import decode
from nemo_aligner_diffusion.diffusion.trajectory import reward_gradient
from nemo_aligner_diffusion.planner.kernels import gpu_kernels
from nemo_aligner_diffusion.planner.ledger import Ledger
from nemo_aligner_diffusion.planner.plan import quiet
from nemo_aligner_diffusion.planner.shapes import ShapesMode, without_memory

# name -> rows at a time, tile of a picture's side, checkpointing, small decoder
KINDS: dict[str, tuple[int | None, int | None, bool, bool]] = {
    "plain": (None, None, False, False),
    "a picture at a time": (1, None, False, False),
    "checkpointing": (None, None, True, False),
    "a picture at a time, checkpointing": (1, None, True, False),
    "a picture at a time, tiles of half its side": (1, 2, False, False),
    "a picture at a time, small decoder": (1, None, False, True),
}


def autoencoder(small: bool, width: int = 128) -> Any:
    """Of Stable Diffusion's shape (``width`` 128), or TAESD's."""
    if small:
        return AutoencoderTiny(decoder_block_out_channels=(width // 2,) * 4, encoder_block_out_channels=(8,) * 4)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        sample_size=1024,
    )


def gradient_of(vae: Any, kind: str, latents: Tensor) -> Callable[[], Any]:
    """Decoding, score and gradient as in a training step."""
    rows, parts, checkpointing, _ = KINDS[kind]
    vae.requires_grad_(False).eval()
    if checkpointing:
        vae.enable_gradient_checkpointing()

    def gradient() -> None:
        leaf = latents.detach().requires_grad_()
        tile = None if parts is None else latents.shape[-1] * 8 // parts
        with torch.enable_grad():
            pictures = decode(vae, leaf, rows, return_dict=False, tile=tile)[0]
        reward_gradient(pictures, [leaf], lambda p, *_: p.square().mean((1, 2, 3)), None, 0, 1, rows, 1.0)

    return gradient


def counted(kind: str, pixels: int, pictures: int, dtype: torch.dtype, width: int = 128, gpu: bool = True) -> int:
    """Bytes, on fake tensors."""
    with torch.device("meta"):
        vae = autoencoder(KINDS[kind][3], width).to(dtype)
    mode = ShapesMode()
    without_memory(vae, mode)
    with mode, gpu_kernels() if gpu else torch.enable_grad(), Ledger([*vae.parameters(), *vae.buffers()]) as ledger:
        latents = torch.empty(pictures, 4, pixels // 8, pixels // 8, dtype=dtype)
        work = gradient_of(vae, kind, latents)
        with ledger.phase() as record:
            work()
    return record.peak


def measured(kind: str, pixels: int, pictures: int, dtype: torch.dtype, width: int = 128) -> int:
    """Bytes, on this CPU."""
    vae = autoencoder(KINDS[kind][3], width).to(dtype)
    return peak_allocated_bytes(gradient_of(vae, kind, torch.randn(pictures, 4, pixels // 8, pixels // 8, dtype=dtype)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=1024, help="side of the pictures (default 1024)")
    parser.add_argument("--pictures", type=int, default=2, help="in the batch (default 2)")
    parser.add_argument("--width", type=int, default=128, help="of the decoder's last block (default 128, as SD's)")
    parser.add_argument("--measure", action="store_true", help="on this CPU too, float32 alone")
    arguments = parser.parse_args()
    quiet()
    size = arguments.pixels, arguments.pictures
    print(f"{size[1]} pictures of {size[0]}²: GB (share of the first row)")
    first: dict[str, int] = {}
    for kind in KINDS:
        if arguments.measure:
            cells = {"counted": counted(kind, *size, torch.float32, arguments.width, gpu=False),
                     "measured": measured(kind, *size, torch.float32, arguments.width)}  # fmt: skip
        else:
            cells = {name: counted(kind, *size, dtype, arguments.width)
                     for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32))}  # fmt: skip
        shown = []
        for name, peak in cells.items():
            first.setdefault(name, peak)
            shown.append(f"{name} {peak / 1e9:.3g} ({peak / first[name]:.2f})")
        print(f"{kind:60}" + "   ".join(shown), flush=True)


if __name__ == "__main__":
    main()
