"""VLA-Cache: keys and values of the last step for static tokens. Its method, hooks and memory."""
