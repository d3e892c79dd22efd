"""Models from one format into another, tensor by tensor: a source, a target, and the check that nothing else was lost.

A source gives any model under Hugging Face's names as blocks of float32 rows (source.py), a target says which tensors
hold them and encodes them (target.py); neither knows the other, nor the disk (writing.py). The cost of one form in
between: a model that is packed already is unpacked to be packed again.
"""
