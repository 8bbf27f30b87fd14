"""Fast forms of our operations, one file each, beside a twin in plain PyTorch."""
