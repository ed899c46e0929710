"""Prompt shards in, batches out, and the writers of such shards."""
