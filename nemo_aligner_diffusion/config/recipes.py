"""Where ``conf/`` is and what it offers. Imports next to nothing: ``--help`` shows it."""

from __future__ import annotations

from pathlib import Path

from nemo_aligner_diffusion.errors import ConfigurationError

FAMILY = "family"  # the group that the checkpoint picks; the others are Hydra's
_OTHER_PROGRAMS = ("reward_model",)  # configurations in conf/ that are no recipe of the diffusion trainers


def conf_directory() -> Path:
    """``conf/``: inside the package where it was installed from a wheel, beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "draftp_sd.yaml").is_file():
            return folder
    raise ConfigurationError(
        f"the recipes are missing: neither {package / 'conf'} nor {package.parent / 'conf'} holds draftp_sd.yaml; "
        "install nemo-aligner-diffusion again"
    )


def recipes() -> dict[str, str]:
    """Recipe name -> its first comment line."""
    return {
        file.stem: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for file in sorted(conf_directory().glob("*.yaml"))
        if file.stem not in _OTHER_PROGRAMS
    }


def groups(folder: Path | None = None) -> dict[str, list[str]]:
    """Group name -> its options, as in ``rm=symmetry``."""
    folder = folder or conf_directory()
    return {
        group.name: options
        for group in sorted(folder.iterdir())
        if group.is_dir()
        and group.name != "base"
        and (options := sorted(file.stem for file in group.glob("*.yaml") if file.stem != "base"))
    }
