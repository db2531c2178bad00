"""The steps from an empty database to the present schema, one module each; ``database.py`` takes them."""
