"""`python -m kms`: the `kms` command."""

from kms.cli.main import main

if __name__ == "__main__":
    main()
