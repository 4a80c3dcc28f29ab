"""Training of the small model in the procedural world."""
