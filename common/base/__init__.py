"""The base model on the disk: fetched, checked, converted, described."""
