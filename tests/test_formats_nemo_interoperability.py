"""``.nemo`` files to and from NeMo itself: ``nemo_toolkit`` writes what we restore, and unpacks what we write.

Needs the extra ``nemo`` (``make test-extras`` installs it and runs this); skipped without.
"""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tiny.clip import megatron_twin, tokenizer_files, toy_clip
from torch import Tensor, nn
from transformers import CLIPModel

from nemo_aligner_diffusion.formats.nemo import load_nemo, save_nemo
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
from nemo_aligner_diffusion.rewards.clip.tokenizer import tokenizer_from_bytes

if os.environ.get("NAD_REQUIRE_EXTRAS"):  # CI: an installation gone wrong must not look like a test left out
    import nemo
else:
    nemo = pytest.importorskip("nemo", reason="nemo_toolkit is not installed: make test-extras, or the extra nemo")

from nemo.core.classes.modelPT import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

pytestmark = pytest.mark.extras("nemo")
PROMPTS = ["a red apple", "cats and apples"]
# NeMo 1 and 2 had the class here; version 3 has no pictures any more. The path is all that an archive records of it.
NEMO_MODULE = "nemo.collections.multimodal.models.vision_language_foundation.clip.megatron_clip_models"


class MegatronCLIPModel(ModelPT):
    """A model of NeMo's with the parameters, buffers and artifacts of its CLIP; it computes nothing."""

    def __init__(self, cfg: Any, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        folder = Path(self.cfg.files)
        for field, name in (("vocab_file", "vocab.json"), ("merge_file", "merges.txt")):
            self.register_artifact(f"tokenizer.{field}", str(folder / name))

    def hold(self, state: dict[str, Tensor]) -> None:
        """Take the tensors of ``state`` as parameters of nested modules, so that ``state_dict`` has their names."""
        for name, tensor in state.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(tensor.clone()))

    def setup_training_data(self, train_data_config: Any) -> None:
        raise NotImplementedError

    def setup_validation_data(self, val_data_config: Any) -> None:
        raise NotImplementedError

    @classmethod
    def list_available_models(cls) -> None:
        return None


MegatronCLIPModel.__module__ = NEMO_MODULE


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return toy_clip(seed=3)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(model: CLIPModel, images: Tensor) -> Tensor:
    """Scores of the Hugging Face model that every archive here comes from."""
    files = tokenizer_files()
    return CLIPReward(model, tokenizer_from_bytes(files["vocab.json"], files["merges.txt"], "toy"))(images, PROMPTS)


