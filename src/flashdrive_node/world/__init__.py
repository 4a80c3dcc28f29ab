"""A procedural driving world: roads, traffic, an expert driver, its reasons, and what the cameras see of it."""
