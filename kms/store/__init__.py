"""PostgreSQL: migrations, the pool, and the ports `Keys` and `Users`. A driver's exceptions end here (`errors.py`)."""
