"""X.509 and public keys, by pyca/cryptography."""
