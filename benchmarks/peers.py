"""What is measured beside: TRL's ``AlignPropTrainer``, in the environment of ``benchmarks/peers.txt``, and a plain call
of ``diffusers``; see ``benchmarks.bench``."""

from __future__ import annotations

import itertools
import json
import random
import sys
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel

from benchmarks.turns import Worker, mean_reward


class Peer:
    """A worker on the model, prompts and reward that ``given`` names."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.worker, self.draw = given, Worker.on_standard_streams(), random.Random(given["seed"])
        self.clip: Any = CLIPModel.from_pretrained(f"{given['folder']}/clip").eval().requires_grad_(False)
        self.texts = load_file(f"{given['folder']}/texts.safetensors")

    def reward(self, images: Tensor, prompts: Any) -> Tensor:
        """PickScore's, as the embedded reward: pictures ``(B, 3, H, W)`` in [0, 1], of the size that it sees."""
        mean, std = (torch.tensor(self.given[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        pooled = self.clip.vision_model(pixel_values=(images - mean) / std).pooler_output
        rows = torch.stack([self.texts[prompt] for prompt in prompts])
        return self.clip.logit_scale.exp() * (normalize(self.clip.visual_projection(pooled), dim=-1) * rows).sum(-1)

    def pictures(self, prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        sampling = {"num_inference_steps": self.given["steps"], "guidance_scale": self.given["guidance"]}
        return self.pipe(prompt=prompts, generator=generators, output_type="pt", **sampling).images

    def next_step(self) -> bool:
        return self.worker.next_step(lambda: {
            "reward": mean_reward(self.given["validation"], self.pictures, self.reward),
            "trained": sum(p.numel() for p in self.pipe.unet.parameters() if p.requires_grad),
        })  # fmt: skip

    def take(self, pipe: Any) -> None:
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)
        self.worker.watch(pipe.vae.decoder)


def diffusers_call(peer: Peer) -> None:
    """Pictures without gradient."""
    peer.take(StableDiffusionPipeline.from_pretrained(peer.given["model"]))
    peer.pipe.unet.requires_grad_(False)
    for step in itertools.count():
        peer.next_step()
        prompts = peer.draw.choices(peer.given["prompts"], k=peer.given["batch"])
        peer.pictures(prompts, [torch.Generator().manual_seed(step + i) for i in range(len(prompts))])


def align_prop(peer: Peer) -> None:
    """TRL's trainer; of it are replaced: which layers have a LoRA, and that nothing is computed twice when counted."""
    from peft import LoraConfig
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    given = peer.given

    class Pipeline(DefaultDDPOStableDiffusionPipeline):
        recomputes = True

        def get_trainable_layers(self) -> Any:
            self.unet.add_adapter(LoraConfig(**given["lora"]))
            return self.unet

        def rgb_with_grad(self, **arguments: Any) -> Any:
            return super().rgb_with_grad(gradient_checkpoint=self.recomputes, **arguments)

    pipe = Pipeline(given["model"])
    trainer = AlignPropTrainer(
        AlignPropConfig(
            seed=given["seed"], mixed_precision="no", train_batch_size=given["batch"], sample_eta=0.0,
            train_learning_rate=given["rate"], train_adam_weight_decay=0.0, sample_num_steps=given["steps"],
            sample_guidance_scale=given["guidance"], truncated_backprop_rand=False,
            truncated_backprop_timestep=given["steps"] - given["active"],
        ),
        lambda images, prompts, metadata: (peer.reward(images, prompts), {}),
        lambda: (peer.draw.choice(given["prompts"]), {}),
        pipe,
    )  # fmt: skip
    trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: peer.worker.enter("optimizer"))
    peer.take(pipe.sd_pipeline)
    while True:
        pipe.recomputes = not peer.next_step()
        trainer.step(0, 0)


if __name__ == "__main__":
    given = json.loads(sys.stdin.readline())
    {"trl": align_prop, "diffusers": diffusers_call}[given["recipe"]](Peer(given))
