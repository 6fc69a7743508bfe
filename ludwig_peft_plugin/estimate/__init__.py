"""How much GPU memory a training run takes, worked out before it starts, on tensors without data."""
