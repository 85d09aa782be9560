"""Cut: take visual tokens out of a running decoder, and put everything back afterwards."""
