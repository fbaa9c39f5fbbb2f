"""What outlives the run: checkpoints and exchange formats."""
