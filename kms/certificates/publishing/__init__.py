"""Authority certificates, CRLs and OCSP answers over plain HTTP: the one place with aiohttp that needs no TLS."""
