"""Engines: what turns an observation into a prediction, behind one protocol."""
