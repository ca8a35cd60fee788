"""Runs properties under pytest: options, what is drawn, what is recorded, what is shown."""
