"""What a run will need before it is run: memory, operations, communication and time on named GPUs (``nad-plan``)."""
