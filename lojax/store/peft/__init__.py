"""Hugging Face PEFT adapters: the file format, names, and conversion both ways."""
