"""What a person sees of data, runs and models, and where else the figures go."""
