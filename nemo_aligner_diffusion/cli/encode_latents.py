"""``encode_latents.py``: preference shards through a model's VAE once, into latent shards."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_aligner_diffusion.command_line import Parser, whole_number
from nemo_aligner_diffusion.diffusion.settings import WeightsSettings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.ending import command

_EXAMPLES = """\
A run whose model.data.train.webdataset.local_root_path names the latent shards
takes them in place of the pictures; it refuses those of another VAE or size.

example: encode_latents.py preferences/train latents/ --model SD15_FOLDER"""


@command(interrupted="interrupted; nothing was written")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    given = vars(_parser().parse_args(argv))
    paths, output, model, vae, device, precision = (
        given.pop(name) for name in ("input", "output", "model", "vae", "device", "precision")
    )
    from nemo_aligner_diffusion.config.families import family_of, sampling_of
    from nemo_aligner_diffusion.diffusion.recognition import recognise

    usual = sampling_of(family_of(recognise(WeightsSettings(from_pretrained=model and str(model)), fetch=True))[0])
    # torch and all, only now
    from nemo_aligner_diffusion.data.preferences.encoding import Choices, encode_latents
    from nemo_aligner_diffusion.diffusion.generate import own_size
    from nemo_aligner_diffusion.diffusion.loading import load_model
    from nemo_aligner_diffusion.evaluation.generation import DTYPES, device_of

    place = device_of(device)
    loaded = load_model(model, None, vae, DTYPES[precision], only="vae")
    said = own_size(loaded) or (None, None)
    height = given.pop("height") or usual.height or said[0]
    width = given.pop("width") or usual.width or said[1]
    if height is None or width is None:
        raise ConfigurationError(
            f"{type(loaded.pipe).__name__} does not say how large its pictures are: expected --height and --width"
        )
    if "vae" in loaded.networks:  # what asks for it says that there is none
        loaded.networks["vae"].to(place)
    started = time.perf_counter()
    written, unusable = encode_latents(loaded, paths, output, Choices(height, width, **given))
    seconds = time.perf_counter() - started
    print(f"encoded  {written.samples:,} pairs of {width} x {height} in {seconds:.1f} s")
    print(f"shards   {len(written.paths):,} ({written.bytes:,} bytes) in {written.paths[0].parent}")
    print(f"unusable {unusable:,}{' left out' if unusable else ''}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Encode the pictures of preference shards once, for training without a VAE in the way.", _EXAMPLES)
    add = parser.add_argument
    add("input", nargs="+", help="preference shards, folders of them, globs or brace ranges")
    add("output", type=Path, help="folder for latents-0000.tar, …; made if missing")
    add("--model", type=Path, metavar="PATH", help="diffusers folder, hub id or file (default: embedded)")
    add("--vae", type=Path, metavar="PATH", help="another VAE: a folder or a file")
    add("--height", type=whole_number, metavar="PX", help="default: the model's own")
    add("--width", type=whole_number, metavar="PX", help="default: the model's own")
    add("--crop", choices=("center", "random"), default="center", help="as model.preference.crop (default: center)")
    add("--flip", action="store_true", help="as model.preference.flip; drawn once, not anew each epoch")
    add("--seed", type=int, default=0, help="of random crops and mirroring (default: 0)")
    add("--batch-size", type=whole_number, default=4, metavar="N", help="pairs at a time (default: 4)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    add("--precision", choices=("32", "bf16", "16"), default="32", help="of the VAE (default: 32)")
    skip = "leave out and count unusable pairs"
    add("--skip-bad-samples", dest="on_bad_sample", action="store_const", const="skip", default="error", help=skip)
    add("--overwrite", action="store_true", help="replace earlier latent shards in the folder")
    return parser
