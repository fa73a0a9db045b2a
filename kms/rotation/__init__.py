"""Rotation: a key gets a successor, which takes its name and everything that depends on it."""
