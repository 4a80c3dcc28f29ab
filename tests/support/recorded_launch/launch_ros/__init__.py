"""As ``launch`` beside it."""
