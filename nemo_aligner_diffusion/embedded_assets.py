"""Where the files that ship inside the package lie: the embedded model, its reward and its prompts.

(The folder is ``nemo_aligner_diffusion/assets/``; a module of that name would shadow it.)
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from nemo_aligner_diffusion.errors import AlignerError


def embedded_model_path() -> Path:
    """The embedded text-to-image model, a folder in ``diffusers`` layout (64×64 RGB)."""
    return _asset("embedded_model")


def embedded_reward_path() -> Path:
    """The embedded reward, a ``.nemo`` holding a small CLIP and its tokenizer."""
    return _asset("embedded_reward.nemo")


def embedded_prompts_path(split: str) -> Path:
    """The embedded prompts of ``split`` (``train`` or ``validation``), a UTF-8 text file with one prompt a line."""
    return _asset(f"prompts_{split}.txt")


def _asset(name: str) -> Path:
    # Packages are installed unzipped (setuptools), so a resource is a real path that other libraries can open.
    path = Path(str(files("nemo_aligner_diffusion") / "assets" / name))
    if not path.exists():
        raise AlignerError(
            f"The package's own file {path} is missing. Reinstall nemo-aligner-diffusion, "
            "or rebuild the embedded model with the script under examples/mm/."
        )
    return path
