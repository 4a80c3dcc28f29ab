"""The Alpamayo networks in lean modules, their checkpoints, the prompt and the action space."""
