"""Pages that open anywhere: one template engine, one stylesheet, one film player."""
