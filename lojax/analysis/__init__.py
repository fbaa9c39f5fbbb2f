"""Looking inside: what an adapter does to its base, what two adapters share, and advice that follows from it."""
