"""Authorities and certificates in PostgreSQL. A row is believed only with the MAC that the service made of it."""
