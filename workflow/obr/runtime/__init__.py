"""Files, locks, caches, the hub, devices and code digests; nothing here knows a model."""
