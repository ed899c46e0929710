"""Frozen parts on the device in their turn alone: who is there when, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decoding import gradient, inputs_of, model_of
from test_training_run import adapter, figures, run
from tiny.gradients import flat
from tiny.gradients import run as rollout_of
from tiny_pipelines import PROMPTS

from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.offload import Offload
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.taps import PromptCache
from nemo_aligner_diffusion.diffusion.trajectory import sample
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.rewards import build_reward
from nemo_aligner_diffusion.training.build import set_up_offload


def watched(model: DiffusionModel) -> set[tuple[str, str]]:
    """(who is called, whose turn it is), from now on."""
    seen: set[tuple[str, str]] = set()

    def watch(name: str, network: Any) -> None:
        network.register_forward_pre_hook(lambda *_: seen.add((name, " ".join(sorted(model.offload.here)))))

    for name, network in model.networks.items():
        watch("text_encoder" if name.startswith("text_encoder") else name, getattr(network, "decoder", network))
    return seen


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "qwen-image"])
def test_each_part_is_called_in_its_turn_and_all_is_as_before(name: str) -> None:
    model = model_of(name)
    expected, pictures = gradient(model, name)
    model.offload = Offload(model.frozen_parts())
    seen = watched(model)
    found, again = gradient(model, name)
    assert torch.equal(found, expected)
    assert torch.equal(again, pictures)
    assert seen == {("text_encoder", "text_encoder"), (model.trained, ""), ("vae", "vae")}
    assert not model.offload.here
    generators = [torch.Generator().manual_seed(j) for j in range(len(PROMPTS))]
    sample(model, generators, inputs_of(model, name))
    assert len(seen) == 3
    assert not model.offload.here


def test_with_re_noised_reads_and_kept_prompts_turns_end_too() -> None:
    model = model_of("sd")
    twice = Plan(active=(1,), renoise=2, own_step=True)
    expected = flat(model, rollout_of(model, twice, inputs_of(model, "sd"), reference=True)[0].surrogate(0.5))
    model.offload, model.prompt_cache = Offload(model.frozen_parts()), PromptCache(8)
    seen = watched(model)
    for _ in range(2):
        found = flat(model, rollout_of(model, twice, inputs_of(model, "sd"), reference=True)[0].surrogate(0.5))
        assert (found - expected).norm() < 1e-10 * expected.norm()
    assert seen == {("text_encoder", "text_encoder"), ("unet", ""), ("vae", "vae")}
    assert not model.offload.here


def test_a_run_with_all_three_is_the_same_to_the_last_bit(pipeline, prompts, tmp_path):
    for name, words in (("plain", []), ("turns", ["model.offload=[text_encoder,vae,reward]"])):
        assert run(pipeline, prompts, tmp_path / name, *words, "rm=clip") == 0
    assert figures(tmp_path / "turns") == figures(tmp_path / "plain")
    plain, turns = (adapter(tmp_path / name) for name in ("plain", "turns"))
    assert plain.keys() == turns.keys()
    assert all(torch.equal(plain[key], turns[key]) for key in plain)


def test_in_the_end_all_stays() -> None:
    model = model_of("sd")
    model.offload = Offload(model.frozen_parts())
    model.offload.bring("vae", model.device)
    model.offload.end(model.device)
    model.offload.release()
    assert not model.offload.parts
    assert not model.offload.here


def test_what_cannot_be_is_refused_by_name():
    for words, said in (
        (["model.offload=[unet]"], "model.offload names 'unet': expected any of text_encoder, vae, reward"),
        (["model.offload=[vae]", "model.fsdp=true", "model.fsdp_frozen=[vae]", "trainer.devices=2"], "both name vae"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            load_settings("draftp_sd", words)
    with pytest.raises(ConfigurationError, match=r"model\.offload names reward: there are no weights of it"):
        set_up_offload(["reward"], model_of("sd"), build_reward({"name": "symmetry"}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CPU's memory is the host's")
def test_on_a_gpu_weights_are_away_and_the_gradient_is_the_same() -> None:
    model = model_of("sdxl", torch.float32).to("cuda")
    expected, _ = gradient(model, "sdxl")
    whole = torch.cuda.memory_allocated()
    model.offload = Offload(model.frozen_parts())
    found, _ = gradient(model, "sdxl")
    assert torch.equal(found, expected)
    assert {p.device.type for part in model.offload.parts.values() for p in part.parameters()} == {"cpu"}
    held = sum(p.nbytes for part in model.offload.parts.values() for p in part.parameters())
    assert torch.cuda.memory_allocated() <= whole - 0.9 * held
