"""The metrics of a run, one file each: see :mod:`.base` for what such a file declares."""
