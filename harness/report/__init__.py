"""Tables from measurements."""
