"""What comes on the screen: our own lines, and of other libraries only what concerns the user. Imports none of them."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

from nemo_aligner_diffusion.streams import log_to_stderr

_LIGHTNING = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")
_PIPELINES = ("diffusers", "transformers")
_ASIDES = (
    ".*does not have many workers.*",
    ".*isinstance.treespec.*",
    ".*IterableDataset.*__len__.*",
    ".*in eval mode at the start of training.*",  # frozen parts, on purpose
    ".*`srun` command is available.*",  # process.check_agrees says what matters
    ".*functional.all_gather is deprecated.*",  # Lightning's to mend
)


def log_to_screen() -> None:
    """For a command: our lines are shown, and the libraries are quiet."""
    log_to_stderr()
    logging.getLogger("nemo_aligner_diffusion").setLevel(logging.INFO)
    quiet_libraries()


def quiet_libraries() -> None:
    """From here on, errors alone of Lightning and, where they have been imported, of diffusers and transformers."""
    for name in _LIGHTNING:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in _PIPELINES:
        if name in sys.modules:
            library = sys.modules[name].utils.logging
            library.set_verbosity_error()
            library.disable_progress_bar()
    for pattern in _ASIDES:
        warnings.filterwarnings("ignore", pattern)


@contextlib.contextmanager
def with_quiet_libraries() -> Iterator[None]:
    """:func:`quiet_libraries` within; for a run inside a program that logs as it likes."""
    levels = {name: logging.getLogger(name).level for name in (*_LIGHTNING, *_PIPELINES)}
    shown = [
        library for name in _PIPELINES if name in sys.modules
        and (library := sys.modules[name].utils.logging).is_progress_bar_enabled()
    ]  # fmt: skip
    try:
        with warnings.catch_warnings():
            quiet_libraries()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for library in shown:
            library.enable_progress_bar()
