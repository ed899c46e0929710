"""Configuration, assembly of model, reward, data and trainer, checkpoints and logging."""
