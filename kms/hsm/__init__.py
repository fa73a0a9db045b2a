"""The HSM through PKCS#11; the only user of python-pkcs11."""
