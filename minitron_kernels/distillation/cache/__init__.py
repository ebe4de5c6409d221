"""A teacher's outputs on disk, found by the token ids of their sequence."""
