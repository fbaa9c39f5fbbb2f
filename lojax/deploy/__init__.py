"""What leaves training: merged weights."""
