"""Certificates: a certificate authority whose keys stay in the token (RFC 5280)."""
