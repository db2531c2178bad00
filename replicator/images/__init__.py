"""Images: where blocks are written."""
