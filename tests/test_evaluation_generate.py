"""generate.py: what it makes is what plain diffusers makes, and what is asked for is what is in the files."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny.stable_diffusion import save_tiny_pipeline

from nemo_aligner_diffusion.cli.export import main as export
from nemo_aligner_diffusion.cli.generate import main, parse_seeds, read_request
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora, save_lora_weights
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError
from nemo_aligner_diffusion.evaluation.figures import read_grid
from nemo_aligner_diffusion.evaluation.generation import Result, resolve_settings, run_generation
from nemo_aligner_diffusion.evaluation.run_files import read_run

STEPS, GUIDANCE = 3, 2.0


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


def make_adapter(pipeline_folder: Path, folder: Path, seed: int) -> Path:
    """An adapter with something in it, as a run exports it."""
    model = load_model(pipeline_folder)
    add_lora(model.denoiser, rank=2, alpha=4)
    torch.manual_seed(seed)
    for name, parameter in model.denoiser.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora_weights(model.denoiser, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(pipeline_folder, tmp_path_factory.mktemp("run") / "export", 1)


@pytest.fixture(scope="module")
def other_adapter(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(pipeline_folder, tmp_path_factory.mktemp("other") / "export", 2)


@pytest.fixture(scope="module")
def tuned_unet(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model(pipeline_folder)
    torch.manual_seed(3)
    for parameter in model.denoiser.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("full") / "export" / "unet"
    model.denoiser.save_pretrained(folder)
    return folder


def run(pipeline_folder: Path, output: Path, *words: str) -> Result:
    argv = ["--model", str(pipeline_folder), "--output", str(output), "--prompt", "red", "--steps", str(STEPS)]
    argv += ["--guidance", str(GUIDANCE), "--reward", "symmetry", *words]
    return run_generation(read_request(argv))


def plain_diffusers(pipeline: StableDiffusionPipeline, seed: int = 0) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        "red", num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator, output_type="pt"
    ).images
    return torch.as_tensor(images)


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_base_and_tuned_are_what_diffusers_makes(pipeline_folder: Path, adapter: Path, tmp_path: Path) -> None:
    result = run(pipeline_folder, tmp_path / "out", "--lora", str(adapter), "--compare", "--seeds", "0,5")
    pipeline = load_pipeline(pipeline_folder)
    assert_same(result.images["base"][:1], plain_diffusers(pipeline))
    assert_same(result.images["base"][1:], plain_diffusers(pipeline, seed=5))
    pipeline.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
    assert_same(result.images["tuned"][:1], plain_diffusers(pipeline))
    assert (result.images["tuned"] - result.images["base"]).abs().max() > 0.02


def test_scales_are_those_of_diffusers(pipeline_folder: Path, adapter: Path, tmp_path: Path) -> None:
    result = run(pipeline_folder, tmp_path / "out", "--lora", f"{adapter}:2", "--compare", "--scales", "0,0.5,-0.5")
    assert list(result.images) == ["base", "scale 0", "scale 0.5", "scale -0.5"]
    assert_same(result.images["scale 0"], result.images["base"])
    pipeline = load_pipeline(pipeline_folder)
    pipeline.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors", adapter_name="a")
    for label, weight in (("scale 0.5", 1.0), ("scale -0.5", -1.0)):
        pipeline.set_adapters(["a"], [weight])
        assert_same(result.images[label], plain_diffusers(pipeline))
    names = [path.name for path in result.files]
    assert len(set(names)) == len(names) == 5  # "scale 0.5" and "scale -0.5" have files of their own


def test_mixed_adapters_are_those_of_diffusers(
    pipeline_folder: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    words = ["--lora", f"{adapter}:0.7", "--lora", f"{other_adapter / 'pytorch_lora_weights.safetensors'}:-0.4"]
    result = run(pipeline_folder, tmp_path / "out", *words, "--compare")
    pipeline = load_pipeline(pipeline_folder)
    assert_same(result.images["base"], plain_diffusers(pipeline))
    for name, folder in (("a", adapter), ("b", other_adapter)):
        pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.7, -0.4])
    assert_same(result.images["tuned"], plain_diffusers(pipeline))


def test_adapters_of_other_trainers_are_applied_or_refused(
    pipeline_folder: Path,
    adapter: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As PEFT saves them; with a layer of a larger model; with layers of a text encoder."""
    expected = run(pipeline_folder, tmp_path / "out", "--lora", str(adapter)).images["tuned"]
    state = load_file(adapter / "pytorch_lora_weights.safetensors")
    file = tmp_path / "a.safetensors"
    save_file({name.replace("unet.", "base_model.model.", 1): value for name, value in state.items()}, file)
    made = run(pipeline_folder, tmp_path / "out", "--lora", str(file), "--compare").images
    assert torch.allclose(made["tuned"], expected, atol=1e-5)
    assert not torch.allclose(made["base"], expected, atol=1e-2)
    save_file({**state, "unet.down_blocks.7.attn1.to_q.lora_A.weight": torch.zeros(2, 8)}, file)
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: .* 1 of its \d+ tensors have no place .*down_blocks\.7"
    ):
        run(pipeline_folder, tmp_path / "out", "--lora", str(file))
    save_file({n.replace("down_blocks", "sideways"): value for n, value in state.items()}, file)
    for more, said in (([], True), (["--model", str(pipeline_folder)], False)):
        with pytest.raises(CheckpointError, match="does not fit") as caught:
            run_generation(read_request(["--prompt", "a", "--lora", str(file), *more]))
        assert ("no --model was given and it is in no run's folder, so the embedded" in str(caught.value)) == said
    assert export([str(file), "--to", "kohya", "--output", str(tmp_path / "k.safetensors")]) == 2
    assert "no --model was given and it is in no run's folder" in capsys.readouterr().err
    save_file({**state, "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(2, 8)}, file)
    made = run(pipeline_folder, tmp_path / "out", "--lora", str(file)).images
    assert torch.equal(made["tuned"], expected)
    assert "tensors are of text encoders, such as text_encoder.text_model" in caplog.text


@pytest.mark.parametrize("kind", ["lora", "unet"])
def test_annealed_weights_go_from_base_to_tuned(
    pipeline_folder: Path, adapter: Path, tuned_unet: Path, tmp_path: Path, kind: str
) -> None:
    path = adapter if kind == "lora" else tuned_unet
    words = [f"--{kind}", str(path), "--compare", "--weights", "base,draft,linear,1,0.5"]
    images = run(pipeline_folder, tmp_path / "out", *words).images
    assert list(images) == ["base", "weight base", "weight draft", "weight linear", "weight 1", "weight 0.5"]
    assert_same(images["weight base"], images["base"])
    assert_same(images["weight draft"], images["weight 1"])
    distance = {label: float((picture - images["base"]).square().mean()) for label, picture in images.items()}
    assert distance["weight draft"] > 1e-5
    for label in ("weight linear", "weight 0.5"):
        assert 0 < distance[label] < distance["weight draft"]


def test_a_full_fine_tune_is_what_diffusers_makes(pipeline_folder: Path, tuned_unet: Path, tmp_path: Path) -> None:
    result = run(pipeline_folder, tmp_path / "out", "--unet", str(tuned_unet), "--compare")
    pipeline = load_pipeline(pipeline_folder)
    assert_same(result.images["base"], plain_diffusers(pipeline))
    pipeline.unet = type(pipeline.unet).from_pretrained(tuned_unet)
    assert_same(result.images["tuned"], plain_diffusers(pipeline))


def test_files_say_what_they_show(pipeline_folder: Path, adapter: Path, tmp_path: Path) -> None:
    words = ["--prompt", "blå bil / car?", "--lora", str(adapter), "--compare", "--num-images", "2"]
    result = run(pipeline_folder, tmp_path / "out", *words, "--height", "16", "--width", "32")
    assert len(result.files) == 2 * 2 * 2 + 1
    picture = Image.open(next(path for path in result.files if path.name == "0003_blå-bil-car_seed1_tuned.png"))
    assert picture.size == (32, 16)
    settings = json.loads(picture.info["settings"])
    assert picture.info["prompt"] == settings["prompt"] == "blå bil / car?"
    assert {key: settings[key] for key in ("seed", "steps", "guidance", "row", "lora")} == {
        "seed": 1,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "row": "tuned",
        "lora": {str(adapter): 1.0},
    }
    image = result.images["tuned"][3]
    expected = -(image - image.flip(-1)).abs().mean()
    assert settings["reward"] == pytest.approx(float(expected), abs=1e-5)
    assert settings["reward"] == pytest.approx(result.rewards["tuned"][3])
    cells = read_grid(Image.open(result.output / "grid.png"))
    assert [cell["seed"] for cell in cells] == [0, 1, 0, 1]
    assert cells[3]["reward"] == pytest.approx(settings["reward"])


def test_a_second_run_leaves_the_first_one_alone(pipeline_folder: Path, tmp_path: Path) -> None:
    first = run(pipeline_folder, tmp_path / "out")
    before = {path: path.read_bytes() for path in first.files}
    second = run(pipeline_folder, tmp_path / "out", "--seeds", "9")
    assert second.output == tmp_path / "out-2"
    assert {path: path.read_bytes() for path in first.files} == before
    assert sorted(tmp_path.rglob("*.png")) == sorted([*first.files, *second.files])
    third = run(pipeline_folder, tmp_path / "out", "--overwrite", "--guidance", "5")
    assert third.output == first.output
    assert first.files[0].read_bytes() != before[first.files[0]]


def test_the_run_behind_an_adapter_gives_the_settings(pipeline_folder: Path, adapter: Path) -> None:
    (adapter.parent / "config.yaml").write_text(
        f"model: {{from_pretrained: {pipeline_folder}, infer: {{inference_steps: 7, "
        "unconditional_guidance_scale: 1.5, sampler_type: Euler, height: 16}}\nrm: {name: compressibility}\n"
    )
    try:
        request = read_request(["--prompt", "red", "--lora", str(adapter.parent)])
        settings = resolve_settings(request, read_run(adapter.parent))
        assert (settings.model, settings.sampling.steps, settings.sampling.guidance_scale) == (pipeline_folder, 7, 1.5)
        assert (settings.sampler, settings.sampling.height, settings.sampling.width) == ("Euler", 16, None)
        given = replace(request, steps=2, model=Path("elsewhere"), guidance=0.0)
        settings = resolve_settings(given, read_run(adapter.parent))
        assert (settings.model, settings.sampling.steps, settings.sampling.guidance_scale) == (
            Path("elsewhere"),
            2,
            0.0,
        )
        (adapter.parent / "config.yaml").write_text(
            "model: {from_pretrained: null, infer: {unconditional_guidance_scale: null}, "
            "pipeline: {trained: null, stateless: null, arguments: {negative_prompt: blurry}}}\n"
        )
        settings = resolve_settings(request, read_run(adapter.parent))
        assert settings.sampling.guidance_scale is None  # the pipeline's default, not the shipped one
        assert settings.pipeline == {"arguments": {"negative_prompt": "blurry"}}
        (adapter.parent / "config.yaml").write_text("model: {from_pretrained: some/hub-id}\n")
        assert resolve_settings(request, read_run(adapter.parent)).model == Path("some/hub-id")
        (adapter.parent / "config.yaml").write_text("model: {from_pretrained: /nowhere/model}\n")
        with pytest.raises(ConfigurationError, match=r"/nowhere/model is gone: .*config.yaml names it"):
            resolve_settings(request, read_run(adapter.parent))
        (adapter.parent / "config.yaml").write_text("model: {from_pretrained: ../model}\n")
        with pytest.raises(ConfigurationError, match=r"\.\./model is not there, seen from .*config.yaml names it"):
            resolve_settings(request, read_run(adapter.parent))
    finally:
        (adapter.parent / "config.yaml").unlink()


def test_shipped_defaults_are_those_of_the_shipped_configuration() -> None:
    from nemo_aligner_diffusion.config.load import load_config

    infer = load_config("draftp_sd", []).model.infer
    settings = resolve_settings(read_request(["--prompt", "red"]), None)
    shipped = (infer.inference_steps, infer.unconditional_guidance_scale, infer.sampler_type, infer.eta)
    assert (
        settings.sampling.steps,
        settings.sampling.guidance_scale,
        settings.sampler,
        settings.sampling.eta,
    ) == shipped


@pytest.mark.parametrize(
    ("infer", "message"),
    [
        ("[1]", r"^$"),
        ("{inference_steps: [1]}", r"config.yaml: .*inference_steps = \[1\]: expected an integer"),
        ("{height: {a: 1}}", "height = .*expected an integer"),
        ("{unconditional_guidance_scale: many}", "unconditional_guidance_scale = 'many': expected a number"),
    ],
)
def test_settings_of_a_run_that_are_none_are_named(adapter: Path, infer: str, message: str) -> None:
    (adapter.parent / "config.yaml").write_text(f"model: {{infer: {infer}}}\n")
    request = read_request(["--prompt", "red", "--lora", str(adapter)])
    try:
        text = ""
        resolve_settings(request, read_run(adapter.parent))
    except ConfigurationError as error:
        text = str(error)
    finally:
        (adapter.parent / "config.yaml").unlink()
    assert re.search(message, text)


def test_a_damaged_configuration_is_not_passed_over_in_silence(
    pipeline_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter.parent / "config.yaml").write_text("model: {infer: {inference_steps: 7}}\nrm: [")
    try:
        run(pipeline_folder, tmp_path / "out", "--lora", str(adapter))
    finally:
        (adapter.parent / "config.yaml").unlink()
    warned = capsys.readouterr().err
    assert "config.yaml cannot be read (ValueError: " in warned
    assert "the pictures are made with the model family's settings" in warned


def test_no_validation_picture_is_a_training_sample() -> None:
    """Validation draws as a plain pipeline does, from the seed itself; training from a key's digest: whatever
    ``model.seed`` is, and be it a validation seed, the two have no noise in common."""
    keyed = [
        sample_generator(seed, step, index).initial_seed()
        for seed in range(8)
        for step in range(8)
        for index in range(8)
    ]
    assert len(set(keyed)) == 8**3
    assert min(keyed) > 2**32  # beyond any seed that somebody types
    for seed in range(8):
        trained = torch.randn(4, generator=sample_generator(seed, 0, 0))
        assert not torch.equal(trained, torch.randn(4, generator=torch.Generator().manual_seed(seed)))


def test_seeds() -> None:
    assert parse_seeds("3,0-2, 1") == [3, 0, 1, 2]
    for wrong in ("", "1,", "-1", "2-1", "a", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_seeds(wrong)


WRONG = [
    ([], "no prompt"),
    (["--prompt", "a", "--compare"], "--compare compares with a tuned model"),
    (["--prompt", "a", "--scales", "1"], "--scales compares with a tuned model"),
    (["--prompt", "a", "--lora", "nowhere:0.5"], "there is no file or folder nowhere"),
    (["--prompt", "a", "--lora", "{adapter}:nan"], "finite number"),
    (["--prompt", "a", "--lora", "{adapter}", "--unet", "b"], "argument --unet: not allowed with argument --lora"),
    (["--prompt", "a", "--unet", "b", "--scales", "1"], "--scales scales adapters"),
    (
        ["--prompt", "a", "--lora", "{adapter}", "--scales", "1", "--weights", "base"],
        "--weights: not allowed with argument --scales",
    ),
    (["--prompt", "a", "--lora", "{adapter}", "--scales", "1,,2"], "one is empty"),
    (["--prompt", "a", "--lora", "{adapter}", "--scales", "-1,x"], "'x' is no finite number"),
    (["--prompt", "a", "--lora", "{adapter}", "--weights", "cubic"], "'cubic' is unknown"),
    (["--prompt", "a", "--seeds", "0", "--num-images", "2"], "not allowed with argument --seeds"),
    (["--prompt", "a", "--num-images", "0"], "--num-images: '0': expected a whole number of at least 1"),
    (["--prompt", "a", "--guidance", "nan"], "--guidance: 'nan' is no finite number"),
    (["--prompt", "a", "--steps", "0"], "--steps: '0': expected a whole number of at least 1"),
    (["--prompt", "a", "--model", "{tmp}"], "no model_index.json"),
    (
        ["--prompt", "a", "--model", "{model}", "--height", "17"],
        "--height 17: .* multiples of 4; the nearest is 16",
    ),
    (
        ["--prompt", "a", "--model", "{model}", "--sampler", "ddmi"],
        "--sampler='ddmi' is not .*did you mean DDIM",
    ),
    (["--prompt", "a", "--model", "{model}", "--reward", "aesthetics"], "--reward aesthetics: neither a file"),
    (["--prompt", "a", "--model", "{model}", "--device", "cuda:99"], "--device cuda:99"),
    (["--prompt", "a", "--model", "{model}", "--lora", "{model}/unet/config.json"], "config.json"),
    (["--prompts-file", "{tmp}/nowhere.txt"], "No such file"),
    (["--prompts-file", "{tmp}/latin.txt"], "line 2 is not UTF-8"),
    (["--prompts-file", "{tmp}/empty.txt"], "holds no prompt"),
    (["--prompt", "a", "--model", "{model}", "--reward", "none", "--output", "{tmp}/empty.txt"], "--output"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_mistakes_are_named_and_nothing_is_written(
    words: list[str],
    message: str,
    pipeline_folder: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "latin.txt").write_bytes("red\nbl\xe5\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n \n")
    places = {"tmp": tmp_path, "model": pipeline_folder, "adapter": adapter}
    argv = [word.format(**places) for word in words]
    if "--output" not in argv:
        argv += ["--output", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffröd\r\n\r\n blue car \n".encode())
    request = read_request(["--prompts-file", str(tmp_path / "prompts.txt")])
    assert request.prompts == ["röd", "blue car"]


def test_the_entry_script_helps_without_torch() -> None:
    script = Path(__file__).parents[1] / "examples" / "mm" / "stable_diffusion" / "generate.py"
    code = (
        "import runpy, sys; sys.argv = ['generate.py', '--help']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=script.parents[3], timeout=120, check=True
    )
    assert "--scales" in done.stdout


def test_prompts_beyond_the_limit_are_told(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(pipeline_folder, tmp_path / "out", "--prompt", "a prompt of far too many letters", "--num-images", "3")
    assert "1 prompt(s) are longer than 8 tokens" in capsys.readouterr().err
