"""Checks of the installation and the machine for `linflab doctor`."""
