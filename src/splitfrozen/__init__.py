"""Fine-tune language models on data that stays on many unequal devices."""

__version__ = "0.1.0"
