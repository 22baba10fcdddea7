"""Captioned images: stores, shards, order, decoding, the loader and the embedded sample."""
