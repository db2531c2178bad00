"""Alembic reads the modules here by path. A step that was released is never changed: another one is added."""
