"""What the user is told: what trains, and how it is executed."""
