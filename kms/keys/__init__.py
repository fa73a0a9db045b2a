"""Keys: how they are used, charged and repeated. The other parts of the room still lie in `app`, `domain`, `store` and `rpc`."""
