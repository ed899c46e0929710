"""report.html: complete, harmless, and there for a run in any state."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import struct
import subprocess
import sys
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.evaluation.figures import picture_grid, save_image
from nemo_aligner_diffusion.evaluation.metrics.kl_penalty import KLPenalty
from nemo_aligner_diffusion.evaluation.metrics.seed_diversity import SeedDiversity
from nemo_aligner_diffusion.evaluation.report import main, write_report
from nemo_aligner_diffusion.evaluation.report.pictures import before_after, over_training
from nemo_aligner_diffusion.evaluation.report.usage import usage
from nemo_aligner_diffusion.evaluation.report.view import build_view, findings
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, read_run, read_table

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'single'"
CONFIG = """
name: draftp_sd
trainer: {devices: 1, draftp_sd: {max_steps: 20}}
exp_manager: {explicit_log_dir: results/demo}
model:
  algorithm: draft+
  kl_coeff: 0.2
  infer: {unconditional_guidance_scale: 4.0, inference_steps: 20, sampler_type: DDIM}
  peft: {peft_scheme: sdlora, lora_tuning: {adapter_dim: 8}}
  optim: {name: fused_adam, lr: 0.001}
rm: {name: clip, model: {restore_from_path: null}}
"""


class Page(HTMLParser):
    """Checks that tags close, and collects what a browser would load or run."""

    VOID = frozenset({"meta", "img", "br", "input", "path", "use", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            assert not name.startswith("on"), f"an event handler in <{tag}>"
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def make_run(folder: Path, steps: int = 20, **validation: str) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    lines = ["step,reward,kl_penalty,loss,grad_norm,lr,images_per_second,peak_memory_bytes,images,seconds,reward/clip"]
    lines += [f"{s},{20 + s / 10},{s / 1000},-20,0.{s:03d},0.001,6.5,2000000000,8,1.5,{s}" for s in range(1, steps + 1)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    extra, values = ",".join(["", *validation]), ",".join(["", *validation.values()])
    rows = [f"{s},{20 + s / 10},20{values}" for s in range(0, steps + 1, 10)]
    (folder / "validation.csv").write_text("\n".join([f"step,reward,base_reward{extra}", *rows]) + "\n")
    for step in range(0, steps + 1, 10):
        grid = picture_grid(
            {"base": torch.zeros(2, 3, 16, 16), "tuned": torch.full((2, 3, 16, 16), step / 20)},
            ["red apple", HOSTILE],
            rewards={"base": [20.0, 21.0], "tuned": [20.0 + step, 20.5]},
            seeds=[0, 1],
        )
        save_image(grid, folder / "samples" / f"step_{step:06d}.png")
    scores = [
        {"prompt": "red apple", "seed": 0, "base_reward": 20.0, "reward": 22.0},
        {"prompt": HOSTILE, "seed": 1, "base_reward": 21.0, "reward": 20.5},
    ]
    (folder / "validation_samples.json").write_text(json.dumps({"step": steps, "prompts": scores}))
    state = {"status": "finished", "command": ["train.py", "model.kl_coeff=0.2"], "host": HOSTILE, "skipped_steps": 1}
    (folder / "run.json").write_text(json.dumps(state))
    return folder


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_finished_run_has_everything(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", share_improved="0.5")
    (run / "export").mkdir()
    (run / "export" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    text, page = read(write_report(run))
    for words in (
        "DRaFT+",
        "a LoRA of rank 8",
        "the embedded CLIP reward",
        "20.00 → 22.00",
        "50%</b>",
        "1 of 2 pictures score higher",
        "Validation reward",
        "KL penalty",
        "Gradient norm",
        "Learning rate",
        "Parts of the reward",
        "1 optimizer step skipped",
        "load_lora_weights",
        "--scales 0,0.5,1,1.5",
        "unconditional_guidance_scale",
        "of 20 · 0:00:30",
    ):
        assert words in text, words
    assert 'class="chosen">model.kl_coeff' in text
    assert text.count('class="pair"') == 2
    assert text.count("data:image/") == 2 * 2 + 2 * 3  # pairs; and for each prompt base, step 10 and step 20
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)  # namespaces of SVG are names, not requests


def test_every_prompt_is_shown_over_training_before_a_second_seed_of_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    names = [f"prompt {i}" for i in range(5)]
    pairs = [(name, seed) for name in names for seed in range(3)]
    grey = torch.full((15, 3, 16, 16), 0.5)
    for step in (10, 20):
        rows = {"base": grey, "tuned": grey}
        grid = picture_grid(rows, [name for name, _ in pairs], seeds=[seed for _, seed in pairs])
        save_image(grid, run / "samples" / f"step_{step:06d}.png")
    shown = over_training(read_run(run))
    assert shown is not None
    assert [prompt for prompt, _ in shown["rows"]][:5] == names


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    text, page = read(write_report(make_run(tmp_path / "run")))
    assert page.scripts == 1  # the page's own
    assert "<script>alert" not in text
    assert unescape(text).count(HOSTILE) >= 4  # pair, alt texts, table of prompts, environment


def test_curves_can_be_read_off(tmp_path: Path) -> None:
    text, _ = read(write_report(make_run(tmp_path / "run")))
    curves = [json.loads(unescape(found)) for found in re.findall(r'data-curves="([^"]*)"', text)]
    validation = next(c for c in curves if [s["label"] for s in c["series"]] == ["tuned", "base"])
    assert validation["series"][0] == {"label": "tuned", "x": [0, 10, 20], "y": [20, 21, 22]}
    assert 0 < validation["area"]["left"] < 0.2


def test_the_report_is_the_same_for_the_same_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def shown_code(run: Path) -> str:
    """The code of "With plain diffusers", as a reader of the page copies it."""
    return unescape(usage(read_run(run))["code"])


@pytest.mark.parametrize(
    ("name", "full", "sampler", "words"),
    [
        ("StableDiffusion", False, "null", "guidance_scale=4.0"),
        ("StableDiffusion", False, "dpm++2m_sde", "algorithm_type='sde-dpmsolver++'"),
        ("StableDiffusion", True, "PARA_DDIM", "unet = AutoModel"),
        ("QwenImage", True, "null", "true_cfg_scale=4.0, height=16, width=16, negative_prompt=' '"),
        ("QwenImage", False, "null", "pipeline.load_lora_weights"),
        ("OvisImage", False, "null", "pipeline.transformer.load_lora_adapter"),
    ],
)
def test_the_shown_code_makes_the_tuned_models_pictures(
    tmp_path: Path, name: str, full: bool, sampler: str, words: str
) -> None:
    """Of any pipeline class: what is shown is run, and its picture is that of the model that was exported."""
    from tiny_pipelines import ROWS

    from nemo_aligner_diffusion.diffusion.loading import load_model
    from nemo_aligner_diffusion.diffusion.lora import add_lora
    from nemo_aligner_diffusion.training.export import export_weights

    row = next(row for row in ROWS if row.pipeline.__name__ == f"{name}Pipeline")
    row.build().save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    model.set_scheduler(None if sampler == "null" else sampler)
    if not full:
        add_lora(model.denoiser, 2, target_modules=("to_q", "to_k"))
    torch.manual_seed(0)
    changed = [p for n, p in model.denoiser.named_parameters() if full or "lora_B" in n]
    for parameter in changed:
        parameter.data += 0.1 * torch.randn_like(parameter)
    run = make_run(tmp_path / "run", steps=1)
    export_weights(model, run / "export")
    (run / "run.json").write_text(json.dumps({"status": "finished", "pipeline": model.described()}))
    (run / "config.yaml").write_text(
        f"exp_manager: {{explicit_log_dir: {run}}}\n"
        f"model: {{from_pretrained: {tmp_path / 'model'}, infer: {{unconditional_guidance_scale: 4.0, "
        f"inference_steps: 3, sampler_type: {sampler}, height: 16, width: 16, eta: 0.0}}}}\n"
    )
    code = shown_code(run)
    assert words in code
    pipeline = check_the_picture(code, model, 16)
    assert type(pipeline.scheduler) is type(model.pipe.scheduler)


def check_the_picture(code: str, model: Any, side: int) -> Any:
    """The code's picture is the model's; its pipeline."""
    from nemo_aligner_diffusion.diffusion.generate import Sampling, generate

    found: dict[str, Any] = {}
    exec(code, found)
    picture = found["picture"]
    assert isinstance(picture, Image.Image)
    assert picture.size == (side, side)
    expected = generate(model, ["red apple"], [0], Sampling(3, 4.0, side, side))[0]
    shown = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(side, side, 3).permute(2, 0, 1)
    torch.testing.assert_close(shown / 255, expected, rtol=0, atol=0.51 / 255)
    return found["pipeline"]


@pytest.mark.parametrize("base", ["one file", "a denoiser's and a VAE's file", "a folder and a VAE's file"])
def test_a_base_model_that_is_no_one_folder_becomes_one(tmp_path: Path, base: str) -> None:
    """By the command that the page shows; then the code makes the tuned model's pictures."""
    from safetensors.torch import save_file
    from tiny.published import narrow, save_text, whole_file

    from nemo_aligner_diffusion.cli.export import main as export
    from nemo_aligner_diffusion.diffusion.loading import load_model
    from nemo_aligner_diffusion.diffusion.lora import add_lora
    from nemo_aligner_diffusion.training.export import export_weights

    pipe, other, full = narrow("sd15"), narrow("sd15", seed=1), base.startswith("a folder")
    text = {"text_path": save_text(pipe, tmp_path / "text")}
    vae = tmp_path / "vae.safetensors"
    save_file(other.vae.state_dict(), vae)
    if base == "one file":
        loaded = {"source": whole_file("sd15", pipe, tmp_path / "model.safetensors"), **text}
    elif full:
        pipe.save_pretrained(tmp_path / "model")
        loaded = {"source": tmp_path / "model", "vae_path": vae}
    else:
        save_file(pipe.unet.state_dict(), tmp_path / "unet.safetensors")
        loaded = {"denoiser_path": tmp_path / "unet.safetensors", "vae_path": vae, **text}
    model = load_model(**loaded)
    model.set_scheduler("DDIM")
    if not full:
        add_lora(model.denoiser, 2, target_modules=("to_q", "to_k"))
    torch.manual_seed(0)
    for name, parameter in model.denoiser.named_parameters():
        if full or "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    run = make_run(tmp_path / "run", steps=1)
    export_weights(model, run / "export")
    (run / "run.json").write_text(json.dumps({"status": "finished", "pipeline": model.described()}))
    keys = {"source": "model.from_pretrained", "denoiser_path": "model.unet_config.from_pretrained",
            "vae_path": "model.first_stage_config.from_pretrained",
            "text_path": "model.cond_stage_config.from_pretrained"}  # fmt: skip
    settings = {"exp_manager.explicit_log_dir": run, **{keys[key]: path for key, path in loaded.items()},
                "model.infer": "{unconditional_guidance_scale: 4.0, inference_steps: 3, sampler_type: DDIM, "
                               "height: 32, width: 32, eta: 0.0}"}  # fmt: skip
    tree = OmegaConf.from_dotlist([f"{key}={value}" for key, value in settings.items()])
    OmegaConf.save(tree, run / "config.yaml")
    shown = usage(read_run(run))
    (command,) = [line for line in unescape(shown["commands"]).splitlines() if "nad-export" in line]
    assert export(shlex.split(command)[1:]) == 0
    check_the_picture(unescape(shown["code"]), model, 32)


