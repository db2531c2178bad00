"""The control server's parts: its database, who may do what, and the HTTP API. No disk data passes here."""
