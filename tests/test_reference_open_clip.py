"""Converted OpenCLIP checkpoints against ``open_clip``'s own model, tokenizer and torchvision's resizing.

``make reference`` installs these into ``.venv/reference``; ``make test`` runs it first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny.pictures import photograph

from nemo_aligner_diffusion.cli.convert_reward import main
from nemo_aligner_diffusion.rewards import CLIPReward, restore_reward
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

REFERENCE = Path(os.environ.get("NAD_REFERENCE") or Path(sys.prefix, "reference"))
SCRIPT = Path(__file__).parent / "reference" / "open_clip_reference.py"
PROMPTS = [
    "a red apple on a table",
    "Portrait of an ASTRONAUT, 4k, trending on artstation -- by Greg Rutkowski",
    "don't   stop;\tit's 12345 o'clock!!!",
    "Grün & 猫 🐈 naïve café",
    "cat " * 100,
    "",
]

pytestmark = pytest.mark.skipif(
    not (REFERENCE / "open_clip").is_dir(), reason=f"no {REFERENCE} with open_clip: run `make reference`"
)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(len(PROMPTS), 3, 32, 32, generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, images: torch.Tensor) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    picture = (photograph(303, 200).permute(1, 2, 0) * 255).round().byte().numpy()
    np.savez(folder / "input.npz", images=images.numpy(), prompts=np.array(PROMPTS), picture=picture)
    command = [sys.executable, str(SCRIPT), str(REFERENCE), str(folder / "input.npz"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["gelu", "quick_gelu", "vit_h_width"])
def test_converted_checkpoints_score_as_open_clip_does(
    theirs: Path, tmp_path: Path, images: torch.Tensor, name: str
) -> None:
    activation = "quick_gelu" if name == "quick_gelu" else "gelu"
    words = ["--kind", "hps_v2.1", "--source", theirs / f"{name}.pt", "--tokenizer", theirs / "tokenizer"]
    words += ["--activation", activation, "--output", tmp_path / "hps.nemo"]
    assert main([str(word) for word in words]) == 0
    reward = restore_reward(tmp_path / "hps.nemo")
    assert isinstance(reward, CLIPReward)
    expected = np.load(theirs / f"{name}.npz")
    cosine = torch.from_numpy(expected["cosine"])
    assert cosine.std() > 0.05, "a model that scores everything alike would prove nothing"
    ours = reward.score_matrix(images, PROMPTS)
    # Relative to the size of a score: single cosines come as near to zero as chance has it.
    assert (ours - cosine).abs().max() < 1e-4 * cosine.abs().mean()
    torch.testing.assert_close(reward(images, PROMPTS), ours.diag(), rtol=1e-4, atol=1e-6)
    pick = restore_reward(tmp_path / "hps.nemo", score="pickscore")
    assert isinstance(pick, CLIPReward)
    scaled = cosine * float(expected["scale"])
    assert (pick.score_matrix(images, PROMPTS) - scaled).abs().max() < 1e-4 * scaled.abs().mean()


def test_tokens_are_open_clips(theirs: Path) -> None:
    from nemo_aligner_diffusion.rewards.clip.tokenizer import read_tokenizer_files, tokenizer_from_bytes

    files = read_tokenizer_files(theirs / "tokenizer")
    tokenizer = tokenizer_from_bytes(files["vocab.json"], files["merges.txt"], "t")
    for prompt, row in zip(PROMPTS, np.load(theirs / "tokens.npz")["tokens"], strict=True):
        ids = tokenizer(prompt, truncation=True, max_length=77).input_ids
        assert ids == row[: len(ids)].tolist(), prompt
        assert not row[len(ids) :].any(), prompt


@pytest.mark.parametrize("size", [32, 48, 224])
def test_pictures_are_prepared_as_torchvision_does(theirs: Path, size: int) -> None:
    made = np.load(theirs / "pictures.npz")
    picture = torch.round(photograph(303, 200) * 255).unsqueeze(0) / 255
    uncut = Preprocessing(size, resize="pad_uncut").square(picture)[0]
    assert torch.equal(uncut, torch.from_numpy(made[f"pad_uncut{size}"])), "HPSv2's own transform, bit for bit"
    for resize in ("crop", "pad"):
        ours = Preprocessing(size, (0, 0, 0), (1, 1, 1), resize=resize)(picture)[0]
        expected = torch.from_numpy(made[f"{resize}{size}"]).permute(2, 0, 1) / 255
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < 1e-2
