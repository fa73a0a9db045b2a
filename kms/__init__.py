"""Neo KMS: a self-hosted key-management service whose keys live behind an HSM."""

__version__ = "0.1.0"