def test_a_pipeline_object_that_was_tuned_is_named_or_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "export").mkdir(exist_ok=True)
    (run / "export" / "pytorch_lora_weights.safetensors").touch()
    for given, named in (("org/name", "org/name"), ("", "FOLDER")):
        (run / "run.json").write_text(json.dumps({"pipeline": {"given": given}}))
        shown = usage(read_run(run))
        assert f" --model {named} " in unescape(shown["commands"])
        assert f"from_pretrained('{named}')" in unescape(shown["code"])


@pytest.mark.parametrize("keep", [(), ("config.yaml",), ("metrics.csv",), ("samples",), ("run.json",)])
def test_any_part_of_a_run_makes_a_page(tmp_path: Path, keep: tuple[str, ...]) -> None:
    run = make_run(tmp_path / "run")
    for path in sorted(run.rglob("*"), reverse=True):
        if path.relative_to(run).parts[0] not in keep:
            path.rmdir() if path.is_dir() else path.unlink()
    text, _ = read(write_report(run))
    assert "Before and after" in text
    assert ("No optimizer step yet" in text) == ("metrics.csv" not in keep)


def test_a_run_stopped_after_a_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    with (run / "metrics.csv").open("a") as stream:
        stream.write("2,20.5,0.00")  # killed while writing
    (run / "run.json").write_text(json.dumps({"status": "interrupted"}))
    text, _ = read(write_report(run))
    assert "This run was interrupted" in text
    assert "until step 1 of 20" in text
    assert "Training reward" in text


