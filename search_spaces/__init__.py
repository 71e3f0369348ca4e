"""Search spaces of sweeps, and the strict YAML reader."""
