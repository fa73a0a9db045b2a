"""Uses of keys: signing, encryption, and the one way through which every caller uses a key."""
