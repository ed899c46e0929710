"""Preferences between two pictures of a prompt: shards of them, and batches for rewards and for diffusion models."""
