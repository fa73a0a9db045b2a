"""Use cases: fetch, decide, act. What they need of the outside is a Protocol in `ports`."""
