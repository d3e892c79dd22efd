"""What a run will need, said before anything is loaded: memory by part, time, and the changes that make it fit.

`shape` reads the model from config.json and safetensors headers, `activations` knows what each engine keeps of a layer,
`memory` adds the parts up, `changes` looks for what makes a run fit, `duration` for how long it takes, `guard` stops
`train` beforehand and explains where memory ran out all the same, `verb` is what a person sees.
"""
