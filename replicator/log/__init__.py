"""What a master target has received and not yet applied, and what it has overwritten, in durable segments."""
