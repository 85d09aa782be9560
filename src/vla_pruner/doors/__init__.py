"""The protocols that robots speak: bytes to an episode's observation, and a reply to bytes."""
