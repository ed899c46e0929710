"""One file per model family: what the denoiser is called with, how prompts are encoded and latents decoded."""
