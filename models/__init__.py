"""Networks, distance operators, bounds, attacks and certifiers, in PyTorch and without file access."""
