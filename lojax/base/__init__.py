"""The frozen base as a whole: quantizing it."""
