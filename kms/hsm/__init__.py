"""The HSM through PKCS#11; the only user of python-pkcs11. Begin with `open_hsm` in `token_hsm`."""
