"""`python setup.py` and `pip install .` both end here; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
