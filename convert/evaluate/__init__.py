"""What a checkpoint is worth and what it costs: quality, compute, speed, use of experts."""
