"""Methods that compare a step with earlier ones, by more than what actions looked at."""
