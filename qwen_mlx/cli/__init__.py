"""The commands: arguments, terminal, progress."""
