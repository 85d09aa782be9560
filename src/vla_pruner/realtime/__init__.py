"""A simulated arm that does not wait for its policy, behind our client; the policy in a server."""