def test_damaged_files_are_named_and_cost_only_themselves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "run.json").write_text("{")
    (run / "validation_samples.json").write_text('{"prompts": [{}]}')
    (run / "config.yaml").write_text("a: [")
    newest = run / "samples" / "step_000020.png"
    newest.write_bytes(newest.read_bytes()[:200])
    text, _ = read(write_report(run))
    for name in ("run.json", "validation_samples.json", "config.yaml"):
        assert f"{name} cannot be read" in text
    assert "Step 10." in text  # the newest whole grid
    assert "Training reward" in text


def png_of(chunk: bytes, data: bytes) -> bytes:
    """A PNG whose first chunk after the header is this one."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="PNG")
    whole = struct.pack(">I", len(data)) + chunk + data + struct.pack(">I", zlib.crc32(chunk + data))
    return file.getvalue()[:33] + whole + file.getvalue()[33:]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!doctype html>",
        png_of(b"iCCP", b"x\0\0" + zlib.compress(b"x" * 9)[:6]),
        png_of(b"zTXt", b"grid\0\0" + zlib.compress(b"0" * (80 << 20))),
        png_of(b"tRNS", b""),
        png_of(b"pHYs", b""),
    ],
    ids=["empty", "web page", "profile", "bomb", "no transparency", "no size"],
)
def test_a_damaged_grid_is_named_and_an_older_one_is_shown(tmp_path: Path, content: bytes) -> None:
    run = make_run(tmp_path / "run")
    (run / "samples" / "step_000020.png").write_bytes(content)
    files = read_run(run)
    assert before_after(files)["step"] == 10
    (problem,) = files.problems
    assert "samples/step_000020.png cannot be read" in problem


@pytest.mark.parametrize("place", ["[0, 0, 8, 0]", "[0, 0, 0, 8]", "[-1, 0, 8, 8]", "[0, 0, 8]"])
def test_a_rectangle_that_is_none_is_not_cut_out(tmp_path: Path, place: str) -> None:
    run = make_run(tmp_path / "run")
    image = Image.new("RGB", (16, 16))
    cell = '"prompt": "a", "seed": 0, "base_reward": 1.0, "reward": 2.0, "tuned": [0, 0, 8, 8]'
    image.info["grid"] = f'{{"cells": [{{{cell}, "base": {place}}}]}}'
    save_image(image, run / "samples" / "step_000020.png")
    files = read_run(run)
    assert before_after(files)["step"] == 10
    (problem,) = files.problems
    assert "step_000020.png cannot be read (ValueError: it does not say what it shows" in problem


def test_a_run_is_called_as_its_user_called_it(tmp_path: Path) -> None:
    run = RunFiles(tmp_path / "my_third_run", config={"name": "draftp_sd"})
    assert build_view(run)["name"] == "my_third_run"  # not as the recipe is called
    chosen = RunFiles(tmp_path / "my_third_run", config=run.config, run={"command": ["train.py", "name=draftp_sd"]})
    assert build_view(chosen)["name"] == "draftp_sd"


HUB = "model: {from_pretrained: some/model}"


@pytest.mark.parametrize(
    ("rm", "words"),
    [
        ("null", "the embedded CLIP reward"),
        ("{name: clip, model: {restore_from_path: models/pick.nemo}}", "the reward model pick.nemo"),
        ("{name: symmetry}", "symmetry (an analytic reward)"),
        ("{name: composite, parts: {symmetry: {weight: 2.0}, clip: null}}", "composite of symmetry, clip"),
        (
            f"{{name: classifier, target_class: goldfish, {HUB}}}",
            "the class goldfish of a classifier",
        ),
        (
            f"{{name: detection, query: a cat, remove: true, {HUB}}}",
            "the absence of a cat, by a detector",
        ),
        ("{name: custom, import_path: my.module:score}", "the reward my.module:score"),
        ("{name: yesterdays}", "the reward yesterdays"),
        ("[1]", "the reward "),
    ],
)
def test_the_lead_says_what_was_rewarded(tmp_path: Path, rm: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(f"rm: {rm}\n")
    lead = build_view(read_run(tmp_path))["lead"]
    assert f"tuned all denoiser weights of the embedded model, towards {words}." in lead


def test_the_kl_penalty_names_its_space(tmp_path: Path) -> None:
    described = KLPenalty().describe(RunFiles(tmp_path, config={"model": {"kl_coeff": 0.2}}))
    assert "measured in epsilon (velocity, where the model is a flow), before its coefficient (0.2)" in described
    described = KLPenalty().describe(RunFiles(tmp_path, config={"model": {"kl_space": "prediction"}}))
    assert "measured in prediction" in described


def test_a_configuration_of_aliases_is_not_expanded(tmp_path: Path) -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join(["l0: &l0 [0, 0]", *levels]))
    (problem,) = read_run(tmp_path).problems
    assert "config.yaml cannot be read (ValueError: " in problem


def test_rows_that_are_damaged_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.csv").read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b"-20", b"-2\xff")
    (run / "metrics.csv").write_bytes(b"".join([*lines[:8], b"8,20.8\n", *lines[9:], b"21,2"]))
    files = read_run(run)
    assert files.problems == ["metrics.csv: 2 of 20 rows are damaged and left out"]
    assert len(files.metrics["step"]) == 18


def test_what_a_folder_says_does_not_become_code(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "export").mkdir()
    (run / "export" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    hostile = "x=__import__('os').abort()#"
    facts = {
        "guidance_argument": hostile,
        "trained": hostile,
        "loads_lora": False,
        "arguments": {hostile: 1, "k": hostile},
    }
    (run / "run.json").write_text(json.dumps({"pipeline": facts}))
    code = shown_code(run)
    assert "pipeline.transformer.load_lora_adapter" in code
    assert code.count("abort") == code.count(repr(hostile)) == 1  # as a string


def test_text_that_no_page_can_hold_is_escaped_and_bounded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    prompt = "\ud800\x00\x1b[2J" + "a" * 100_000
    rows = [{"prompt": prompt, "seed": 0, "base_reward": 1.0, "reward": 2.0}]
    (run / "validation_samples.json").write_text(json.dumps({"step": 20, "prompts": rows}))
    (run / "run.json").write_text(
        json.dumps({"host": prompt, "images": 10**40, "deep": json.loads("[" * 49 + "]" * 49)})
    )
    text, _ = read(write_report(run))
    assert "\x1b" not in text
    assert "\\ud800\\x00\\x1b[2Jaaa" in text
    assert "a" * 3000 not in text


def test_a_report_is_written_without_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "export").mkdir()
    (run / "export" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    code = (
        "import sys\n"
        "from nemo_aligner_diffusion.evaluation.report import main\n"
        f"assert main([{str(run)!r}]) == 0\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pipeline.scheduler = DDIMScheduler.from_config" in unescape((run / "report.html").read_text())


def test_a_missing_directory_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OutputError, match="is no folder"):
        write_report(tmp_path / "nothing")
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(make_run(tmp_path / "run"))]) == 0
    assert (tmp_path / "run" / "report.html").is_file()


def titles(run: Path) -> list[str]:
    return [finding.title for finding in findings(read_run(run))]


def test_lost_diversity_is_a_warning(tmp_path: Path) -> None:
    assert not any(
        "Diversity" in title for title in titles(make_run(tmp_path / "a", diversity="0.5", base_diversity="0.6"))
    )
    lost = make_run(tmp_path / "b", diversity="0.3", base_diversity="0.6")
    assert "Diversity fell to 50% of the base model's" in titles(lost)
    assert SeedDiversity().kept(read_run(lost)) == pytest.approx(0.5)


def write_metrics(run: Path, reward: list[float], kl: list[float], norm: list[float]) -> None:
    rows = [f"{i + 1},{r},{k},{n}" for i, (r, k, n) in enumerate(zip(reward, kl, norm, strict=True))]
    (run / "metrics.csv").write_text("\n".join(["step,reward,kl_penalty,grad_norm", *rows]) + "\n")


def test_reward_bought_with_kl_is_a_warning(tmp_path: Path) -> None:
    run, steps = make_run(tmp_path / "run"), range(60)
    title = "The last third of the run is bought dearly"
    steady = [math.sqrt(s) for s in steps], [0.001 * s for s in steps]
    write_metrics(run, *steady, norm=[1.0] * 60)
    assert title not in titles(run)
    hacked = [min(s, 40) / 10 + s / 100 for s in steps], [0.001 * s + (0.01 * (s - 40) if s > 40 else 0) for s in steps]
    write_metrics(run, *hacked, norm=[1.0] * 60)
    assert title in titles(run)


def test_exploding_gradients_are_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_metrics(run, [1.0] * 60, [0.0] * 60, [1.0] * 60)
    assert "Gradients are growing" not in titles(run)
    write_metrics(run, [1.0] * 60, [0.0] * 60, [1.0] * 50 + [30.0] * 10)
    assert "Gradients are growing" in titles(run)


def test_a_reward_that_collapses_is_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "validation.csv").write_text("step,reward,base_reward\n0,20,20\n10,22,20\n20,21.8,20\n")
    assert "The reward has fallen from its best value" not in titles(run)
    (run / "validation.csv").write_text("step,reward,base_reward\n0,20,20\n10,22,20\n20,20.5,20\n")
    assert "The reward has fallen from its best value" in titles(run)
    (run / "validation.csv").write_text("step,reward,base_reward\n0,20,20\n20,19,20\n")
    assert "The tuned model scores below the base model" in titles(run)
    assert any("Validation reward 19.00, by 1.000 below" in finding.text for finding in findings(read_run(run)))


def test_a_spread_is_no_part_of_a_reward(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.csv").write_text("step,reward,reward_std,clip_fraction\n1,1.0,0.5,0.1\n2,1.1,0.4,0.2\n")
    text, _ = read(write_report(run))
    assert "Parts of the reward" not in text
    assert "Spread of the rewards" in text
    assert "Clipped, share of" in text


def test_a_mean_that_few_pictures_carry_is_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", share_improved="0.25")
    assert "Only 25% of the validation pictures improved" in titles(run)
    (run / "validation.csv").write_text("step,reward,base_reward,share_improved\n0,20,20,0\n20,19,20,0.25\n")
    assert not any("pictures improved" in title for title in titles(run))  # it fell: no gain of anybody


def test_a_resumed_table_keeps_the_last_row_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,reward\n1,1.0\n2,2.0\n3,3.0\n2,20\n3,nonsense\n4\n")
    table = read_table(path)
    assert table["step"] == [1, 2, 3]
    assert table["reward"][:2] == [1.0, 20.0]
    assert math.isnan(table["reward"][2])
    path.write_text("")
    assert read_table(path) == {}