def nemo_model(model: CLIPModel, folder: Path, legacy: bool) -> MegatronCLIPModel:
    folder.mkdir()
    for name, content in tokenizer_files().items():
        (folder / name).write_bytes(content)
    config, state = megatron_twin(model, legacy=legacy)
    del config["target"], config["nemo_version"]  # NeMo's to write
    config["vision"]["output_dim"] = "${output_dim}"
    config["tokenizer"] |= {"vocab_file": None, "merge_file": None}
    written = MegatronCLIPModel(OmegaConf.create({**config, "files": str(folder)}))
    written.hold(state)
    return written


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("ranked", [False, True])
def test_what_nemo_writes_is_restored(
    model: CLIPModel, images: Tensor, expected: Tensor, tmp_path: Path, legacy: bool, ranked: bool
) -> None:
    source = nemo_model(model, tmp_path / "files", legacy)
    path = tmp_path / "written" / "clip.nemo"
    if ranked:  # as NeMo lays out a model-parallel model of one rank

        class Ranked(SaveRestoreConnector):
            def _make_nemo_file_from_folder(self, filename: str, source_dir: str) -> None:  # type: ignore[override]
                (Path(source_dir) / "mp_rank_00").mkdir()
                weights = Path(source_dir, "model_weights.ckpt")
                weights.rename(weights.parent / "mp_rank_00" / weights.name)
                SaveRestoreConnector._make_nemo_file_from_folder(filename, source_dir)

        path.parent.mkdir()
        Ranked().save_to(source, str(path))
    else:
        source.save_to(str(path))

    archive = load_nemo(path)
    assert archive.target == f"{NEMO_MODULE}.MegatronCLIPModel"
    assert archive.config["nemo_version"] == nemo.package_info.__version__
    for field, name in (("vocab_file", "vocab.json"), ("merge_file", "merges.txt")):
        reference = archive.config["tokenizer"][field]
        assert reference.startswith("nemo:")
        assert reference.endswith(f"_{name}")
        assert archive.artifact(reference) == tokenizer_files()[name]
    held = source.state_dict()
    assert list(archive.state_dict()) == list(held)
    assert all(torch.equal(tensor, held[name]) for name, tensor in archive.state_dict().items())

    reward = restore_reward(path)
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_nemos_connector_unpacks_what_we_write(model: CLIPModel, tmp_path: Path, packed: bool) -> None:
    path = convert_hf_clip_to_nemo(model, tokenizer_files(), tmp_path / "ours.nemo", gzip=packed)
    connector = SaveRestoreConnector()
    folder = tmp_path / "unpacked"
    folder.mkdir()
    connector._unpack_nemo_file(path2file=str(path), out_folder=str(folder))
    ours = load_nemo(path)
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == set(ours.members)
    config = OmegaConf.load(folder / connector.model_config_yaml)
    assert OmegaConf.to_container(config, resolve=True) == ours.config
    state = connector._load_state_dict_from_disk(str(folder / connector.model_weights_ckpt))
    assert list(state) == list(ours.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    vocabulary = ours.config["tokenizer"]["vocab_file"].removeprefix("nemo:")
    assert (folder / vocabulary).read_bytes() == tokenizer_files()["vocab.json"]


def test_nemo_restores_a_model_of_its_own_class_from_what_we_write(model: CLIPModel, tmp_path: Path) -> None:
    """The whole of ``restore_from``, with the class given instead of imported by the name in the archive."""
    config, state = megatron_twin(model, legacy=True)
    config["target"] = f"{NEMO_MODULE}.MegatronCLIPModel"
    config["vision"]["output_dim"] = "${output_dim}"
    config["tokenizer"] = {"vocab_file": "nemo:vocab.json", "merge_file": "nemo:merges.txt"}
    path = save_nemo(tmp_path / "x.nemo", {**config, "files": "."}, state, tokenizer_files())

    class Restorable(MegatronCLIPModel):
        def __init__(self, cfg: Any, trainer: Any = None) -> None:
            ModelPT.__init__(self, cfg, trainer)
            path = self.register_artifact("tokenizer.vocab_file", cfg.tokenizer.vocab_file)
            self.vocabulary = Path(path).read_bytes()
            self.hold({name: torch.zeros_like(tensor) for name, tensor in state.items()})

        @classmethod
        def from_config_dict(cls, config: Any, trainer: Any = None) -> MegatronCLIPModel:
            return cls(config, trainer)  # NeMo would import it by the name in the archive, of a module it has no more

    instance = Restorable.restore_from(str(path), map_location=torch.device("cpu"), strict=True)
    assert instance.vocabulary == tokenizer_files()["vocab.json"]
    held = instance.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in state.items())


def test_a_gzipped_archive_of_older_nemo(model: CLIPModel, images: Tensor, expected: Tensor, tmp_path: Path) -> None:
    """NeMo gzipped until 1.21: the same members, in NeMo's own spelling."""
    source = nemo_model(model, tmp_path / "files", legacy=True)
    source.save_to(str(tmp_path / "written" / "clip.nemo"))
    with tarfile.open(tmp_path / "written" / "clip.nemo") as plain, tarfile.open(tmp_path / "old.nemo", "w:gz") as old:
        for member in plain:
            old.addfile(member, plain.extractfile(member))
    torch.testing.assert_close(restore_reward(tmp_path / "old.nemo")(images, PROMPTS), expected, rtol=1e-5, atol=1e-6)


def test_neither_imports_the_other(tmp_path: Path) -> None:
    """This process has both; a user's with our package only must never load NeMo or its Lightning."""
    import subprocess

    code = (
        "import sys, nemo_aligner_diffusion.rewards.restore, nemo_aligner_diffusion.training.run\n"
        "print([name for name in ('nemo', 'lightning') if name in sys.modules])\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert shown.stdout.strip() == "[]"
