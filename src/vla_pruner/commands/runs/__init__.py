"""Words of the command line that fill a run folder, or read one."""
