"""The mathematics: what can be computed from a network and a batch. Plain PyTorch, without files or clocks."""
