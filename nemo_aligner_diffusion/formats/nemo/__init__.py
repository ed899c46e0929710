"""Reading and writing ``.nemo`` archives: small, safe, and free of NeMo itself.

A ``.nemo`` file is a tar, plain or gzipped, whose members (often prefixed ``./``) are

=============================  ======================================================================================
``model_config.yaml``          the configuration; ``target`` names the class, ``nemo_version`` the writer
``model_weights.ckpt``         a ``torch.save``d state dict; some writers put it under ``mp_rank_00/``
``<hash>_<name>``              artifacts such as tokenizer files, named in the configuration as ``nemo:<hash>_<name>``
=============================  ======================================================================================

Archives come from strangers, so the reader trusts nothing: no member is written to disk; names that climb out, links,
devices and duplicates are refused; sizes, counts and the gzip ratio are bounded before memory is spent; the YAML may
hold neither tags nor aliases and no OmegaConf resolver ever runs; the weights' pickle is read by an interpreter of its
own, which makes nothing but tensors and containers, out of records whose checksums are right. Whatever is wrong ends in
:class:`~nemo_aligner_diffusion.errors.ArchiveError`, which names the file, what was found, what was expected and what
to do.

Example::

    from nemo_aligner_diffusion.formats.nemo import load_nemo, save_nemo

    save_nemo("reward.nemo", {"target": "…", "tokenizer": {"vocab_file": "nemo:vocab.json"}}, model.state_dict(),
              {"vocab.json": Path("vocab.json")})
    archive = load_nemo("reward.nemo")
    archive.config["target"], archive.state_dict(), archive.artifact(archive.config["tokenizer"]["vocab_file"])
"""

from nemo_aligner_diffusion.formats.nemo.common import Limits
from nemo_aligner_diffusion.formats.nemo.reader import NemoArchive, load_nemo
from nemo_aligner_diffusion.formats.nemo.writer import save_nemo

__all__ = ["Limits", "NemoArchive", "load_nemo", "save_nemo"]
