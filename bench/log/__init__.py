"""What is wanted of the log: of sealing, applying, vast disks, many disks, and starts over a journal."""
