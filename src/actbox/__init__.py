"""actbox."""
