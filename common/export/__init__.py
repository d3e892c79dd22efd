"""Adapters for other programs: each kind of file they load, written, read back, and held against the adapter itself.

An export is not called done because it was written, but because an engine computes the same logits from it
(proof.py). The cost: the base is loaded twice.
"""
