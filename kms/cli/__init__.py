"""The `kms` command."""
