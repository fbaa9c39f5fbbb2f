"""What a training loop needs besides the gradient."""
