"""Pictures of a run, drawn from what it left in its directory."""
