"""The embedded stack for development and tests: PostgreSQL, SoftHSM and certificates of its own."""
