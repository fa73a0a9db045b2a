"""Generated from proto/kms/v1; never edited."""
