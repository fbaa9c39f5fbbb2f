"""What is adapted: rules, targets, axes, adapters, and the two trees."""
