"""Files and folders that are damaged, hostile or not what one thinks: one line each, which names file and fault."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.published import unet_names
from tiny.stable_diffusion import save_tiny_pipeline, tiny_parts

from nemo_aligner_diffusion.cli.train import main
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.errors import AlignerError


class Hostile:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("/tmp/never-made-by-a-test",))


PARTS = tiny_parts(seed=2)
UNET = {name: tensor.clone() for name, tensor in PARTS["unet"].state_dict().items()}
LDM = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_names(UNET, layers=1).items()}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 3438354725\n"


def text(content: str) -> Callable[[Path], Any]:
    return lambda file: file.write_text(content)


def whole(file: Path) -> bytes:
    save_file(UNET, file)
    return file.read_bytes()


def pickled(value: Any) -> Callable[[Path], Any]:
    return lambda file: torch.save(value, file)


def shards(file: Path) -> None:
    PARTS["unet"].save_pretrained(file, max_shard_size="60KB")


def without_shard(file: Path) -> None:
    shards(file)
    sorted(file.glob("*-00002-of-*"))[0].unlink()


def index_of_elsewhere(file: Path) -> None:
    shards(file)
    (index,) = file.glob("*.index.json")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}))


def damaged_index(file: Path) -> None:
    shards(file)
    next(file.glob("*.index.json")).write_text('{"weight_map": ')


# given as model.unet_config.from_pretrained: name of the file, how it is made, what is said
DENOISERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "LFS pointer": ("a.safetensors", text(LFS), "no weights, but a Git LFS pointer"),
    "LFS pointer named .ckpt": ("a.ckpt", text(LFS), "no weights, but a Git LFS pointer"),
    "web page": ("a.safetensors", text("\n<!DOCTYPE html><html>Sign in</html>"), "no weights, but a web page"),
    "JSON of a server": ("a.bin", text('{"error": "Access denied"}'), "holds JSON text, not weights"),
    "empty": ("a.ckpt", text(""), r"the file is empty \(0 bytes\)"),
    "not there": ("a.ckpt", lambda file: None, "no such file"),
    "FIFO": ("a.safetensors", os.mkfifo, "cannot be read: it is no regular file"),
    "folder without weights": ("a", os.mkdir, r"a folder without unet weights \(it holds nothing\)"),
    "cut off": ("a.safetensors", lambda f: f.write_bytes(whole(f)[:-7]), "a safetensors file that is cut off"),
    "header cut off": ("a.safetensors", lambda f: f.write_bytes(whole(f)[:200]), "a safetensors file that is cut off"),
    "header damaged": (
        "a.safetensors",
        lambda f: f.write_bytes(whole(f).replace(b'"shape"', b'"shape?', 1)),
        "a safetensors file whose header is damaged",
    ),
    "zip cut off": (
        "a.ckpt",
        lambda f: (torch.save(UNET, f), f.write_bytes(f.read_bytes()[:-300])),
        "a checkpoint that is cut off",
    ),
    "pickle with code": ("a.ckpt", pickled({"conv_in.weight": Hostile()}), "more than tensors.*never run"),
    "old pickle with code": ("a.bin", lambda f: f.write_bytes(pickle.dumps(Hostile(), 2)), "weights_only=True"),
    "no tensors": ("a.pt", pickled({"note": "none"}), "holds no tensors"),
    "expanded tensor": ("a.pt", pickled({"x": torch.zeros(1).expand(10**10)}), "its tensor 'x' is not dense"),
    "GGUF": ("a.gguf", text("GGUF\3\0\0\0"), "a GGUF file"),
    "gzip": ("a.nemo", lambda f: f.write_bytes(b"\x1f\x8b\x08\0"), "a gzip archive"),
    "picture": ("a.ckpt", lambda f: f.write_bytes(b"\x89PNG\r\n\x1a\n"), "no weights that are known here"),
    "LoRA": (
        "a.pt",
        pickled({"unet.down_blocks.0.attentions.0.transformer_blocks.0.to_q.lora_A.weight": torch.zeros(2, 2)}),
        r"looks like a LoRA, not a model \(1 tensors",
    ),
    "VAE": ("a.pt", lambda f: torch.save(PARTS["vae"].state_dict(), f), "holds no unet .*looks like a VAE's"),
    "text encoder": (
        "a.pt",
        lambda f: torch.save(PARTS["text_encoder"].state_dict(), f),
        "looks like a text encoder's",
    ),
    "ControlNet": (
        "a.pt",
        pickled({name.replace("model.diffusion_model", "control_model"): t for name, t in LDM.items()}),
        "looks like a ControlNet",
    ),
    "tensor missing": (
        "a.pt",
        pickled({n: t for n, t in UNET.items() if n != "conv_out.bias"}),
        "1 missing, e.g. conv_out",
    ),
    "of another shape": (
        "a.pt",
        pickled({**UNET, "conv_in.weight": torch.zeros(8, 9, 3, 3)}),
        r"conv_in.weight \(file \(8, 9, 3, 3\), model \(8, 4, 3, 3\)\)",
    ),
    "tensor too many": ("a.pt", pickled({**UNET, "x.weight": torch.zeros(1)}), "1 unexpected, e.g. x.weight"),
    "LDM's, one missing": (
        "a.pt",
        pickled({n: t for n, t in LDM.items() if not n.endswith("out.2.bias")}),
        "1 missing, e.g. conv_out.bias",
    ),
    "shard missing": ("a", without_shard, "of its . files are missing, e.g. diffusion_pytorch_model-00002"),
    "index of another folder": ("a", index_of_elsewhere, "names no files of this folder"),
    "index damaged": ("a", damaged_index, "is not valid JSON"),
    "terminal's words": ("a.pt", pickled({"\x1b[2J\nerror: x": torch.zeros(2)}), r"1 tensors: \\x1b\[2J\\nerror: x"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


def refusal(*given: Any) -> str:
    with pytest.raises(AlignerError) as caught:
        load_model(*given)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 1000
    return message


def matches(message: str, words: str) -> bool:
    import re

    return re.search(words, message) is not None


@pytest.mark.parametrize("kind", DENOISERS)
def test_denoisers(kind: str, pipeline: Path, tmp_path: Path) -> None:
    name, make, words = DENOISERS[kind]
    make(tmp_path / name)
    message = refusal(pipeline, tmp_path / name)
    assert str(tmp_path / name) in message
    assert matches(message, words), message


def rewritten(part: str, **changes: Any) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        file = folder / part
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return rewrite


def replaced(part: str, by: str | None) -> Callable[[Path], Any]:
    """``part`` is another text, or (``None``) a FIFO."""

    def replace(folder: Path) -> None:
        (folder / part).unlink()
        os.mkfifo(folder / part) if by is None else (folder / part).write_text(by)

    return replace


def renamed_tensor(part: str) -> Callable[[Path], Any]:
    def rename(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        tensors["renamed"] = tensors.pop(sorted(tensors)[2])
        save_file(tensors, file, metadata={"format": "pt"})

    return rename


WEIGHTS = "diffusion_pytorch_model.safetensors"
FOLDERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no index": ("", lambda f: (f / "model_index.json").unlink(), "no model_index.json there"),
    "index is a FIFO": ("model_index.json", replaced("model_index.json", None), "no regular file"),
    "damaged configuration": ("unet/config.json", replaced("unet/config.json", "{"), "is not valid JSON"),
    "configuration is a list": ("vae/config.json", replaced("vae/config.json", "[]"), "holds a JSON list"),
    "configuration nested": ("vae/config.json", replaced("vae/config.json", "[" * 10**5), "is not valid JSON"),
    "configuration is a FIFO": ("unet/config.json", replaced("unet/config.json", None), "no regular file"),
    "configuration gone": ("unet", lambda f: (f / "unet/config.json").unlink(), "has no config.json"),
    "wrong type": ("unet", rewritten("unet/config.json", block_out_channels="wide"), "no UNet2DConditionModel can"),
    "number as text": ("text_encoder", rewritten("text_encoder/config.json", hidden_size="16"), "no CLIPTextModel can"),
    "zero groups": ("vae", rewritten("vae/config.json", norm_num_groups=0), "no AutoencoderKL can be made of it"),
    "code as attention": (
        "text_encoder/config.json",
        rewritten("text_encoder/config.json", attn_implementation="someone/kernel"),
        "names code on the hub, attn_implementation = 'someone/kernel'",
    ),
    "code as nested attention": (
        "text_encoder/config.json",
        rewritten("text_encoder/config.json", _attn_implementation={"text": "someone/kernel"}),
        "names code on the hub",
    ),
    "weights are a pointer": (f"unet/{WEIGHTS}", replaced(f"unet/{WEIGHTS}", LFS), "a Git LFS pointer"),
    "text encoder is a pointer": ("text_encoder", replaced("text_encoder/model.safetensors", LFS), "a Git LFS pointer"),
    "weights gone": ("vae", lambda f: (f / "vae" / WEIGHTS).unlink(), "a folder without vae weights"),
    "UNet lacks a tensor": ("unet", renamed_tensor("unet"), "lacks 1 weights.*it has renamed instead"),
    "VAE lacks a tensor": ("vae", renamed_tensor("vae"), "lacks 1 weights.*it has renamed instead"),
    "text encoder lacks one": ("text_encoder", renamed_tensor("text_encoder"), "lacks 1 weights"),
    "tokenizer is a FIFO": ("tokenizer/tokenizer.json", replaced("tokenizer/tokenizer.json", None), "no regular file"),
    "tokenizer without a length": (
        "tokenizer",
        rewritten("tokenizer/tokenizer_config.json", model_max_length=[77]),
        "its model_max_length is",
    ),
    "tokenizer damaged": ("", replaced("tokenizer/tokenizer.json", "{"), "not a complete StableDiffusionPipeline"),
    "scheduler damaged": (
        "scheduler/scheduler_config.json",
        replaced("scheduler/scheduler_config.json", '{"beta_start": '),
        "is not valid JSON",
    ),
    "part gone": ("", lambda f: shutil.rmtree(f / "scheduler"), "names scheduler, but there is no such folder"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind: str, pipeline: Path, tmp_path: Path) -> None:
    place, spoil, words = FOLDERS[kind]
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline, folder)
    spoil(folder)
    message = refusal(folder)
    assert str(folder / place) in message
    assert matches(message, words), message


def test_what_a_folder_calls_its_code_is_never_looked_at(pipeline: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "pipeline", tmp_path / "ran"
    shutil.copytree(pipeline, folder)
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        (folder / part / "own.py").write_text(f"open({str(marker)!r}, 'w')")
        for name in ("config.json", "tokenizer_config.json"):
            if (folder / part / name).exists():
                kinds = ("AutoModel", "AutoTokenizer", "AutoConfig", "CLIPTextModel", "UNet2DConditionModel")
                rewritten(f"{part}/{name}", auto_map=dict.fromkeys(kinds, "own.Net"), trust_remote_code=True)(folder)
    rewritten("model_index.json", custom_pipeline="own", trust_remote_code=True)(folder)
    load_model(folder)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["model.from_pretrained", "model.unet_config.from_pretrained"])
def test_the_command_says_so_in_one_line(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.safetensors").write_text(LFS)
    words = [f"{key}={tmp_path / 'a.safetensors'}", "rm=symmetry", "trainer.accelerator=cpu",
             f"exp_manager.explicit_log_dir={tmp_path / 'out'}"]  # fmt: skip
    assert main("draftp_sd", words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "a.safetensors: no weights, but a Git LFS pointer" in line
    assert not (tmp_path / "out").exists()
