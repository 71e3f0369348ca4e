"""Tests of the packages' `__all__`: the names exist, and none of them shadows a module."""

import importlib
import pkgutil

import pytest

PACKAGES = ["distance", "networks", "robustness"]
PACKAGES += [f"robustness.{name}" for name in ("attacks", "bounds", "certification", "objectives")]


@pytest.mark.parametrize("name", PACKAGES)
def test_exports_exist_and_shadow_no_module(name: str) -> None:
    package = importlib.import_module(f"linflab.models.{name}")
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert package.__all__ and len(set(package.__all__)) == len(package.__all__)
    for exported in package.__all__:
        assert hasattr(package, exported) and exported not in modules
