"""Pipelines out of files: what published architectures are made of, and their parts put together."""
