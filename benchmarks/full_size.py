"""NeMo-Aligner's published command on files of full size: the memory and seconds it takes, beside nad-plan's figures.

Makes the files of Stable Diffusion 1.5 or SDXL, random numbers under the names and in the shapes of the published ones
(once; text encoders and tokenizers as a local cache of the hub has them), plans the command and, where that fits this
machine, runs it for two steps at 256². A run that takes more memory than ``--limit`` fails.

    python -m benchmarks.full_size /tmp/full_size                                    # Stable Diffusion 1.5
    python -m benchmarks.full_size /tmp/full_size --model sdxl model.frozen_precision=bf16 model.global_batch_size=1
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.diffusion.files.architectures import ARCHITECTURES, REWARDS
from nemo_aligner_diffusion.embedded_assets import embedded_prompts_path, embedded_reward_path
from nemo_aligner_diffusion.formats.ldm import unet_names

SHORT = ["model.infer.height=256", "model.infer.width=256", "model.infer.inference_steps=2",
         "trainer.{}.max_steps=2", "trainer.{}.val_check_interval=0", "report.enable=false"]  # fmt: skip
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # before diffusers 0.16
RECIPES = {"sd15": "draftp_sd", "sdxl": "draftp_sdxl"}


def make(name: str, folder: Path) -> None:
    """The UNet in CompVis' names, the VAE in old diffusers names, the text encoders in a cache, prompts in a shard.

    Stable Diffusion 1.5 is published in float32 pickles, SDXL in float16 safetensors.
    """
    import diffusers
    import torch
    import transformers
    from safetensors.torch import save_file

    dtype = torch.float16 if name == "sdxl" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    parts = ARCHITECTURES[name].components
    unet = diffusers.UNet2DConditionModel.from_config(parts["unet"][1]).state_dict()
    unet = {f"model.diffusion_model.{new}": unet[old] for old, new in unet_names(unet, 2).items()}
    if dtype == torch.float16:
        save_file(unet, folder / "unet.ckpt")  # the content decides
    else:
        torch.save({"state_dict": unet}, folder / "unet.ckpt")
    del unet
    vae = diffusers.AutoencoderKL.from_config(parts["vae"][1]).state_dict()
    new = re.compile(rf"\.({'|'.join(map(re.escape, OLD))})\.")
    torch.save({new.sub(lambda m: f".{OLD[m[1]]}.", key): value for key, value in vae.items()}, folder / "vae.bin")
    repository = ARCHITECTURES[name].text[0]
    cached = folder / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = cached / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    if name == "sdxl":
        for part in ("text_encoder", "text_encoder_2"):
            kind: Any = getattr(transformers, parts[part][0])
            kind(kind.config_class(**parts[part][1])).save_pretrained(snapshot / part)
            tokenizer().save_pretrained(snapshot / part.replace("text_encoder", "tokenizer"))
    else:  # all of CLIP is there
        transformers.CLIPModel(transformers.CLIPConfig(**REWARDS["clip-l"])).save_pretrained(snapshot)
        tokenizer().save_pretrained(snapshot)
    torch.set_default_dtype(torch.float32)
    command = [sys.executable, "examples/mm/stable_diffusion/prompts_to_shards.py", embedded_prompts_path("train")]
    subprocess.run([*command, folder / "prompts"], check=True)


def tokenizer() -> Any:
    """CLIP's with as many tokens, which has learned no words: it reads letters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [f"unused{number}" for number in range(49408 - len(tokens) - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def published(name: str, folder: Path) -> list[str]:
    """The command's words, word for word but for its paths."""
    return [
        *("trainer.num_nodes=1", "trainer.devices=1"),
        *("model.micro_batch_size=1", "model.global_batch_size=8", "model.kl_coeff=0.2", "model.optim.lr=0.0001"),
        f"model.unet_config.from_pretrained={folder / 'unet.ckpt'}",
        f"model.first_stage_config.from_pretrained={folder / 'vae.bin'}",
        f"rm.model.restore_from_path={embedded_reward_path()}",
        f"model.data.train.webdataset.local_root_path={folder / 'prompts'}",
        f"exp_manager.explicit_log_dir={folder / 'results'}",
        *(word.format(RECIPES[name]) for word in SHORT),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the files and the run go (SD 1.5: 6 GB, SDXL: 8 GB)")
    parser.add_argument("--model", choices=RECIPES, default="sd15")
    parser.add_argument("--limit", type=float, default=17, help="GB that a process may take (default 17)")
    parser.add_argument("words", nargs="*", help="further overrides")
    arguments = parser.parse_intermixed_args()
    folder: Path = arguments.folder / arguments.model
    if not (folder / "prompts").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(arguments.model, folder)
    shutil.rmtree(folder / "results", ignore_errors=True)
    recipe, words = RECIPES[arguments.model], [*published(arguments.model, folder), *arguments.words]
    environment = {**os.environ, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    plan = ["nad-plan", "--config-name", recipe, "--gpu", "cpu", "--json", *words]
    planned = subprocess.run(plan, env=environment, stdout=subprocess.PIPE, text=True)
    if planned.returncode:  # it has said what would fit
        return planned.returncode
    needed = (found := json.loads(planned.stdout))["bytes_per_rank"]["needed_on_device"]
    print(f"planned: {needed / 1e9:.2f} GB, {found['seconds_per_step']:.0f} s a step", flush=True)
    script = f"examples/mm/stable_diffusion/train_{recipe.rpartition('_')[2]}_draftp.py"
    most = int(arguments.limit * 1e9)
    done = subprocess.run(
        ["torchrun", "--nproc_per_node=1", script, *words],
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),  # by more, torch's allocator fails
    )
    if (metrics := folder / "results" / "metrics.csv").exists():
        for row in csv.DictReader(metrics.read_text().splitlines()):
            peak = float(row["peak_memory_bytes"])
            print(f"step {row['step']}: {float(row['seconds']):.0f} s, gradient norm {float(row['grad_norm']):.3g}, "
                  f"peak {peak / 1e9:.2f} GB (planned {needed / peak - 1:+.1%})")  # fmt: skip
        print(json.loads((folder / "results" / "startup.json").read_text())["line"])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
