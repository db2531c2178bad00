"""Transport: TLS, connections and the shell around the sans-IO protocol."""
