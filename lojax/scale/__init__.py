"""Many chips: shardings of adapters and optimizer state, the traffic of a program, and plans before renting."""
