"""How the processes of a run are started, and what they need."""
