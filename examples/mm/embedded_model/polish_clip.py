"""Second phase of the embedded CLIP: the text tower is final, the vision tower and both projections learn on.

The denoiser is conditioned on the text tower's hidden states, so it can be trained from the end of the first phase on
while this one still runs. Frozen text states also make a step a good deal cheaper.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from augment import augment, unnatural
from common import Log, to_unit, warm_up_and_cosine
from data import DataSet
from train_clip import (
    BATCH,
    NEGATIVES,
    WARMUP_STEPS,
    clip_training,
    contrastive_loss,
    embed_images,
    finish,
    record,
    tokenize,
)
from transformers import CLIPModel, CLIPTokenizer

CAPTION_SHARES = (0.75, 0.15, 0.10)
CLEAN_SHARE = 0.3  # of the pictures are shown as they are


@torch.no_grad()
def pooled_texts(clip: CLIPModel, tokens: torch.Tensor) -> torch.Tensor:
    """What the text projection sees of every caption, ``(C, hidden)`` float32."""
    return torch.cat([clip.text_model(input_ids=part).pooler_output for part in tokens.split(512)])


def polish_clip(data: DataSet, work_dir: Path, steps: int, learning_rate: float = 7e-4, seed: int = 3) -> Path:
    """Train on for ``steps`` from ``work_dir/clip`` (resuming if interrupted) and replace the model there."""
    folder = work_dir / "clip"
    checkpoint = work_dir / "clip_polish_checkpoint.pt"
    log = Log(work_dir / "clip_polish.jsonl")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    clip = CLIPModel.from_pretrained(folder, attn_implementation="eager").train()
    clip.text_model.requires_grad_(False)
    training = clip_training(clip, checkpoint, log, steps, save_every=200)

    texts = pooled_texts(clip, tokenize(tokenizer, data.captions.texts))
    fits = data.captions.fits()
    index, weight = data.captions.sampling_table(CAPTION_SHARES)
    picture_weight = data.weights(flag_weight=0.6) * (data.held_out == 0)
    for step, generator in training.generators(seed):
        rate = learning_rate * warm_up_and_cosine(step, steps, WARMUP_STEPS)
        chosen = torch.multinomial(picture_weight, BATCH, replacement=False, generator=generator)
        captions = index[chosen].gather(1, torch.multinomial(weight[chosen], 1, generator=generator)).squeeze(1)
        clean = to_unit(data.images[chosen])
        plain = torch.rand((BATCH, 1, 1, 1), generator=generator) < CLEAN_SHARE
        seen = torch.where(plain, clean, augment(clean, generator))
        with torch.autocast("cpu", torch.bfloat16):
            image_vectors = embed_images(clip, torch.cat([seen, unnatural(clean, NEGATIVES, generator)]))
            text_vectors = F.normalize(clip.text_projection(texts[captions]).float(), dim=-1)
        logits = clip.logit_scale.exp() * image_vectors @ text_vectors.T
        loss = contrastive_loss(logits, fits[chosen[:, None], captions[None, :]])
        training.update(step, rate, loss)
        record(training, step, rate)
    return finish(training, data, tokenizer, folder)
