"""What can be set, and what values make sense."""
