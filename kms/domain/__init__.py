"""Frozen values and pure functions: no await, clock, randomness, log or driver."""
