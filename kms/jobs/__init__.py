"""One runner for what the service repeats by itself, and leased work in PostgreSQL."""
