"""The work of ``nad-encode-latents``: pairs of pictures through the VAE once, into latent shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nemo_aligner_diffusion.data.bad_samples import OnBadSample
from nemo_aligner_diffusion.data.paths import PathSpec
from nemo_aligner_diffusion.data.preferences.latents import Encoding, write_moments
from nemo_aligner_diffusion.data.preferences.pairs import PairDataset, Wanted
from nemo_aligner_diffusion.data.preferences.settings import PairSettings
from nemo_aligner_diffusion.data.preferences.shards import MOMENTS, format_label
from nemo_aligner_diffusion.data.shards import Sample, WrittenShards, write_sample_shards
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.latents import moments, vae_fingerprint
from nemo_aligner_diffusion.errors import DataError


@dataclass(frozen=True)
class Choices:
    """How pairs are encoded.

    Attributes:
        height, width: in pixels.
        crop, flip: as :class:`.PairSettings` says; drawn once, keyed by ``seed`` and the pair's number.
        batch_size: pairs at a time.
        on_bad_sample: stop at an unusable pair, or leave it out and count it.
        overwrite: replace the shards there.
    """

    height: int
    width: int
    crop: str = "center"
    flip: bool = False
    seed: int = 0
    batch_size: int = 4
    on_bad_sample: OnBadSample = "error"
    overwrite: bool = False


def encode_latents(model: DiffusionModel, paths: PathSpec, output: Path, choices: Choices) -> tuple[WrittenShards, int]:
    """Write ``output/latents-0000.tar``, …, all of them complete under their names or none; equal pairs, equal bytes.

    A shard for each of the given ones, with its pairs in their order: a run on the latents sees them in the order of a
    run on the pictures. Ties stay, for a run decides about them.

    Returns:
        what was written, and how many unusable samples were left out.

    Raises:
        DataError: a pair is unusable, or encoded already.
        OutputError: ``output`` cannot be written, or holds such shards and ``overwrite`` is not set.
    """
    size = choices.height, choices.width
    made = Encoding(vae_fingerprint(model), *size, choices.crop, choices.flip, choices.seed)
    data = PairDataset(
        paths,
        settings=PairSettings(crop=choices.crop, flip=choices.flip, tie_weight=1.0),
        wanted=Wanted(*size),
        micro_batch_size=choices.batch_size,
        seed=choices.seed,
        shuffle_buffer=0,
        epochs=1,
        incomplete="wrap",
        on_bad_sample=choices.on_bad_sample,
    )
    if data.has_latents:
        raise DataError(f"{data.named()}: holds latents already; expected shards of pictures")

    def encoded() -> Iterator[Sample]:
        for batch in data:
            both = moments(model, batch["pictures"].flatten(0, 1)).unflatten(0, (-1, 2))
            for row, number in enumerate(batch["index"].tolist()):
                if number < len(data.index):  # the others fill the last batch
                    yield [
                        (f"{number:09d}.{MOMENTS}", write_moments(both[row], made)),
                        (f"{number:09d}.txt", batch["prompts"][row].encode()),
                        (f"{number:09d}.label", _label(batch["labels"][row]).encode()),
                    ]

    each = [count for count in data.index.counts.tolist() if count]
    written = write_sample_shards(encoded(), output, "pair", each, None, False, "latents", choices.overwrite)
    return written, data.index.left_out["samples"]


def _label(shares: Tensor) -> str:
    """The shortest text that reads back as the same float32."""
    first, second = (float(str(share)) for share in shares.numpy())
    return format_label((first, second))
