"""How long a test waits for what must happen: so long that no busy machine decides what it says."""

PATIENCE = 300  # seconds
