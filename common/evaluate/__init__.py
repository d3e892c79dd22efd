"""What a model is worth on held-out examples.

`questions` are the examples as they are asked, `metrics` judge answers (`json_values` as JSON, `own` by a function of
the user's), `scores` add judgements up, `pairs` compare those of two models. `beside_base` measures an adapter (a
`subject`) with its base, `compare` several runs, `harness` lets lm-evaluation-harness ask an `engine_model`; `verb` is
what the command line says.
"""
