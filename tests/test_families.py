"""Each family in its published block structure, narrow, by the words that a user types: in, trained, out, spread.

``docs/models.md`` says which test is for which of the things that can be done with a family.
"""

from __future__ import annotations

import csv
import functools
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, FluxTransformer2DModel
from families_page import COLUMNS, NO, NOTED, OTHERS, ROWS, held_by, matrix
from generated import renewed
from naive_pipeline import naive_loss
from process_pool import ProcessPool
from safetensors.torch import load_file, save_file
from test_files_in import in_cache
from test_pipelines_matrix import SETTINGS
from tiny.gradients import flat, relative, run, with_adapters
from tiny.published import PUBLISHED, flux_names, narrow, save_text, vae_names
from tiny_pipelines import PROMPTS

from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.cli.export import main as export
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.diffusion.families import family_of
from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora_files import KOHYA_NAME, WEIGHT_NAME
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.call import DirectCalls
from nemo_aligner_diffusion.diffusion.network.latents import encode
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError
from nemo_aligner_diffusion.runtime.signals import Interruption
from nemo_aligner_diffusion.training.run import run_training, train
from nemo_aligner_diffusion.training.settings import RunSettings

SLOW = pytest.mark.slow
UNETS = ("sd15", "sd21", "sdxl")
SIZE, STEPS = 32, 2
# tokenizers of a letter a token: the published lengths would be hundreds. FLUX.2 sees its system message alone
ARGUMENTS: dict[str, dict[str, Any]] = {
    "sd35": {"max_sequence_length": 8},
    "flux1": {"max_sequence_length": 8},
    "flux2": {"max_sequence_length": 64},
    "flux2_klein": {"max_sequence_length": 48},
    "z_image": {"max_sequence_length": 48},
}


def each(*slow: str, nightly: tuple[str, ...] = ()) -> Any:
    marks = {name: [SLOW] for name in slow} | {name: [pytest.mark.nightly] for name in nightly}
    return pytest.mark.parametrize("family", [pytest.param(name, marks=marks.get(name, [])) for name in PUBLISHED])


def words(family: str, source: str | Path, prompts: Path, directory: Path, *more: str) -> list[str]:
    return [
        f"model.from_pretrained={source}",
        "rm=symmetry",
        f"model.data.train.webdataset.local_root_path={prompts}",
        f"model.infer.inference_steps={STEPS}",
        f"model.infer.height={SIZE}",
        f"model.infer.width={SIZE}",
        *(f"model.pipeline.arguments.{name}={value}" for name, value in ARGUMENTS.get(family, {}).items()),
        "model.peft.lora_tuning.adapter_dim=4",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
        "model.optim.lr=0.1",
        "sched=constant",
        "trainer.accelerator=cpu",
        "trainer.draftp_sd.max_steps=2",
        "trainer.draftp_sd.val_check_interval=0",
        f"exp_manager.explicit_log_dir={directory}",
        "report.enable=false",
        *more,
    ]


def figures(directory: Path) -> list[list[float]]:
    with (directory / "metrics.csv").open(encoding="utf-8", newline="") as file:
        names = ("reward", "kl_penalty", "loss", "grad_norm")
        return [[float(row[name]) for name in names] for row in csv.DictReader(file)]


def trained(family: str, source: str | Path, prompts: Path, directory: Path, *more: str) -> Any:
    """The model after a run whose figures are right; ``run_training`` is this, but for its exit code."""
    cfg = load_config("draftp_sd", words(family, source, prompts, directory, *more))
    assert cfg.model.family == family, cfg.model.family_because
    ended = train(RunSettings.of(cfg), Interruption())
    assert ended.code == 0
    assert torch.tensor(figures(directory)).isfinite().all()
    assert all(row[-1] > 0 for row in figures(directory))
    return ended.module.model


