"""X.509 by pyca/cryptography, which writes and reads all DER. The token signs."""
