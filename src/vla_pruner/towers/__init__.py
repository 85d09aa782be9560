"""Methods that read the vision tower's own attention."""
