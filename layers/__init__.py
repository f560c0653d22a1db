"""The layers: what is measured here, and what other people's models import.

One folder a layer. ``contract.py`` says what a layer offers; ``CONTRIBUTING.md`` how to add one.
"""
