"""Train the embedded CLIP, text tower and reward at once, contrastively on pictures and captions."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from augment import augment, unnatural
from common import AveragedWeights, Log, Training, to_unit, warm_up_and_cosine
from data import DataSet
from tokenizer import MAX_TOKENS, train_tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

BATCH = 128  # pictures, each with one caption
NEGATIVES = 16  # unnatural pictures no caption fits
WARMUP_STEPS = 150
#: Probability of a specific, a keyword and a broad caption.
CAPTION_SHARES = (0.62, 0.23, 0.15)
LARGEST_LOGIT_SCALE = 60.0


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A freshly initialised CLIP: 64x64 pictures in patches of 8, about 4.5 million parameters."""
    config = CLIPConfig(
        projection_dim=160,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "projection_dim": 160,
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,  # pooling reads the first of these
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "projection_dim": 160,
            "image_size": 64,
            "patch_size": 8,
        },
    )
    return CLIPModel._from_config(config, attn_implementation="eager")  # twice as fast as SDPA on a CPU at this size


def embed_images(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1], ``(B, 3, 64, 64)``, to unit vectors ``(B, 160)``."""
    pooled = clip.vision_model(pixel_values=images).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


def embed_texts(clip: CLIPModel, tokens: torch.Tensor) -> torch.Tensor:
    """Padded token ids ``(B, T)`` to unit vectors ``(B, 160)``."""
    pooled = clip.text_model(input_ids=tokens).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids ``(B, 24)``, padded and truncated."""
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return batch.input_ids


def contrastive_loss(logits: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy with several right answers.

    Args:
        logits: ``(B + negatives, B)``, pictures by captions; the negatives' rows come last.
        fits: ``(B, B)`` bool, whether a caption is one of a picture's.
    """
    size = fits.shape[0]
    target = fits.float()
    by_picture = -(F.log_softmax(logits[:size], dim=1) * target / target.sum(1, keepdim=True)).sum(1).mean()
    by_caption = -(F.log_softmax(logits, dim=0)[:size] * target / target.sum(0, keepdim=True)).sum(0).mean()
    return 0.5 * (by_picture + by_caption)


@torch.no_grad()
def retrieval(clip: CLIPModel, data: DataSet, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Naming accuracy: the share of pictures whose own name scores highest among all distinct names of the data set.

    ``all`` counts every picture, ``things`` the pictures without skin tone, ``held_out_variants`` and
    ``held_out_things`` the pairs never trained on; ``text_to_image`` is the reverse over the whole set.
    """
    clip.eval()
    names = [data.captions.texts[row[0][0]] for row in data.captions.of_picture]
    distinct = list(dict.fromkeys(names))
    own = torch.tensor([distinct.index(name) for name in names])
    texts = torch.cat([embed_texts(clip, t) for t in tokenize(tokenizer, distinct).split(512)])
    images = torch.cat([embed_images(clip, to_unit(b)) for b in data.images.split(256)])
    scores = images @ texts.T
    right = scores.argmax(1) == own
    five = (scores.topk(5, dim=1).indices == own[:, None]).any(1)
    base = torch.tensor([not picture.is_variant for picture in data.pictures])
    clip.train()
    return {
        "all": right.float().mean().item(),
        "all_top5": five.float().mean().item(),
        "things": right[base].float().mean().item(),
        "trained_things": right[base & (data.held_out == 0)].float().mean().item(),
        "held_out_variants": right[data.held_out == 1].float().mean().item(),
        "held_out_things": right[data.held_out == 2].float().mean().item(),
        "held_out_things_top5": five[data.held_out == 2].float().mean().item(),
        "text_to_image": (scores.argmax(0)[own] == torch.arange(len(own))).float().mean().item(),
        "logit_scale": clip.logit_scale.exp().item(),
    }


def clip_training(clip: CLIPModel, checkpoint: Path, log: Log, steps: int, save_every: int) -> Training:
    """The training of ``clip``'s parameters that require a gradient; matrices decay, vectors do not."""
    trained = [p for p in clip.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    average = AveragedWeights(clip, decay=0.995)
    return Training(clip, optimizer, average, checkpoint, log, steps=steps, save_every=save_every)


def record(training: Training, step: int, rate: float) -> None:
    """The end of a step: the logit scale is kept in bounds, and logged."""
    scale = training.module.logit_scale
    with torch.no_grad():
        scale.clamp_(max=math.log(LARGEST_LOGIT_SCALE))
    training.record(step, lr=rate, logit_scale=scale.exp().item())


def finish(training: Training, data: DataSet, tokenizer: CLIPTokenizer, folder: Path) -> Path:
    """Measure the averaged weights and save them in ``folder``."""
    clip = training.module
    clip.load_state_dict(training.average.values)
    clip.eval()
    training.log(**retrieval(clip, data, tokenizer))
    clip.save_pretrained(folder)
    return folder


def train_clip(data: DataSet, work_dir: Path, steps: int, learning_rate: float = 1e-3, seed: int = 0) -> Path:
    """Train for ``steps`` (resuming if interrupted); returns the folder with model and tokenizer."""
    folder = work_dir / "clip"
    checkpoint = work_dir / "clip_checkpoint.pt"
    log = Log(work_dir / "clip.jsonl")
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(data.captions.texts, folder)
    clip = build_clip(tokenizer).train()
    training = clip_training(clip, checkpoint, log, steps, save_every=400)

    tokens = tokenize(tokenizer, data.captions.texts)
    lengths = (tokens != tokenizer.pad_token_id).sum(1) + 1
    fits = data.captions.fits()
    index, weight = data.captions.sampling_table(CAPTION_SHARES)
    picture_weight = data.weights(flag_weight=0.6) * (data.held_out == 0)
    for step, generator in training.generators(seed):
        rate = learning_rate * warm_up_and_cosine(step, steps, WARMUP_STEPS)
        chosen = torch.multinomial(picture_weight, BATCH, replacement=False, generator=generator)
        captions = index[chosen].gather(1, torch.multinomial(weight[chosen], 1, generator=generator)).squeeze(1)
        clean = to_unit(data.images[chosen])
        images = torch.cat([augment(clean, generator), unnatural(clean, NEGATIVES, generator)])
        with torch.autocast("cpu", torch.bfloat16):
            image_vectors = embed_images(clip, images)
            text_vectors = embed_texts(clip, tokens[captions][:, : int(lengths[captions].max())])
        logits = clip.logit_scale.exp() * image_vectors @ text_vectors.T
        loss = contrastive_loss(logits, fits[chosen[:, None], captions[None, :]])
        training.update(step, rate, loss)
        record(training, step, rate)
    return finish(training, data, tokenizer, folder)
