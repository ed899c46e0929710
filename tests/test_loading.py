"""What a pipeline folder may name, and what is refused by one line before anything is written or imported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
from safetensors.torch import load_file, save_file
from tiny.stable_diffusion import save_tiny_pipeline, tiny_pipeline

from nemo_aligner_diffusion.cli.generate import main as generate
from nemo_aligner_diffusion.cli.train import main
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.trajectory import check_repeatable
from nemo_aligner_diffusion.errors import AlignerError, CheckpointError, ConfigurationError, printable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_pipeline(tmp_path / "pipeline")


def rewrite(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


def refusal(folder: Path, kind: type[AlignerError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message or kind is ConfigurationError
    return message


@pytest.mark.parametrize(
    "value",
    [
        ["os", "system"],
        ["subprocess", "Popen"],
        ["builtins", "eval"],
        ["nemo_aligner_diffusion", "tune"],
        ["diffusers", ["UNet2DConditionModel"]],
        [["diffusers"], "UNet2DConditionModel"],
        ["..evil", "Net"],
    ],
    ids=str,
)
def test_a_class_of_another_library_is_refused(folder: Path, value: list[Any]) -> None:
    rewrite(folder, unet=value)
    assert "only classes of diffusers and transformers are loaded" in refusal(folder)


def test_code_that_a_folder_brings_is_not_run(folder: Path, tmp_path: Path) -> None:
    """diffusers would look for ``unet/my_unet.py``, and for the pipeline's own file, as code of the folder."""
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass Net: pass\n"
    (folder / "unet" / "my_unet.py").write_text(code)
    (folder / "unet" / "diffusers.py").write_text(code)
    assert "no code that a folder brings" in refusal(folder)
    rewrite(folder, unet=["my_unet", "Net"])
    assert "no code that a folder brings" in refusal(folder)
    rewrite(folder, _class_name=["my_pipeline", "Net"])
    (folder / "my_pipeline.py").write_text(code)
    assert "names no pipeline class of diffusers" in refusal(folder)
    assert not marker.exists()
    assert not {"my_unet", "my_pipeline"} & set(sys.modules)


@pytest.mark.parametrize("name", ["MyPipeline", "UNet2DConditionModel", "os", "__file__", "x" * 10_000])
def test_an_unknown_class_is_named(folder: Path, name: str) -> None:
    rewrite(folder, _class_name=name)
    message = refusal(folder)
    assert f"names '{printable(name, 80)}', which is no pipeline of the installed diffusers" in message
    assert len(message) < 600


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"unet": 3}', "[" * 100_000, "\xff"], ids=lambda text: text[:8]
)
def test_a_damaged_index_is_named(folder: Path, text: str) -> None:
    (folder / "model_index.json").write_bytes(text.encode("latin-1"))
    assert "model_index.json" in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    assert f"names {part}, but there is no such folder" in refusal(folder)


def test_parts_that_the_index_should_name_are_named(folder: Path) -> None:
    """Stable Diffusion's parts under SDXL's name load, and fail in the first call with a word about ``None``."""
    rewrite(folder, _class_name="StableDiffusionXLPipeline")
    assert "StableDiffusionXLPipeline, but names no text_encoder_2, tokenizer_2" in refusal(folder)


def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path) -> None:
    """transformers makes one that knows its special tokens alone, and every prompt the same."""
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer: a tokenizer without a vocabulary" in refusal(folder)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("renamed", [False, True])
def test_missing_weights_are_named_and_never_made_up(folder: Path, part: str, renamed: bool) -> None:
    """transformers and diffusers fill them with random numbers, after a warning: as they do where another version
    named the tensors otherwise."""
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensor = tensors.pop(name)
    save_file({**tensors, **({f"other.{name}": tensor} if renamed else {})}, file, metadata={"format": "pt"})
    text = refusal(folder)
    assert f"{part}: lacks 1 weights of" in text
    assert name.removeprefix("text_model.") in text
    assert (f"it has other.{name} instead" in text) == renamed


def test_a_tokenizer_without_a_length_has_its_text_encoders(folder: Path) -> None:
    expected = load_model(folder).pipe.tokenizer.model_max_length
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    assert load_model(folder).pipe.tokenizer.model_max_length == expected


def test_a_network_without_a_size_has_stable_diffusions(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": None}))
    pipe = load_model(folder).pipe
    assert pipe.unet.config.sample_size == 64
    assert pipe("a", num_inference_steps=1, output_type="latent").images.shape[-2:] == (64, 64)
    assert "its sample_size is null" in caplog.text


@pytest.mark.parametrize("part", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_damaged_part_is_named(folder: Path, part: str) -> None:
    (folder / part).write_text("{")
    assert f"{folder / part} is not valid JSON" in refusal(folder)


def test_pipelines_that_make_no_pictures_from_prompts_alone_are_refused(tmp_path: Path) -> None:
    parts = tiny_pipeline().components
    unconditional = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(sample_size=4, block_out_channels=(8, 16), norm_num_groups=4,
                              down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                              layers_per_block=1),
        diffusers.DDPMScheduler(),
    )  # fmt: skip
    upscaler = diffusers.StableDiffusionUpscalePipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        low_res_scheduler=diffusers.DDPMScheduler(),
    )
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    for pipe in (unconditional, upscaler, image_to_image):
        pipe.save_pretrained(tmp_path / type(pipe).__name__)
    message = refusal(tmp_path / "DDPMPipeline", ConfigurationError)
    assert "DDPMPipeline makes no pictures from prompts alone: it takes no `prompt`" in message
    for name in ("StableDiffusionUpscalePipeline", "StableDiffusionImg2ImgPipeline"):  # they say so when called
        model = load_model(tmp_path / name)
        with pytest.raises(ConfigurationError, match=rf"^{name} refused what it was called with: .*no text-to-image"):
            check_repeatable(model, model.inputs(["red apple"], 2))


@pytest.mark.parametrize("kind", ["os.system", "upscaler"])
@pytest.mark.parametrize("command", ["train", "generate"])
def test_what_is_refused_is_one_line_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    if kind == "os.system":
        rewrite(folder, unet=["os", "system"])
        wanted = "only classes of diffusers and transformers are loaded"
    else:
        rewrite(folder, _class_name="StableDiffusionUpscalePipeline", low_res_scheduler=["diffusers", "DDPMScheduler"])
        shutil.copytree(folder / "scheduler", folder / "low_res_scheduler")
        wanted = "StableDiffusionUpscalePipeline refused what it was called with"
    out = tmp_path / "out"
    if command == "train":
        words = [f"model.from_pretrained={folder}", "rm=symmetry", f"exp_manager.explicit_log_dir={out}",
                 "trainer.accelerator=cpu", "model.peft.lora_tuning.target_modules=[to_q]"]  # fmt: skip
        code = main("draftp_sd", words)
    else:
        code = generate(["--model", str(folder), "--prompt", "red", "--output", str(out), "--reward", "none"])
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert wanted in line
    assert not out.exists()


def beyond(path, rng):
    return Plan(active=(path.steps,))


def test_a_rule_that_names_steps_that_are_not_there_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [f"model.from_pretrained={folder}", "family=embedded", "rm=symmetry", f"exp_manager.explicit_log_dir={out}",
             "trainer.accelerator=cpu", f"model.algorithm={__name__}:beyond"]  # fmt: skip
    assert main("draftp_sd", words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "active steps must be integers in 0 … 19" in line
    assert not out.exists()
