"""Everything about the package is said in pyproject.toml; compiled extensions will be listed here."""

from setuptools import setup

setup()