def pictures(family: str, pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    if family == "sd15":  # the recipe's; the folder says PNDM
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    given = {"negative_prompt": [" "]} if family == "qwen_image" else {}
    size = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipe(prompt=["a red cube"], generator=generator, **size, **given, **ARGUMENTS.get(family, {})).images


def plain(folder: Path, adapter: Any = None) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    if adapter is not None:
        pipe.load_lora_weights(adapter)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def saved(family: str) -> Path:
        path = tmp_path_factory.mktemp(family) / "model"
        narrow(family).save_pretrained(path)
        return path

    return saved


# what ComfyUI has names for below "transformer." (comfy/lora.py: model_lora_keys_unet, with comfy/utils.py:
# mmdit_to_diffusers, flux_to_diffusers, z_image_to_diffusers); of Qwen-Image all of diffusers'
_ATTENTION = {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                                          "to_add_out")}  # fmt: skip
_LINEARS = {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"}
_FLUX = {"transformer_blocks": _ATTENTION | _LINEARS | {f"{ff}.linear_{way}" for ff in ("ff", "ff_context")
                                                        for way in ("in", "out")},
         "single_transformer_blocks": {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_qkv_mlp_proj", "attn.to_out",
                                       "proj_mlp", "proj_out"}}  # fmt: skip
_Z_IMAGE = {*(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
            *(f"feed_forward.w{n}" for n in (1, 2, 3))}  # fmt: skip
COMFYUI: dict[str, dict[str, set[str]]] = {
    "sd35": {"transformer_blocks": _ATTENTION | _LINEARS | {f"attn2.to_{x}" for x in ("q", "k", "v", "out.0")}},
    "flux1": _FLUX,
    "flux2": _FLUX,
    "flux2_klein": _FLUX,
    "qwen_image": {"transformer_blocks": _ATTENTION | {f"{stream}_mlp.net.{layer}" for stream in ("img", "txt")
                                                       for layer in ("0.proj", "2")}},
    "z_image": {"layers": _Z_IMAGE, "noise_refiner": _Z_IMAGE, "context_refiner": _Z_IMAGE},
}  # fmt: skip


def comfyui_finds(family: str, file: Path) -> None:
    """Every tensor, at its scale: without ``alpha`` it multiplies B·A by 1."""
    for name in load_file(file):
        root, blocks, number, layer = name.split(".", 3)
        layer, factor, end = layer.rsplit(".", 2)
        assert (root, number.isdigit(), end) == ("transformer", True, "weight")
        assert factor in ("lora_A", "lora_B")
        assert layer in COMFYUI[family][blocks], name


@each("sdxl")
def test_an_adapter_on_a_folder_and_its_exports(family: str, folder: Any, prompts: Path, tmp_path: Path) -> None:
    source, where = folder(family), tmp_path / "run"
    tuned = pictures(family, trained(family, source, prompts, where, "model.peft.lora_tuning.alpha=6").pipe)
    assert (tuned - pictures(family, plain(source))).abs().max() > 0.01
    found = {"diffusers": pictures(family, plain(source, where / "export" / WEIGHT_NAME))}
    assert export([str(where), "--to", "pipeline", "--output", str(tmp_path / "merged")]) == 0
    found["merged"] = pictures(family, plain(tmp_path / "merged"))
    kohya = where / "export" / KOHYA_NAME
    assert kohya.exists() == (family in UNETS)
    if family in UNETS:
        found["kohya"] = pictures(family, plain(source, load_file(kohya)))
        file = tmp_path / "whole.safetensors"
        assert export([str(where), "--to", "single-file", "--output", str(file)]) == 0
        of_file = type(plain(source)).from_single_file(
            file, config=str(source), local_files_only=True, safety_checker=None
        )
        found["single file"] = pictures(family, of_file)
    else:
        comfyui_finds(family, where / "export" / WEIGHT_NAME)
    for way, picture in found.items():
        assert (tuned - picture).abs().max() < 1e-3, way


@each("sdxl")
def test_all_weights_of_a_hub_id(
    family: str, folder: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache(monkeypatch, tmp_path / "cache", "someone/narrow", folder(family))
    more = ["model.peft.peft_scheme=none", "model.optim.lr=1e-3", "trainer.draftp_sd.max_steps=1"]
    model = trained(family, "someone/narrow", prompts, tmp_path / "run", *more)
    pipe = plain(folder(family))
    base = getattr(pipe, model.trained).state_dict()
    exported = type(model.denoiser).from_pretrained(tmp_path / "run" / "export" / model.trained)
    unmoved = [name for name, tensor in exported.state_dict().items() if torch.equal(tensor, base[name])]
    assert len(unmoved) < 0.2 * len(base), unmoved
    setattr(pipe, model.trained, exported)
    assert (pictures(family, model.pipe) - pictures(family, pipe)).abs().max() < 1e-3


# of those at night, tests/test_pipelines_matrix.py has the same of a smaller model, in float64, every day
@each("sd15", "sd21", "flux1", "flux2", nightly=("sdxl", "flux2_klein", "qwen_image", "z_image"))
def test_the_gradient_of_every_method_is_that_of_the_naive_graph(family: str) -> None:
    pipe = narrow(family)
    arguments = {**family_of(type(pipe)).arguments, **ARGUMENTS.get(family, {})}
    model = DiffusionModel(pipe, arguments=arguments)
    if family == "sd15":
        model.set_scheduler("DDIM", 0.0)
    with_adapters(model, ("attn2.to_q", "conv1") if family in UNETS else model.lora_targets)

    guidance = 1.0 if family in ("flux2_klein", "qwen_image", "z_image") else 2.0  # here a second call of all networks

    def inputs() -> dict[str, Any]:
        return model.inputs(PROMPTS, 3, guidance, 16, 16)

    for method in (name for name, kind in methods().items() if kind.kind == "reward"):
        rule = methods()[method](**SETTINGS.get(method, {})).plan
        result, _ = run(model, rule, inputs(), seed=3)
        got = flat(model, result.surrogate())
        expected = flat(model, naive_loss(model, result.plan, inputs)[0])
        assert expected.norm() > 0, method
        assert relative(got, expected) < 1e-3, method


@each()
def test_the_network_at_a_chosen_noise_level(family: str) -> None:
    pipe = narrow(family)
    model = DiffusionModel(pipe, arguments={**family_of(type(pipe)).arguments, **ARGUMENTS.get(family, {})})
    sampling = Sampling(guidance_scale=2.0, height=16, width=16)
    if (family, "pairs") in NO:
        with pytest.raises(ConfigurationError, match="cannot be called at a noise level of our choice"):
            DirectCalls(model, sampling)
        return
    calls = DirectCalls(model, sampling)  # tries that each row of one call at mixed levels is the pipeline's own
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = encode(model, pictures, latent_shape=calls.latent_shape)
    with torch.no_grad():
        prediction = calls.predict(calls.conditioning(PROMPTS), latents, torch.tensor([10, 700]))
    assert prediction.shape == latents.shape
    assert prediction.isfinite().all()
    assert prediction.any()


def spread(family: str, source: Path, prompts: Path, directory: Path, *more: str) -> int:
    return run_training(load_config("draftp_sd", words(family, source, prompts, directory, *more)))


LAYOUTS = {
    "TP2": ["model.tensor_model_parallel_size=2"],
    "FSDP2": ["model.fsdp=true", "model.micro_batch_size=1"],
}


@each(*PUBLISHED, nightly=("sdxl",))
def test_two_processes_train_as_one(
    processes: ProcessPool, family: str, folder: Any, prompts: Path, tmp_path: Path
) -> None:
    few = "model.peft.lora_tuning.target_modules=[attn2.to_out.0,conv1]"  # hundreds, each with its own sums over gloo
    short = ["trainer.draftp_sd.max_steps=1", "model.infer.inference_steps=1", few] if family in UNETS else []
    given = [family, folder(family), prompts]
    trained(*given, tmp_path / "one", "model.optim.lr=1e-3", *short)
    expected = figures(tmp_path / "one")
    for layout, more in LAYOUTS.items():
        all_of_it = [*given, tmp_path / layout, "trainer.devices=2", "model.optim.lr=1e-3", *short, *more]
        if (family, layout) == ("sd21", "TP2"):
            with pytest.raises(AssertionError, match=r"attention heads: 5 .*Sizes that work: 1$"):
                processes.run(2, spread, *all_of_it)
            continue
        assert processes.run(2, spread, *all_of_it) == [0, 0]
        for found, row in zip(figures(tmp_path / layout), expected, strict=True):
            assert found == pytest.approx(row, rel=1e-3, abs=1e-8), layout


@SLOW
def test_flux_in_its_makers_file(tmp_path: Path) -> None:
    """As wide as published, 3072, which ``diffusers``' converter has fixed; one block of each kind, bfloat16: 1 GB."""
    pipe = narrow("flux1")
    sizes = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(sizes)
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu")
    start = 0
    for parameter in transformer.parameters():  # no two rows of a tensor, nor two tensors, alike
        numbers = torch.arange(start, start + parameter.numel(), dtype=torch.int32).remainder_(251)
        parameter.data.copy_(numbers.view_as(parameter))
        start += parameter.numel()
    save_file(flux_names(transformer), tmp_path / "flux1-dev.safetensors")
    save_file({n: t.contiguous() for n, t in vae_names(pipe.vae.state_dict()).items()}, tmp_path / "ae.safetensors")
    given = {"vae_path": tmp_path / "ae.safetensors", "text_path": save_text(pipe, tmp_path / "text")}
    model = load_model(tmp_path / "flux1-dev.safetensors", dtype=torch.bfloat16, **given)
    assert type(model.pipe) is type(pipe)
    assert dict(model.pipe.scheduler.config) == dict(pipe.scheduler.config)
    mine, theirs = model.denoiser.state_dict(), transformer.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for name, tensor in model.pipe.vae.state_dict().items():
        assert torch.equal(tensor, pipe.vae.state_dict()[name].to(torch.bfloat16)), name


def test_flux_2_as_published_needs_torchvision(folder: Any, tmp_path: Path) -> None:
    """Its tokenizer is a processor of pictures, too."""
    if transformers.utils.is_torchvision_available():
        pytest.skip("torchvision is installed")
    copy = shutil.copytree(folder("flux2"), tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text("utf-8"))
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (copy / "model_index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(
        CheckpointError, match=r"model/tokenizer: PixtralProcessor of transformers needs .*torchvision; install"
    ):
        load_model(copy)


@pytest.mark.parametrize("family", ["flux2", "flux2_klein", "qwen_image", "z_image"])
def test_single_files_that_are_not_read_say_what_to_give(family: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(narrow(family).transformer.state_dict(), file)
    assert load_config("draftp_sd", [f"model.from_pretrained={file}"]).model.family == family
    advice = f"the transformer of {PUBLISHED[family].pipeline}, which is not put together .* Give its diffusers folder"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {advice} or hub id as model\.from_pretrained"):
        load_model(file)


def test_the_matrix_in_the_documentation_is_current_and_its_tests_exist() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == renewed(page, matrix()), "python tests/families_page.py docs/models.md"
    cells = {(family, column) for family in PUBLISHED for column in COLUMNS}
    assert list(ROWS) == list(PUBLISHED)
    assert {*NO, *OTHERS, *NOTED} <= cells
    for family, column in cells:
        file, _, name = held_by(family, column).partition("::")
        function, _, parameter = name.removesuffix("]").partition("[")
        test = getattr(importlib.import_module(Path(file).stem), function)
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        values = {value.values[0] if hasattr(value, "values") else value for mark in marks for value in mark.args[1]}
        assert values >= ({parameter} if parameter else set()), held_by(family, column)
