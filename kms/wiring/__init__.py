"""The only package that knows everything: builds the parts from the configuration and joins them.

Each public function is what one `kms` command does, grouped as the commands are. All raise `KmsError` or `ConfigError` with a
sentence that says what to do.
"""
