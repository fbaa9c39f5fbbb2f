"""One rule for each primitive that can meet an adapted weight."""
