"""Rebuild the embedded text-to-image model and its CLIP reward from two npm packages.

Example::

    python examples/mm/embedded_model/rebuild.py --work-dir ~/embedded_work

Stages, each resumable (run the same command again): ``data`` (fetch and caption), ``clip``, ``vae``, ``unet``,
``polish`` (CLIP's vision tower; may run beside ``unet``), ``package``. On two CPU cores they take about two hours
together; most of it is the denoiser. Every random number comes from fixed seeds, so two runs on one machine with the
same number of threads give the same weights, and other machines nearly so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

STAGES = ("data", "clip", "vae", "unet", "polish", "package")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="datasets, checkpoints and logs, about 1 GB")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only these stages; default: all in order")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--clip-steps", type=int, default=1400)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--polish-steps", type=int, default=800)
    parser.add_argument("--unet-steps", type=int, default=8000)
    parser.add_argument(
        "--assets",
        type=Path,
        default=Path(__file__).resolve().parents[3] / "nemo_aligner_diffusion" / "assets",
        help="where the finished files go (default: inside the package)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    from data import prepare
    from package_assets import package
    from polish_clip import polish_clip
    from train_clip import train_clip
    from train_unet import train_unet
    from train_vae import train_vae

    work_dir: Path = arguments.work_dir.expanduser()
    data = prepare(work_dir)
    print(f"{len(data.pictures)} pictures, {len(data.captions.texts)} captions")
    for stage in arguments.stage or STAGES:
        if stage == "clip":
            train_clip(data, work_dir, arguments.clip_steps)
        elif stage == "vae":
            train_vae(data, work_dir, arguments.vae_steps)
        elif stage == "unet":
            train_unet(data, work_dir, arguments.unet_steps)
        elif stage == "polish":
            polish_clip(data, work_dir, arguments.polish_steps)
        elif stage == "package":
            package(data, work_dir, arguments.assets)


if __name__ == "__main__":
    main()
