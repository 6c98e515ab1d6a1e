"""Finds the packages below each working folder; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

ROOTS = {
    "resight": "src/resight",
    "resight.training": "training",
    "resight.exporters": "exporters",
    "resight.service": "service",
    "resight.v1": "proto/resight/v1",
}

packages = {
    package: f"{folder}/{name.replace('.', '/')}".rstrip("/")
    for root, folder in ROOTS.items()
    for name in ["", *find_packages(folder)]
    for package in [f"{root}.{name}".rstrip(".")]
}
setup(packages=sorted(packages), package_dir=packages)
