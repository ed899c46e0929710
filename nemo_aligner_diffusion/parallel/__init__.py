"""Process groups and layouts; nothing outside this package calls torch.distributed."""
