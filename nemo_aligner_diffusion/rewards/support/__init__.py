"""What rewards are made of: preparation of pictures, micro-batches, statistics, checks of files."""
