"""A denoiser called at a noise level of our choice: levels, calls, latents of given pictures."""
