"""What the words of the command line share: options, folders, progress."""
