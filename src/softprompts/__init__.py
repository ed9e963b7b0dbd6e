"""Train, combine and serve soft prompts for frozen transformers."""

__version__ = "0.1.0"
