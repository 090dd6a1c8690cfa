"""What every kernel means, in plain PyTorch."""
