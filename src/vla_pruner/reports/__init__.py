"""From finished episodes to tables, curves and pages."""
