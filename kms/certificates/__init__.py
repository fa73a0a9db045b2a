"""CertificateService: authorities in the HSM, the certificates that they issue, and what becomes of those."""
